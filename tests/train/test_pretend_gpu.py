"""Runs as on a GPU, where there is none: nothing of theirs is on the wrong device, and they learn what a CPU learns."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from host_build import compile_on_host
from torch.utils import backend_registration
from training import steps, train

from rwkv_nb.config import Settings, replace
from rwkv_nb.model import RWKV, Shape, init_weights, save_weights
from rwkv_nb.runs import Run

HERE = Path(__file__).parent
SHAPES = {7: Shape(2, 128, 260, 32, 32, 32, 32, 512), 5: Shape(2, 128, 260, 0, 0, 0, 0, 448, version="x052"),
          6: Shape(2, 128, 260, 32, 0, 0, 0, 448, version="x060", rank_mix=16)}
CASES = {   # (version, settings)
    "plain": (7, {}),
    "small": (7, {"precision": "bf16", "grad_cp": "block", "emb_cpu": 1, "quant": "int8", "quant_head": 1}),
    "half": (7, {"precision": "fp16", "grad_cp": "selective", "accumulate_grad_batches": 2}),
    "chunks": (7, {"chunk_ctx": 8, "adam_state": "bf16", "emb_cpu": 1, "train_parts": ["ln_x", "att.r_k"]}),
    "packed": (7, {"dataload": "pack", "grad_cp": "block"}),
    "older": (6, {"dataload": "pack", "precision": "bf16", "emb_cpu": 1}),
    "oldest": (5, {"train_parts": ["time_decay"], "merge": 1}),
}
AROUND = {"finish", "finish_backward", "loss", "shift", "shift_backward"}


pytestmark = pytest.mark.skipif(not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
                                reason="this torch knows no device of Python's making")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, chats):
    """(folder, settings of each case, what was printed of each)"""
    folder, settings = tmp_path_factory.mktemp("pretend"), {}
    for version, shape in SHAPES.items():
        save_weights(folder / f"{version}.pth", init_weights(RWKV(shape), seed=0).state_dict())
    for name, (version, changes) in CASES.items():
        given = {"data_file": str(chats), "tokenizer": "byte", "ctx_len": 24, "r": 4, "lora_dropout": 0.0,
                 "micro_bsz": 2, "epoch_count": 1, "heldout": 0.6, "merge": 0}
        settings[name] = replace(Settings(), load_model=str(folder / f"{version}.pth"), **given | changes)
    library = compile_on_host(tmp_path_factory, "wkv", "pointwise", "loss")
    cases = json.dumps({name: dataclasses.asdict(s) for name, s in settings.items()})
    done = subprocess.run([sys.executable, HERE / "on_pretend_gpu.py", library, folder, cases], text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, settings, dict(zip(CASES, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_it_learns_what_a_cpu_learns(runs, name, tmp_path):
    folder, settings, said = runs
    train(tmp_path / "cpu", settings[name], prompts=["User: who?"], max_tokens=3)
    there, here = Run(folder / name).metrics(), Run(tmp_path / "cpu").metrics()
    assert said[name]["status"] == "finished" and len(steps(there)) == len(steps(here)) > 3
    close = 1e-4 if settings[name].train.precision == "fp32" else 3e-2
    for key in ("loss", "grad_norm"):
        assert [row[key] for row in steps(there)] == pytest.approx([row[key] for row in steps(here)], rel=close)


@pytest.mark.parametrize("name", CASES)
def test_the_kernels_are_used(runs, name):
    called = {operator.removeprefix("rwkv_nb::") for operator in runs[2][name]["called"]}
    version, changes = CASES[name]
    wkv = {f"wkv{version}", f"wkv{version}_backward", *(("prepare", "prepare_backward") if version == 7 else ())}
    learnt = {"finish_backward"} if "ln_x" in changes.get("train_parts", ()) else set()   # that is PyTorch's to do
    assert called >= AROUND - learnt | wkv
    assert not called & learnt
