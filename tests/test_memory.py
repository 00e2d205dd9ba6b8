"""Memory told before a run, part by part against what a real step on the CPU brings to life."""

import functools
import operator
import os
import random

import pytest
import torch

from rwkv_nb.config import PRESETS, Settings, replace
from rwkv_nb.fit import SAME_NUMBERS, card, cheapest_change, largest_micro_bsz, next_smaller, smaller, warning
from rwkv_nb.lora.layers import set_dropout_step
from rwkv_nb.loss import head_loss
from rwkv_nb.memory import CONTEXT, LiveBytes, _step, estimate
from rwkv_nb.model import PUBLISHED, RWKV, Shape, init_weights, save_weights
from rwkv_nb.runs import Run
from rwkv_nb.train.loop import Trainer

MID = Shape(5, 256, 2048, 32, 32, 32, 32, 1024)
SMALL = Shape(2, 256, 2048, 32, 32, 32, 32, 1024)
V6 = Shape(3, 128, 512, 16, 0, 0, 0, 448, version="x060", rank_mix=16)
CASES = [  # shape, what is asked
    (MID, {}),
    (MID, {"grad_cp": "block", "quant": "int8", "accumulate_grad_batches": 2, "precision": "bf16"}),
    (MID, {"grad_cp": "selective", "quant": "nf4", "adam_state": "bf16"}),
    (MID, {**PRESETS["small"], "quant": "nf4", "r": 64, "lora_dropout": 0.0}),
    (V6, {"grad_cp": "block", "quant_head": 1}),
    (V6, {"precision": "bf16", "adam_state": "8bit"}),
    (MID, {"chunk_ctx": 32, "grad_cp": "block"}),
]


@pytest.fixture
def trainer_of(tmp_path):
    """A trainer on random weights and documents of exactly ctx_len tokens."""
    def make(shape, **asked):
        save_weights(tmp_path / "base.pth", init_weights(RWKV(shape), seed=0).state_dict())
        (tmp_path / "data.jsonl").write_text("".join(f'{{"text": "{c * 128}"}}\n' for c in "abcdefgh"))
        settings = replace(Settings(), load_model=str(tmp_path / "base.pth"), data_file=str(tmp_path / "data.jsonl"),
                           template="plain", tokenizer="byte", ctx_len=128, micro_bsz=2, epoch_count=9, merge=0,
                           **asked)
        return Trainer(Run(tmp_path / "run"), settings)
    return make


def real_parts(trainer):
    """Bytes of a real second step, part by part."""
    live, s = LiveBytes(), trainer.settings
    trainer.train_step(s.train.live)
    linears = [m for m in trainer.model.modules() if getattr(m, "held", None)]
    trained = sum(p.nbytes for p in trainer.parameters)
    weights = sum(p.nbytes for p in trainer.model.parameters()) - trained + sum(m.held.nbytes for m in linears)
    states = [t for state in trainer.optimizer.adamw.state.values() for k, t in state.items()
              if torch.is_tensor(t) and "qmap" not in k]
    optimizer = sum(t.nbytes for t in states)
    with live:
        for tensor in [*trainer.model.parameters(), *states]:
            live.count(tensor)
        for linear in linears:
            live.count(linear.held.codes)
            live.count(linear.held.scale if linear.held.kind == "int8" else linear.held.scale.absmax)
        before = live.now
        live.peak = before
        trainer.train_step(s.train.live)
        step = live.peak - before
        batch = trainer.batches.next_step()[0]
        set_dropout_step(trainer.model, 0, 9, 0, s.train.live.lora_dropout)
        before = live.now
        hidden, _ = trainer.model.hidden(batch.inputs, op=trainer.op, grad_cp=s.train.grad_cp, keep_state=False)
        forward, live.peak, now = live.now - before, live.now, live.now
        loss, _ = head_loss(hidden, trainer.model.head, batch.targets, batch.mask, 9)
        head, live.peak = live.peak - now, live.now
    return {"weights": weights, "LoRA": trained, "gradients": trained, "optimizer": optimizer, "checkpoints": forward,
            "loss": head}, weights + trained + optimizer + step


@pytest.mark.parametrize("shape, asked", CASES)
def test_parts_are_those_of_a_real_step(trainer_of, shape, asked):
    trainer = trainer_of(shape, **asked)
    told = estimate(shape, trainer.settings, gpu=False)
    parts, total = real_parts(trainer)
    for name, size in parts.items() if not trainer.settings.train.chunk_ctx else ():  # there they are of one chunk
        assert told.largest[name] == pytest.approx(size, rel=0.03, abs=30_000), name
    assert told.allocated == pytest.approx(total, rel=0.04, abs=60_000)


def test_processes_sum_their_gradients_in_one_copy():
    alone = replace(Settings(), ctx_len=16, grad_cp="block", precision="bf16", r=256)
    joined = estimate(MID, replace(alone, devices=2))
    assert joined.at_peak["block peak"] == joined.at_peak["gradients"] == joined.largest["LoRA"]
    assert joined.total > estimate(MID, alone).total


def test_quantised_and_checkpointed_need_less():
    base = replace(Settings(), ctx_len=512, precision="bf16")
    sizes = [estimate(PUBLISHED["0.4B"], replace(base, **change)).total
             for change in ({}, {"grad_cp": "selective"}, {"grad_cp": "block"}, {"grad_cp": "block", "quant": "int8"},
                            {"grad_cp": "block", "quant": "nf4"}, {**PRESETS["small"], "quant": "nf4"})]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == len(sizes)


def test_what_would_fit():
    """Nothing comes later in the list than it must, and nothing is there that is not needed."""
    asked = replace(Settings(), ctx_len=256, micro_bsz=6, precision="bf16")
    now, every = estimate(SMALL, asked).total, list(smaller(asked, gpu=True))
    assert cheapest_change(SMALL, asked, now, gpu=True) == {}
    assert cheapest_change(SMALL, asked, now - 1, gpu=True) == {"emb_cpu": 1}
    assert cheapest_change(SMALL, asked, CONTEXT, gpu=True) is None

    def fits(changes, limit):
        return estimate(SMALL, replace(asked, **functools.reduce(operator.or_, changes, {}))).total <= limit

    for share in (0.9, 0.55, 0.4):
        limit = CONTEXT + share * (now - CONTEXT)
        change = cheapest_change(SMALL, asked, limit, gpu=True)
        assert fits([change], limit)
        last = max(i for i, other in enumerate(every) if other.items() <= change.items())
        assert not fits(every[:last], limit)
        for name in change.keys() - {"accumulate_grad_batches"}:
            less = {k: v for k, v in change.items() if k != name and (name, k) != (
                "micro_bsz", "accumulate_grad_batches")}
            assert not fits([less], limit), (share, name)


def test_what_needs_less_is_in_order_of_what_it_costs():
    def names(gpu=True, **changes):
        asked = replace(Settings(), **{"precision": "bf16", "ctx_len": 1024, "micro_bsz": 8, **changes})
        return [" ".join(f"{k} {v}" for k, v in change.items() if k != "accumulate_grad_batches")
                for change in smaller(asked, gpu=gpu)]

    assert names() == ["emb_cpu 1", "micro_bsz 4", "adam_state bf16", "grad_cp selective", "grad_cp block",
                       "micro_bsz 2", "micro_bsz 1", "chunk_ctx 512", "adam_state 8bit", "quant_head 1", "quant int8",
                       "quant nf4"]
    assert "emb_cpu 1" not in names(gpu=False)
    assert not any("micro_bsz" in name for name in names(dataload="only"))
    assert not any("chunk_ctx" in name for name in names(dataload="pack"))        # documents would not be kept apart
    assert not any("adam_state" in name for name in names(devices=2, strategy="deepspeed_stage_1"))
    if not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False):
        assert names(precision="fp32")[0] == "precision bf16"
    parts = [c for c in smaller(replace(Settings(), micro_bsz=6), gpu=False) if "micro_bsz" in c]
    assert [part["micro_bsz"] * part["accumulate_grad_batches"] for part in parts] == [6, 6, 6]


def test_a_run_that_cannot_fit_is_warned_of():
    asked = replace(Settings(), ctx_len=128, precision="bf16")
    now = estimate(SMALL, asked).total
    assert warning(SMALL, asked, "a card", now, gpu=True) == ""
    assert warning(SMALL, asked, "a card", now - 1, gpu=True).endswith("it should fit with emb_cpu 1")
    assert "smaller base, r or ctx_len" in warning(SMALL, asked, "a card", 10**6, gpu=True)


def test_the_largest_micro_bsz_is_the_largest_and_soon_found():
    asked = replace(Settings(), ctx_len=128)
    limit = estimate(SMALL, replace(asked, micro_bsz=37)).total
    before = _step.cache_info().misses
    assert largest_micro_bsz(SMALL, asked, limit, gpu=True) == 37
    assert _step.cache_info().misses - before <= 2 * 6
    assert largest_micro_bsz(SMALL, replace(asked, micro_bsz=50), limit - 1, gpu=True) == 36
    assert largest_micro_bsz(SMALL, asked, 1e6, gpu=True) == 0
    assert largest_micro_bsz(SMALL, asked, 1e12, gpu=True) == 1024
    only = replace(asked, dataload="only", micro_bsz=50)
    assert largest_micro_bsz(SMALL, only, limit, gpu=True) == 1
    assert estimate(SMALL, only) == estimate(SMALL, replace(asked, dataload="only"))


def test_after_running_out_the_next_smaller_keeps_the_optimizer_and_first_the_numbers():
    asked, seen = replace(Settings(), ctx_len=512, micro_bsz=2), []
    while change := next_smaller(SMALL, asked, gpu=False):
        asked = replace(asked, **change)
        seen.append(change)
    assert asked.train.micro_bsz == 1 and asked.train.live.accumulate_grad_batches == 2
    assert not any("adam_state" in change for change in seen)
    kept = [change.keys() <= set(SAME_NUMBERS) for change in seen]
    assert kept == sorted(kept, reverse=True) and len(set(kept)) == 2


def test_over_loading_only_what_is_loaded_counts():
    asked = replace(Settings(), precision="bf16", r=512, micro_bsz=2)
    assert next_smaller(SMALL, asked, loading=True, resumed=False, gpu=True) == {"adam_state": "bf16"}
    asked = replace(asked, r=4, emb_cpu=1, quant_head=1)
    assert next_smaller(SMALL, asked, loading=True, gpu=True) == {"quant": "int8"}


def test_what_is_free_is_what_counts():
    """Not all that the machine has, and this process's own with it."""
    changes = []
    for _ in range(5):      # other programs take and leave as they like, but not each time
        name, size, gpu = card("cpu")
        ballast = torch.ones(2**26)
        assert not gpu and 0 < size < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") and name
        changes.append(abs(card("cpu")[1] - size))
    assert min(changes) < ballast.nbytes / 2


def test_the_held_out_loss_takes_no_more_than_a_step(trainer_of, tmp_path):
    """Of many short texts each has a state; they are not all there at once."""
    texts = ("".join(random.Random(i).choices("abcdefgh", k=6)) for i in range(60))
    (tmp_path / "heldout.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in texts))
    trainer, most = trainer_of(MID, grad_cp="block", eval_file=str(tmp_path / "heldout.jsonl")), []
    trainer.train_step(trainer.settings.train.live)
    for work in (lambda: trainer.train_step(trainer.settings.train.live), trainer.heldout_loss):
        with LiveBytes() as live:
            work()
        most.append(live.peak)
    assert most[1] < most[0]
