"""Memory told before a run, part by part against what a real step on the CPU brings to life."""

import pytest
import torch

from rwkv_nb.config import PRESETS, Settings, replace
from rwkv_nb.lora.layers import set_dropout_step
from rwkv_nb.loss import head_loss
from rwkv_nb.memory import LiveBytes, cheapest_change, estimate, largest_micro_bsz, next_smaller, smaller, warning
from rwkv_nb.model import PUBLISHED, RWKV, Shape, init_weights, save_weights
from rwkv_nb.runs import Run
from rwkv_nb.train.loop import Trainer

MID = Shape(5, 256, 2048, 32, 32, 32, 32, 1024)
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
    shape, asked = Shape(4, 512, 4096, 32, 32, 32, 32, 2048), replace(Settings(), ctx_len=256, micro_bsz=6)
    now = estimate(shape, asked).total
    assert cheapest_change(shape, asked, now, gpu=True) == {}
    assert cheapest_change(shape, asked, now - 1, gpu=True) == {"emb_cpu": 1}
    for limit in (0.95 * now, 0.8 * now, 0.7 * now):
        change = cheapest_change(shape, asked, limit, gpu=True)
        assert change and estimate(shape, replace(asked, **change)).total <= limit
        earlier = list(smaller(asked, gpu=True))
        for other in earlier[:earlier.index(change)] if change in earlier else earlier:
            assert estimate(shape, replace(asked, **other)).total > limit
    assert cheapest_change(shape, asked, 1e8, gpu=True) is None
    halves = [c for c in smaller(asked, gpu=False) if "micro_bsz" in c]
    assert [c["micro_bsz"] * c["accumulate_grad_batches"] for c in halves] == [6, 6, 6]
    assert {"emb_cpu": 1} not in smaller(asked, gpu=False)


def test_a_run_that_cannot_fit_is_warned_of():
    asked = replace(Settings(), ctx_len=128, precision="bf16")
    now = estimate(MID, asked).total
    assert warning(MID, asked, "a card", now, gpu=True) == ""
    assert warning(MID, asked, "a card", now - 1, gpu=True).endswith("it should fit with emb_cpu 1")
    assert "smaller base" in warning(MID, asked, "a card", 10**6, gpu=True)


def test_the_largest_micro_bsz_is_the_largest():
    shape, asked = MID, replace(Settings(), ctx_len=128)
    limit = estimate(shape, replace(asked, micro_bsz=37)).total
    assert largest_micro_bsz(shape, asked, limit, gpu=True) == 37
    assert largest_micro_bsz(shape, asked, limit - 1, gpu=True) == 36
    assert largest_micro_bsz(shape, asked, 1e6, gpu=True) == 0


def test_after_running_out_the_next_smaller_keeps_the_optimizer():
    asked, seen = replace(Settings(), ctx_len=512, micro_bsz=2, precision="bf16"), []
    while change := next_smaller(MID, asked, gpu=False):
        asked = replace(asked, **change)
        seen.append(change)
    assert asked.train.micro_bsz == 1 and asked.train.live.accumulate_grad_batches == 2
    assert not any("adam_state" in change for change in seen)
