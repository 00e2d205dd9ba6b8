"""A long text in chunks: the same loss and gradients as in one piece, and memory that does not grow with it."""

import weakref

import pytest
import torch

from rwkv_nb.config import check_together, replace
from rwkv_nb.data.batches import Batch
from rwkv_nb.errors import SettingsError
from rwkv_nb.lora.layers import adapter_parameters, attach, set_dropout_step
from rwkv_nb.loss import head_loss
from rwkv_nb.model import load_model
from rwkv_nb.runs import Run
from rwkv_nb.train.infctx import backward_by_chunks
from rwkv_nb.train.loop import Trainer


@pytest.fixture
def model(base, settings):
    """A model with an adapter and a base in which every layer takes part."""
    torch.manual_seed(3)
    model = load_model(base).train()
    for name, p in model.named_parameters():
        if name.endswith(("output.weight", "ffn.value.weight")):
            p.data += p.shape[-1] ** -0.5 * torch.randn_like(p)
    attach(model, settings.lora, seed=0)
    for p in adapter_parameters(model):
        p.data += 0.05 * torch.randn_like(p)
    return model


def batch_of(B, T):
    tokens = torch.randint(1, 257, (B, T + 1))
    return Batch(tokens[:, :-1], tokens[:, 1:], torch.rand(B, T) < 0.7)


def gradients(model, run):
    model.zero_grad()
    ce = run()
    return float(ce), [p.grad.clone() for p in adapter_parameters(model)]


def in_one_piece(model, batch, n):
    def run():
        loss, ce = head_loss(model.hidden(batch.inputs)[0], model.head, batch.targets, batch.mask, n)
        loss.backward()
        return ce
    return gradients(model, run)


def by_chunks(model, batch, n, chunk, **options):
    options = {"truncated": False, "scale": 1.0, "before_chunk": lambda i: None} | options
    return gradients(model, lambda: backward_by_chunks(model, batch, n, chunk, **options))


@pytest.mark.parametrize("T, chunk", [(100, 16), (97, 32), (64, 64), (33, 1)])
def test_equals_one_piece(model, T, chunk):
    batch = batch_of(2, T)
    n = int(batch.mask.sum())
    ce, expected = in_one_piece(model, batch, n)
    got_ce, got = by_chunks(model, batch, n, chunk)
    assert got_ce == pytest.approx(ce, rel=1e-5)
    for a, b in zip(got, expected, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_truncated_is_another_gradient_of_the_same_loss(model):
    batch = batch_of(2, 96)
    n = int(batch.mask.sum())
    ce, expected = in_one_piece(model, batch, n)
    got_ce, got = by_chunks(model, batch, n, 16, truncated=True)
    assert got_ce == pytest.approx(ce, rel=1e-5)
    assert max(float((a - b).norm() / b.norm()) for a, b in zip(got, expected, strict=True)) > 0.01


def test_a_chunk_computed_twice_draws_the_same_dropout(model):
    """The gradient is the derivative of the loss with its masks: a step along it changes the loss by its square."""
    batch, seeds = batch_of(2, 48), []
    n = int(batch.mask.sum())

    def draw(i):
        seeds.append(i)
        set_dropout_step(model, 1, 2, f"0.{i}", 0.2)

    ce, grads = by_chunks(model, batch, n, 16, before_chunk=draw)
    assert seeds == [0, 1, 2, 1, 0]
    step = 1e-3 / float(sum(g.square().sum() for g in grads)) ** 0.5
    for p, g in zip(adapter_parameters(model), grads, strict=True):
        p.data -= step * g
    after, _ = by_chunks(model, batch, n, 16, before_chunk=draw)
    assert (ce - after) / n == pytest.approx(step * float(sum(g.square().sum() for g in grads)), rel=0.05)


def most_saved(model, batch, chunk):
    """Most bytes that autograd held at one moment."""
    alive, most = weakref.WeakSet(), [0]

    class Held:
        def __init__(self, t):
            self.t = t

    def pack(t):
        held = Held(t)
        alive.add(held)
        most[0] = max(most[0], sum(h.t.nbytes for h in alive))
        return held

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.t):
        by_chunks(model, batch, 100, chunk)
    return most[0]


def test_memory_is_that_of_one_chunk(model):
    short, long = (most_saved(model, batch_of(1, T), 32) for T in (64, 512))
    assert 0 < long < 1.01 * short


def test_a_run_trains_by_chunks(tmp_path, settings):
    def rows(**changes):
        made = Trainer(Run(tmp_path), replace(settings, lora_dropout=0.0, **changes))
        return [made.train_step(made.settings.train.live) for _ in range(3)]

    for a, b in zip(rows(), rows(chunk_ctx=7), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    with pytest.raises(SettingsError, match="chunk_ctx"):
        check_together(replace(settings, truncated_bptt=1))
