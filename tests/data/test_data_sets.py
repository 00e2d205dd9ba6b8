"""A data set by its name, from a server on this machine that answers as the mirrors of the hub do."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading

import pytest

NAME, COMMIT = "somebody/some-set", "a" * 40
ROWS = b"\n".join(json.dumps({"query": f"问 {i}", "response": f"{i}"}).encode() for i in range(9))


class Mirror(http.server.BaseHTTPRequestHandler):
    """somebody/some-set, which is one file; everything else is not there."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        path = self.path.partition("?")[0]
        file = {"type": "file", "path": "train.jsonl", "size": len(ROWS), "oid": "0" * 40}
        answers = {f"/datasets/{NAME}/resolve/{COMMIT}/train.jsonl": ROWS,
                   f"/api/datasets/{NAME}/tree/{COMMIT}": json.dumps([file]).encode()}
        for ending in ("", f"/revision/{COMMIT}"):
            answers[f"/api/datasets/{NAME}{ending}"] = json.dumps(
                {"id": NAME, "sha": COMMIT, "siblings": [{"rfilename": "train.jsonl"}]}).encode()
        held = answers.get(path, b"")
        self.server.asked.append(path)
        self.send_response(200 if held else 404)
        etag = f'"{hashlib.sha256(held).hexdigest()}"'
        headers = {"X-Repo-Commit": COMMIT, "ETag": etag} if held else {"X-Error-Code": "EntryNotFound"}
        for name, value in {"Content-Length": str(len(held)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(held)

    do_HEAD = do_GET


SCRIPT = """
from rwkv_nb.config import DataSettings
from rwkv_nb.data.sources import open_documents
from rwkv_nb.tokenizer import ByteTokenizer
import json, sys
data = DataSettings(sys.argv[1], "sft", sft_field=("query", "response"), sft_split="train[:4]")
tokenizer = ByteTokenizer()
print(json.dumps([tokenizer.decode(document.tokens) for document in open_documents(data, tokenizer)]))
"""


def test_the_mirror_is_asked(tmp_path):
    pytest.importorskip("datasets")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Mirror)
    server.asked = []
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    mirror = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", SCRIPT, NAME], check=True, env={**os.environ, **mirror},
                          stdout=subprocess.PIPE, text=True)
    server.shutdown()
    assert json.loads(done.stdout.splitlines()[-1]) == [f"User: 问 {i}\n\nAssistant: {i}" for i in range(4)]
    assert f"/datasets/{NAME}/resolve/{COMMIT}/train.jsonl" in server.asked
