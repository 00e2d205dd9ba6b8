"""Merged models, exported, in the programs they are for: RWKV Runner's server, and web-rwkv, which is Ai00's engine.

    python tests/export/other_programs.py --runner FOLDER --runner-python PYTHON --web-python PYTHON

--runner is RWKV Runner's backend-python folder, --runner-python a Python with its requirements; --web-python one with
the package web-rwkv-py (0.2.3 knows v6 and v5 only) on a machine where Vulkan works, if only Mesa's on a CPU. Runner
continues a prompt greedily over HTTP: its text must be ours, as far as it goes (it ends at half a character). web-rwkv
reads 20 tokens: its logits, from float16, must be ours to 1 % of the largest. On Mesa's CPU driver its v6 gives other
logits for the same tokens from one reading to the next, so it reads ten times: the nearest counts, the farthest is
written down too. Writes results/exports.json.
"""

import argparse
import contextlib
import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import torch

from rwkv_nb.config import LoraSettings
from rwkv_nb.export import export_ai00, export_runner
from rwkv_nb.generate import generate
from rwkv_nb.lora.adapter import save_adapter
from rwkv_nb.lora.layers import attach
from rwkv_nb.lora.merge import merge
from rwkv_nb.lora.meta import AdapterMeta
from rwkv_nb.model import PUBLISHED, PUBLISHED_OLDER, RWKV, fingerprint, init_weights, load_model, save_weights
from rwkv_nb.tokenizer import get_tokenizer

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "exports.json"
PROMPT, TOKENS = "User: What grows on the moon? 月亮上长什么?\n\nAssistant:", 24
SHAPES = {version: replace(shape, n_layer=12, n_embd=256, ffn_dim=896 if version != "x070" else 1024)
          for version, shape in (("x070", PUBLISHED["0.1B"]), ("x060", PUBLISHED_OLDER["v6 1.6B"]),
                                 ("x052", PUBLISHED_OLDER["v5 0.4B"]))}
READ_IN_WEB_RWKV = """
import json, sys, web_rwkv_py
model = web_rwkv_py.Model(sys.argv[1])
for _ in range(10):
    model.clear_state()
    print(json.dumps(list(model.run(json.loads(sys.argv[2])))))
"""


@torch.no_grad()
def merged_model(folder: Path, version: str) -> Path:
    """A random base of this version, in which every layer takes part, merged with a random adapter."""
    random = torch.Generator().manual_seed(1)
    model = init_weights(RWKV(SHAPES[version]), 0)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter += 0.05 * torch.randn(parameter.shape, generator=random)
    base, adapter, out = (folder / f"{version}{end}" for end in (".pth", ".safetensors", "-merged.pth"))
    save_weights(base, model.half().state_dict())
    model, lora = load_model(base, dtype=torch.float32), LoraSettings(r=4, lora_alpha=12.0)
    for name in attach(model, lora, 0):
        model.get_submodule(name).lora_B.normal_(std=0.05, generator=random)
    save_adapter(adapter, model, AdapterMeta(lora.r, lora.lora_alpha, lora.target_modules, model.shape,
                                             fingerprint(base), base.name, "chat", "world", epoch=1, step=1))
    merge(base, adapter, out)
    return out


def post(port: int, path: str, body: dict) -> str:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    return urllib.request.urlopen(request, timeout=300).read().decode()


@contextlib.contextmanager
def runner_server(folder: str, python: str):
    """The port of a Runner that has just been started: it cannot go from v7 to an older version."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([python, "main.py", "--port", str(port)], cwd=folder, stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL)
    try:
        for _ in range(60):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(1)
        yield port
    finally:
        server.terminate()
        server.wait()


def in_runner(merged: Path, folder: str, python: str) -> dict:
    """How many characters of Runner's answer are ours, and whether all are."""
    export_runner(merged, out := merged.with_name(f"{merged.stem}-runner.pth"))
    with runner_server(folder, python) as port:
        post(port, "/switch-model", {"model": str(out), "strategy": "cpu fp32"})
        answer = json.loads(post(port, "/v1/completions", {
            "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 1, "top_p": 0, "presence_penalty": 0,
            "frequency_penalty": 0, "stop": ["\0"], "stream": False}))["choices"][0]["text"]
    ours, = generate(load_model(out, dtype=torch.float32), get_tokenizer("world"), [PROMPT], max_tokens=TOKENS, stop=())
    return {"characters": len(answer), "same": len(answer) > 5 and ours.startswith(answer)}


@torch.inference_mode()
def in_web_rwkv(merged: Path, python: str) -> dict:
    """The largest difference of the last token's logits, in the nearest and the farthest reading, and the largest."""
    export_ai00(merged, out := merged.with_suffix(".st"))
    ids = torch.randint(1, 65530, (20,), generator=torch.Generator().manual_seed(2))
    told = subprocess.run([python, "-c", READ_IN_WEB_RWKV, str(out), json.dumps(ids.tolist())], capture_output=True,
                          text=True, check=True).stdout
    ours = load_model(out, dtype=torch.float32)(ids[None])[0][0, -1]
    errors = [(ours - torch.tensor(json.loads(line))).abs().max().item() for line in told.splitlines()]
    largest = ours.abs().max().item()
    return {"nearest": round(min(errors), 4), "farthest": round(max(errors), 4), "largest_logit": round(largest, 2),
            "same": min(errors) < 0.01 * largest}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("runner", "runner-python", "web-python"):
        parser.add_argument(f"--{name}", required=True)
    options, result = parser.parse_args(), {"RWKV Runner": {}, "web-rwkv": {}}
    with tempfile.TemporaryDirectory() as folder:
        for version in SHAPES:
            merged = merged_model(Path(folder), version)
            result["RWKV Runner"][version] = in_runner(merged, options.runner, options.runner_python)
            if version != "x070":
                result["web-rwkv"][version] = in_web_rwkv(merged, options.web_python)
    print(json.dumps(result, indent=1))
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all(case["same"] for program in result.values() for case in program.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
