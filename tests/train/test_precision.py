"""bf16, fp16 and a quantised base learn what fp32 learns: the quickstart's task, three seeds."""

import statistics
from pathlib import Path

import pytest
import torch
from training import steps, train

from rwkv_nb.config import Settings, replace
from rwkv_nb.data.sources import read_jsonl
from rwkv_nb.evaluate import exact_match
from rwkv_nb.lora.adapter import apply_adapter, load_adapter
from rwkv_nb.model import fingerprint, load_model
from rwkv_nb.runs import Run
from rwkv_nb.tokenizer import get_tokenizer

SAMPLES = Path(__file__).parents[2] / "data_samples"
BASE = SAMPLES / "tiny_base.pth"


def learn(folder, seed, precision="fp32", **asked):
    """(median loss of the first half, share of held-out answers that are right with the base as it was in training)"""
    settings = replace(Settings(), load_model=str(BASE), data_file=str(SAMPLES / "quickstart_train.jsonl"), ctx_len=160,
                       micro_bsz=16, epoch_steps=400, lr_init=2e-3, lr_final=1e-4, merge=0, precision=precision,
                       random_seed=seed, **asked)
    rows = steps(train(folder, settings).rows)
    return statistics.median(row["loss"] for row in rows[:len(rows) // 2]), right(folder, settings.train.quant)


def right(folder, quant="none"):
    """Share of held-out answers that are right, in fp32, with the run's adapter on the base held like that."""
    model = apply_adapter(load_model(BASE, dtype=torch.float32, quant=quant), load_adapter(Run(folder).last_adapter()),
                          fingerprint(BASE))
    heldout = [text for _, text in read_jsonl(SAMPLES / "quickstart_heldout.jsonl")]
    return exact_match(model, get_tokenizer("auto", model.shape.vocab_size), heldout).share


@pytest.mark.soak
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_half_precision_learns_the_same(tmp_path, seed):
    loss, share = learn(tmp_path / "fp32", seed, "fp32")
    print(f"\nseed {seed} fp32: median loss {loss:.4f}, right {share:.1%}")
    for precision in ("bf16", "fp16"):
        half_loss, half_share = learn(tmp_path / precision, seed, precision)
        print(f"seed {seed} {precision}: median loss {half_loss:.4f} ({half_loss / loss - 1:+.2%}), "
              f"right {half_share:.1%}")
        assert half_loss == pytest.approx(loss, rel=0.02)
        assert half_share == pytest.approx(share, abs=0.02)


@pytest.mark.soak
def test_a_quantised_base_learns_the_same(tmp_path):
    """Over three seeds. Merged into the original base, an adapter that learnt beside nf4 loses some of its answers."""
    shares = {"none": [], "int8": [], "nf4": []}
    for seed in (0, 1, 2):
        for quant in shares:
            folder = tmp_path / f"{quant}-{seed}"
            shares[quant].append(learn(folder, seed, quant=quant)[1])
            print(f"\nseed {seed} {quant}: right {shares[quant][-1]:.1%}, on the original base {right(folder):.1%}")
    means = {quant: statistics.mean(found) for quant, found in shares.items()}
    assert min(means["int8"], means["nf4"]) >= means["none"] - 0.02, means


def test_a_quantised_base_begins_to_learn_the_same(tmp_path):
    settings = replace(Settings(), load_model=str(BASE), data_file=str(SAMPLES / "quickstart_train.jsonl"), ctx_len=96,
                       micro_bsz=4, epoch_steps=25, lr_init=2e-3, merge=0)
    last = {}
    for quant in ("none", "int8", "nf4"):
        end = train(tmp_path / quant, replace(settings, quant=quant))
        last[quant] = statistics.mean(row["loss"] for row in steps(end.rows)[-8:])
        assert steps(end.rows)[0]["loss"] > 1.3 * last[quant]
        assert any("merging goes into the original base" in notice for notice in end.notices) == (quant != "none")
    assert last["int8"] == pytest.approx(last["none"], rel=0.01)
    assert last["nf4"] == pytest.approx(last["none"], rel=0.05)
