"""Batches: every trained token once an epoch, the same order after a resume, nothing left out in silence."""

import collections

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from token_files import source_of

from rwkv_nb.data.batches import Batches
from rwkv_nb.data.sources import Document
from rwkv_nb.errors import DataError


def make_documents(sizes, seed=0, share=0.7):
    """Documents whose (token before, token) pairs are all different, so that each target can be told apart."""
    rng, out, first = np.random.default_rng(seed), [], 0
    for size in sizes:
        out.append(Document(np.arange(first, first + size, dtype=np.uint16), rng.random(size) < share))
        first += size
    return out


def targets_of(steps):
    """Each trained (input, target) of some steps, counted; checks what holds for every batch."""
    seen = collections.Counter()
    for batches in steps:
        for inputs, targets, mask, _ in batches:
            assert inputs.dtype == targets.dtype == torch.int64 and mask.dtype == torch.bool
            assert inputs.shape == targets.shape == mask.shape
            assert mask.any(dim=1).all()
            seen.update(zip(inputs[mask].tolist(), targets[mask].tolist(), strict=True))
    return seen


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for m, n in zip(a, b, strict=True)
                                    for x, y in zip(m[:3], n[:3], strict=True))


options = dict(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=12), ctx_len=st.integers(2, 12),
    micro_bsz=st.integers(1, 4), accumulate=st.integers(1, 3), seed=st.integers(0, 5))


def batches_of(documents, **kwargs):
    try:
        return Batches(source_of(documents), **kwargs)
    except DataError:  # nothing is trained in these documents
        assert not any(d.mask[1:].any() for d in documents)


@settings(max_examples=150, deadline=None)
@given(**options, epochs=st.integers(1, 3))
def test_every_trained_token_once_an_epoch(sizes, epochs, **kwargs):
    documents = make_documents(sizes)
    if not (batches := batches_of(documents, **kwargs)):
        return
    wanted = {(int(d.tokens[t - 1]), int(d.tokens[t])): 1
              for d in documents for t in range(1, len(d.tokens)) if d.mask[t]}
    orders = []
    for epoch in range(epochs):
        assert batches.progress(0) == (epoch, 0)
        steps = [batches.next_step() for _ in range(batches.steps_per_epoch)]
        assert targets_of(steps) == wanted
        assert all(len(b.inputs) <= kwargs["micro_bsz"] and b.inputs.shape[1] <= kwargs["ctx_len"]
                   for step in steps for b in step)
        assert all(len(step) <= kwargs["accumulate"] for step in steps)
        orders.append(steps)
    assert batches.progress(0) == (epochs, 0)
    n_idle = sum(-(-(len(d.tokens) - 1) // kwargs["ctx_len"]) or 1 for d in documents if len(d.tokens))
    n_idle += sum(not len(d.tokens) for d in documents) - len(batches.items)
    assert any(n.startswith(f"{n_idle} pieces have nothing") for n in batches.notices()) == (n_idle > 0)


@settings(max_examples=150, deadline=None)
@given(**options, epoch_steps=st.integers(0, 7), cut=st.integers(0, 12))
def test_resume_at_any_step_gives_identical_batches(sizes, epoch_steps, cut, **kwargs):
    documents = make_documents(sizes)
    if not (batches := batches_of(documents, epoch_steps=epoch_steps, **kwargs)):
        return
    for _ in range(cut):
        batches.next_step()
    state = batches.state()
    assert all(type(value) is int for value in state.values())
    again = Batches(source_of(documents), epoch_steps=epoch_steps, **kwargs)
    again.load(state)
    for _ in range(6):
        assert same(batches.next_step(), again.next_step())
    assert batches.state() == again.state()


@settings(max_examples=100, deadline=None)
@given(**options, epoch_steps=st.integers(1, 7))
def test_epoch_steps_run_along_one_order(sizes, epoch_steps, **kwargs):
    documents = make_documents(sizes)
    if not (batches := batches_of(documents, epoch_steps=epoch_steps, **kwargs)):
        return
    n, size = len(batches.items), kwargs["micro_bsz"] * kwargs["accumulate"]
    assert batches.steps_per_epoch == epoch_steps
    steps = [batches.next_step() for _ in range(2 * -(-n // size) + 1)]
    assert all(sum(len(b.inputs) for b in step) == size for step in steps)
    counts = targets_of(steps)
    passes = len(steps) * size // n
    trained = sum(int(d.mask[1:].sum()) for d in documents)
    assert passes >= 2 and len(counts) == trained and set(counts.values()) <= {passes, passes + 1}


def first_tokens(batches, steps):
    return [b.inputs[:, 0].tolist() for _ in range(steps) for b in batches.next_step()]


def test_the_order_is_seeded_and_new_each_epoch():
    kwargs = dict(ctx_len=8, micro_bsz=1, accumulate=1)
    make = lambda seed: Batches(source_of(make_documents([5] * 40, share=1)), seed=seed, **kwargs)  # noqa: E731
    a, b, c = make(1), make(1), make(2)
    epoch_1, epoch_2 = first_tokens(a, 40), first_tokens(a, 40)
    assert epoch_1 == first_tokens(b, 40) != first_tokens(c, 40)
    assert epoch_1 != epoch_2 and sorted(epoch_1) == sorted(epoch_2)
    order = np.random.default_rng([1, 0]).permutation(40)
    assert epoch_1 == [[5 * i] for i in order]


def test_long_documents_are_split_with_one_token_of_overlap():
    (document,) = documents = make_documents([11], share=1)
    batches = Batches(source_of(documents), ctx_len=4, micro_bsz=3, accumulate=1, seed=0)
    assert batches.items.tolist() == [[0, 0, 5], [0, 4, 9], [0, 8, 11]]
    (batch,) = batches.next_step()
    assert sorted(batch.inputs.tolist()) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 0]]
    assert sorted(batch.targets.tolist()) == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 0, 0]]
    assert batch.mask.sum() == 10
    assert any("1 of 1 documents are longer than ctx_len 4" in n for n in batches.notices())


def test_padding_is_no_longer_than_the_batch_needs():
    batches = Batches(source_of(make_documents([3, 40] * 16, share=1)), ctx_len=64, micro_bsz=16, accumulate=2, seed=0)
    short, long = sorted(batches.next_step(), key=lambda b: b.inputs.shape[1])
    assert short.inputs.shape == (16, 2) and long.inputs.shape == (16, 39)


@pytest.mark.parametrize("change", ["tokens", "mask", "fewer", "seed", "ctx_len"])
def test_a_state_of_other_data_is_refused(change):
    kwargs = dict(ctx_len=8, micro_bsz=2, accumulate=1, seed=0)
    state = Batches(source_of(make_documents([20, 20, 20], share=1)), **kwargs).state()
    documents = make_documents([20, 20, 20], share=1)
    if change == "tokens":
        documents[1].tokens[3] += 1
    if change == "mask":
        documents[1].mask[3] = False
    if change == "fewer":
        documents.pop()
    if change in kwargs:
        kwargs[change] += 1
    with pytest.raises(DataError, match="began with other data"):
        Batches(source_of(documents), **kwargs).load(state)


def test_what_is_less_than_asked_is_said():
    few = Batches(source_of(make_documents([5, 5], share=1)), ctx_len=64, micro_bsz=2, accumulate=2, seed=0).notices()
    assert any("5 tokens: a ctx_len of 64" in n for n in few)
    assert any("takes 4 pieces, the data has 2" in n for n in few)
    ten = source_of(make_documents([5] * 10, share=1))
    part = Batches(ten, ctx_len=4, micro_bsz=1, accumulate=1, seed=0, epoch_steps=4)
    assert part.notices() == ["an epoch is 4 steps, 0.40 times through the data; the next epoch goes on from there"]
    whole = Batches(ten, ctx_len=4, micro_bsz=1, accumulate=1, seed=0)
    assert whole.notices() == []


def test_nothing_to_train_is_an_error():
    with pytest.raises(DataError, match="nothing in the data is trained"):
        Batches(source_of(make_documents([5, 1, 0], share=0)), ctx_len=4, micro_bsz=1, accumulate=1, seed=0)
