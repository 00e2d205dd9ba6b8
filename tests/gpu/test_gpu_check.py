"""`make gpu-check` itself, tried on the CPU at small sizes: it records each case and goes on where it was cut."""

import importlib.util
import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent / "gpu_check.py"
PEER = """
from rwkv_nb.wkv import wkv7
KERNELS = {"a peer": (7, lambda *x: wkv7(*x, op="chunked")[0])}
"""


def check(folder, part, *more):
    done = subprocess.run([sys.executable, SCRIPT, part, "--out", folder, "--device", "cpu", *more],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, [json.loads(line) for line in (folder / f"{part}.jsonl").read_text().splitlines()]


def test_kernels_and_a_run_that_was_cut(tmp_path):
    (tmp_path / "peer.py").write_text(PEER)
    said, lines = check(tmp_path, "kernels", "--peer", tmp_path / "peer.py")
    assert {line["case"] for line in lines} >= {
        "right: WKV-7 cpu float32", "right: WKV-5 cpu float16", "around: WKV-6 cpu", "time: WKV-6 cpu B1 T64 H2",
        "time: WKV-7 a peer B1 T64 H2"}
    assert all(line["result"].get("ok", True) for line in lines)
    assert f"{len(lines)} of {len(lines)} cases are good" in said
    whole = (tmp_path / "kernels.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "kernels.jsonl").write_text("".join(whole[:-1]) + whole[-1][:9])
    said, again = check(tmp_path, "kernels", "--peer", tmp_path / "peer.py")
    assert again[:-1] == lines[:-1] and again[-1]["case"] == lines[-1]["case"]
    assert said.count("\nright:") == 0 and "| right: WKV-7 cpu float32 |" in said


def test_a_case_that_costs_the_gpu_costs_no_other(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    gpu_check = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gpu_check)

    def lost(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    again = []
    part = Namespace(cases=lambda _: [("good", dict), ("bad", lost), ("behind", dict)])
    monkeypatch.setattr(gpu_check, "machine", lambda device: {})
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    monkeypatch.setattr(os, "execv", lambda program, command: again.extend(command) or sys.exit())
    options = Namespace(device="cuda", only="", but=[])
    with pytest.raises(SystemExit):
        gpu_check.run(part, tmp_path / "x.jsonl", options)
    assert again[-2:] == ["--but", "bad"]
    options.but = again[-1:]
    results = gpu_check.run(part, tmp_path / "x.jsonl", options)
    assert results == {"good": {}, "bad": {"error": "it cost the GPU"}, "behind": {}}


def test_train(tmp_path):
    said, lines = check(tmp_path, "train")
    assert lines[0]["result"]["op"] == "cpu" and "| tiny B1 T16 none | cpu |" in said
