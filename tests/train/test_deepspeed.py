"""DeepSpeed's strategies: the same run as one process, whatever is shared out, and the same files."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training import steps, train, until

from rwkv_nb.config import check_together, replace
from rwkv_nb.errors import SettingsError
from rwkv_nb.lora.adapter import load_adapter
from rwkv_nb.runs import Run
from rwkv_nb.train.launch import session_for, torchrun
from rwkv_nb.train.ranks import Ranks
from rwkv_nb.train.zero import DeepSpeedUpdate

PROMPT = "User: red\n\nAssistant:"


@pytest.fixture
def two(settings):
    return replace(settings, devices=2, accelerator="cpu", micro_bsz=1, accumulate_grad_batches=2, lora_dropout=0.0,
                   lr_init=3e-3, epoch_count=2, grad_clip=0.5)


there = pytest.mark.skipif(not importlib.util.find_spec("deepspeed"), reason="the extra deepspeed is not installed")


@pytest.mark.soak
@there
@pytest.mark.parametrize("strategy, changes", [
    ("deepspeed_stage_1", {"epoch_count": 8}), ("deepspeed_stage_2", {"epoch_count": 8}), ("deepspeed_stage_3", {}),
    ("deepspeed_stage_1", {"quant": "nf4", "train_parts": ("ln",), "chunk_ctx": 16}),
    ("deepspeed_stage_2_offload", {"precision": "fp16", "epoch_count": 8}),
    ("deepspeed_stage_3_offload", {"precision": "bf16", "grad_cp": "block"}),
])
def test_two_processes_equal_one_and_go_on_as_one(tmp_path, two, chats, strategy, changes):
    """Changed live, stopped, gone on with as one process, and by two again: one run in one process equals it."""
    asked = replace(two, strategy=strategy, eval_file=str(chats), **changes)
    alone = replace(asked, devices=1, micro_bsz=2)
    session = session_for(tmp_path / "two", asked, prompts=[PROMPT], max_tokens=4).start()
    session.pause()
    until(lambda: session.snapshot().status in ("paused", "failed"), 300)
    held = session.snapshot().step
    session.change(lr_init=1e-3, grad_clip=0.1, accumulate_grad_batches=3)
    session.save_now()
    session.resume()
    until(lambda: session.snapshot().step >= held + 3 or session.snapshot().done)
    session.stop()
    first = session.join()
    assert first.status == "stopped"
    session = session_for(tmp_path / "two", replace(alone, micro_bsz=1), start="resume").start()
    session.change(accumulate_grad_batches=6)
    until(lambda: session.snapshot().step >= first.step + 2)
    session.stop()
    second = session.join()
    session = session_for(tmp_path / "two", asked, start="resume").start()
    session.change(accumulate_grad_batches=3)
    end = session.join()
    assert end.status == "finished" and end.step > second.step
    one = train(tmp_path / "one", alone, planned={held: {"lr_init": 1e-3, "grad_clip": 0.1,
                                                         "accumulate_grad_batches": 3}}, prompts=[PROMPT], max_tokens=4)
    tolerance = 1e-5 if "precision" not in changes else 2e-3
    for a, b in zip(steps(end.rows), steps(one.rows), strict=True):
        assert (a["step"], a["tokens"], a["lr"]) == (b["step"], b["tokens"], b["lr"])
        assert a["loss"] == pytest.approx(b["loss"], rel=tolerance)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=10 * tolerance)
    assert first.samples[0].base == one.samples[0].base
    evals = [[row["heldout_loss"] for row in rows if row.get("event") == "eval"] for rows in (end.rows, one.rows)]
    assert evals[0] == pytest.approx(evals[1], rel=tolerance) and len(evals[0]) > 1
    mine, theirs = (load_adapter(Run(tmp_path / name).last_adapter()).tensors for name in ("two", "one"))
    for key in mine:
        torch.testing.assert_close(mine[key], theirs[key], rtol=1e-2, atol=100 * tolerance * 1e-2)


@pytest.mark.soak
@there
def test_stages_share_out_what_they_name(tmp_path, two):
    strategies = ("ddp", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_3")
    Run(tmp_path).save_settings(two)
    script = Path(__file__).with_name("zero_shares.py")
    subprocess.run([*torchrun(two.train), script, tmp_path, *strategies], check=True)
    for rank in (0, 1):
        held = json.loads((tmp_path / f"held-{rank}.json").read_text())
        assert held["ddp"] == [1, 1]
        assert held["deepspeed_stage_1"] == held["deepspeed_stage_2"] == [1, pytest.approx(0.5, abs=0.01)]
        assert 0.5 < held["deepspeed_stage_3"][0] < 0.6     # vectors stay whole
        assert held["deepspeed_stage_3"][1] == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("strategy, changes, name", [
    ("deepspeed_stage_1", {"adam_state": "8bit"}, "adam_state"),
    ("deepspeed_stage_3", {"quant": "nf4"}, "quant"),
    ("deepspeed_stage_3", {"emb_cpu": 1}, "emb_cpu"),
    ("deepspeed_stage_3_offload", {"chunk_ctx": 8}, "chunk_ctx"),
    ("deepspeed_stage_3", {"train_parts": ("ln",)}, "train_parts"),
])
def test_what_contradicts_a_strategy_is_refused_by_name(two, strategy, changes, name):
    check_together(replace(two, strategy=strategy))
    check_together(replace(two, strategy=strategy, devices=1, **changes))     # one device needs none
    with pytest.raises(SettingsError) as caught:
        check_together(replace(two, strategy=strategy, **changes))
    assert caught.value.where == name and "ddp" in caught.value.fix or name == "emb_cpu"


def test_deepspeed_that_is_not_there_is_said(two, monkeypatch):
    class Two(Ranks):
        size = 2

    monkeypatch.setitem(sys.modules, "deepspeed", None)     # what importing finds where it is not installed
    parameters, asked = [torch.nn.Parameter(torch.zeros(3))], replace(two, strategy="deepspeed_stage_1")
    with pytest.raises(SettingsError, match=r"rwkv_nb\[deepspeed\]"):
        DeepSpeedUpdate(torch.nn.Module(), parameters, asked.train, Two(), torch.device("cpu"))
