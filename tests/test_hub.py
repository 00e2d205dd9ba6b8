"""Base models by name, from a server on this machine that answers as the hub does."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading

import pytest

from rwkv_nb import hub
from rwkv_nb.errors import CheckpointError, RunError
from rwkv_nb.widgets.weights import BaseChooser

NEW, OLD = "rwkv7-g1-0.1b-20990101-ctx8192.pth", "rwkv7-g1-0.1b-20250307-ctx4096.pth"


class Hub(http.server.ThreadingHTTPServer):
    """Files of BlinkDL/rwkv7-g1. cut: the connection breaks after so many bytes of a file, once."""

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), Answer)
        self.files, self.cut, self.asked, self.lie, self.checksums = files, 0, [], "", True
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()


class Answer(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        server, path = self.server, self.path.partition("?")[0]
        self.server.asked.append((self.command, path, self.headers.get("Range")))
        if path.startswith("/api/models/BlinkDL/rwkv7-g1"):
            siblings = [{"rfilename": name, "size": len(data), "blobId": "0" * 40, "lfs": {
                "size": len(data), "sha256": server.lie or hashlib.sha256(data).hexdigest(), "pointerSize": 130}
                if server.checksums else None} for name, data in server.files.items()]
            self.answer(json.dumps({"id": "BlinkDL/rwkv7-g1", "sha": "a" * 40, "siblings": siblings}).encode())
        elif path.startswith("/BlinkDL/rwkv7-g1/resolve/") and path.rpartition("/")[2] in server.files:
            data = server.files[path.rpartition("/")[2]]
            etag = hashlib.sha256(data).hexdigest()
            self.answer(data, **{"X-Repo-Commit": "a" * 40, "ETag": f'"{etag}"', "X-Linked-Etag": f'"{etag}"',
                                 "X-Linked-Size": str(len(data)), "Accept-Ranges": "bytes"})
        else:
            self.send_error(404)

    do_HEAD = do_GET

    def answer(self, data, **headers):
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        self.send_response(206 if self.headers.get("Range") else 200)
        if self.headers.get("Range"):
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        for name, value in {"Content-Length": str(len(data) - start), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        cut, self.server.cut = (self.server.cut, 0) if "ETag" in headers else (0, self.server.cut)
        self.wfile.write(data[start:start + cut] if cut else data[start:])
        if cut:
            self.close_connection = True


@pytest.fixture
def server():
    hub = Hub({NEW: os.urandom(3_000_000), OLD: b"old", "README.md": b"#", "rwkv7-g1-0.4b-20250324-ctx4096.pth": b"4"})
    yield hub
    hub.shutdown()


def test_the_newest_of_a_name_with_its_size_first_and_checked(server, tmp_path):
    said, seen = [], []
    path = hub.get("rwkv7-g1-0.1b", tmp_path / "models", endpoint=server.endpoint, say=said.append,
                   progress=lambda done, total: seen.append((done, total)))
    assert path == tmp_path / "models" / NEW and path.read_bytes() == server.files[NEW]
    assert said[0].startswith(f"{NEW}: 3 MB, from BlinkDL/rwkv7-g1") and said[-1].endswith("checked")
    assert seen[-1] == (3_000_000, 3_000_000)
    assert hub.find(OLD, endpoint=server.endpoint).size == 3
    server.asked.clear()
    assert hub.get("rwkv7-g1-0.1b", tmp_path / "models", endpoint=server.endpoint, say=said.append) == path
    assert not any("resolve" in asked for _, asked, _ in server.asked)     # it is there: nothing is fetched


@pytest.mark.parametrize("how", ["within one call", "in the next"])
def test_a_download_goes_on_where_it_stopped(server, tmp_path, how):
    server.files[NEW] = os.urandom(22_000_000)
    if how == "in the next":       # what a killed process left
        (tmp_path / f"{NEW}.part").write_bytes(server.files[NEW][:15_000_000])
    else:
        server.cut = 15_000_000
    path = hub.get("rwkv7-g1-0.1b", tmp_path, endpoint=server.endpoint, say=str)
    assert path.read_bytes() == server.files[NEW] and [p.name for p in tmp_path.iterdir()] == [NEW]
    starts = [int(wanted.removeprefix("bytes=").partition("-")[0]) for _, _, wanted in server.asked if wanted]
    assert starts[-1] >= 10_000_000      # the hub's client counts in pieces of 10 MB


def test_the_disk_has_to_take_only_what_is_missing(server, tmp_path, monkeypatch):
    monkeypatch.setattr("rwkv_nb.runs.free_bytes", lambda path: 2_000_000)
    with pytest.raises(RunError, match="needs 3 MB"):
        hub.get("rwkv7-g1-0.1b", tmp_path, endpoint=server.endpoint, say=str)
    (tmp_path / f"{NEW}.part").write_bytes(server.files[NEW][:1_500_000])
    assert hub.get("rwkv7-g1-0.1b", tmp_path, endpoint=server.endpoint, say=str).read_bytes() == server.files[NEW]


def test_a_wrong_checksum_is_refused_and_the_file_removed(server, tmp_path):
    server.lie = "0" * 64
    with pytest.raises(CheckpointError, match="checksum"):
        hub.get("rwkv7-g1-0.1b", tmp_path, endpoint=server.endpoint, say=str)
    assert not list(tmp_path.iterdir())


def test_without_a_checksum_of_the_hubs_the_size_counts(server, tmp_path):
    server.checksums, said = False, []
    path = hub.get("rwkv7-g1-0.1b", tmp_path, endpoint=server.endpoint, say=said.append)
    assert path.read_bytes() == server.files[NEW] and "no checksum" in said[-1]


def test_names_that_are_not_there(server, tmp_path):
    with pytest.raises(CheckpointError, match="no 'rwkv7-g1-0.3b' in BlinkDL") as caught:
        hub.get("rwkv7-g1-0.3b", tmp_path, endpoint=server.endpoint)
    assert "rwkv7-g1-0.4b-20250324-ctx4096.pth" in caught.value.fix
    with pytest.raises(CheckpointError, match="no published model 'llama'"):
        hub.get("llama", tmp_path, endpoint=server.endpoint)
    for name in hub.KNOWN:
        assert hub.repository(name).startswith("BlinkDL/")


def test_offline_it_says_which_file_goes_where(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be reached") as caught:
        hub.get("rwkv7-g1-0.1b", tmp_path, endpoint="http://127.0.0.1:9")
    assert OLD in caught.value.fix and "models/" in caught.value.fix and "HF_ENDPOINT" in caught.value.fix


def test_the_command_and_the_mirror_setting(server, tmp_path):
    done = subprocess.run([sys.executable, "-m", "rwkv_nb.cli", "get", "rwkv7-g1-0.1b", "--folder", str(tmp_path)],
                          env=os.environ | {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path / "home")},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / NEW).read_bytes() == server.files[NEW] and "3 MB" in done.stdout


def test_the_drop_down_says_the_size_and_fetches(server, tmp_path):
    chooser = BaseChooser(tmp_path, endpoint=server.endpoint)
    name, size, get, bar = chooser.children[0].children
    assert list(name.options) == list(hub.KNOWN) and name.value == "rwkv7-g1-0.1b"
    assert (size.click(), chooser.join())[1] is None and chooser.said.value == f"{NEW}: 3 MB"
    assert (get.click(), chooser.join())[1] == tmp_path / NEW
    assert bar.children[0].value == 1 and "checked" in chooser.said.value
    name.value = "llama"
    get.click()
    chooser.join()
    assert "no published model" in chooser.said.value
