"""The loaders besides split: what a row holds, resume anywhere, ranks that together see what one alone does."""

import collections

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_batches import batches_of, make_documents, options, same
from token_files import source_of

from rwkv_nb.data.batches import Batches

LOADERS = ("split", "pack", "pad", "only", "get")


def trained(batches):
    """Each trained (input, target), counted."""
    seen = collections.Counter()
    for inputs, targets, mask, _ in batches:
        seen.update(zip(inputs[mask].tolist(), targets[mask].tolist(), strict=True))
    return seen


def epoch(batches):
    return [b for _ in range(batches.steps_per_epoch) for b in batches.next_step()]


@settings(max_examples=100, deadline=None)
@given(**options, dataload=st.sampled_from(["pad", "only"]))
def test_pad_and_only_take_the_beginning_of_each_document(sizes, ctx_len, **kwargs):
    documents = make_documents(sizes)
    if not any(d.mask[1:ctx_len + 1].any() for d in documents):
        return
    batches = Batches(source_of(documents), ctx_len=ctx_len, **kwargs)
    got = epoch(batches)
    assert trained(got) == {(int(d.tokens[t - 1]), int(d.tokens[t])): 1 for d in documents
                            for t in range(1, min(len(d.tokens), ctx_len + 1)) if d.mask[t]}
    lost = sum(max(s - ctx_len - 1, 0) for s in sizes)
    assert any(f"cut: {lost} tokens are lost" in n for n in batches.notices()) == (lost > 0)
    if kwargs["dataload"] == "only":
        assert {len(b.inputs) for b in got} == {1} and max(b.inputs.shape[1] for b in got) <= ctx_len


@settings(max_examples=100, deadline=None)
@given(**options)
def test_packed_rows_hold_whole_pieces_and_no_padding(sizes, **kwargs):
    documents = make_documents(sizes)
    if not (batches := batches_of(documents, dataload="pack", **kwargs)):
        return
    got = epoch(batches)
    assert trained(got) == {(int(d.tokens[t - 1]), int(d.tokens[t])): 1
                            for d in documents for t in range(1, len(d.tokens)) if d.mask[t]}
    assert sum(b.inputs.numel() for b in got) == (batches.items[:, 2] - batches.items[:, 1] - 1).sum()
    for inputs, targets, mask, starts in got:
        assert inputs.shape == targets.shape == mask.shape == starts.shape and len(inputs) == 1 and starts[0, 0]
        assert inputs.shape[1] <= kwargs["ctx_len"] * kwargs["micro_bsz"]
        follows = targets[0, :-1] == inputs[0, 1:]     # inside a piece the next input is the target
        assert follows[~starts[0, 1:]].all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(2, 12), st.integers(0, 5))
def test_get_takes_slices_of_everything_in_a_row(sizes, ctx_len, seed):
    documents, total = make_documents(sizes, share=1), sum(sizes)
    if not any(size > 1 for size in sizes):
        return
    batches = Batches(source_of(documents), ctx_len=ctx_len, micro_bsz=2, accumulate=2, seed=seed, dataload="get")
    one, two = epoch(batches), epoch(batches)
    for inputs, targets, mask, _ in one + two:
        for x, y, m in zip(inputs, targets, mask, strict=True):
            length = min(ctx_len, max(total - 1, 0))
            assert x[:length].tolist() == list(range(int(x[0]), int(x[0]) + length))
            assert m[:length].all() and y[:length].tolist() == (x[:length] + 1).tolist()
    assert sum(len(b.inputs) for b in one) == max((total - 1) // ctx_len, 1)


def test_get_trains_what_stands_behind_ctx_len_too():
    (document,) = make_documents([30], share=1)
    document.mask[:20] = False
    batches = Batches(source_of([document]), ctx_len=4, micro_bsz=2, accumulate=2, seed=0, dataload="get")
    assert any(batch.mask.any() for batch in epoch(batches))


@settings(max_examples=150, deadline=None)
@given(**options, dataload=st.sampled_from(LOADERS), epoch_steps=st.integers(0, 7), cut=st.integers(0, 12))
def test_resume_at_any_step(sizes, cut, **kwargs):
    if not any(d.mask[1:3].any() for d in make_documents(sizes)):
        return
    batches, again = (Batches(source_of(make_documents(sizes)), **kwargs) for _ in range(2))
    for _ in range(cut):
        batches.next_step()
    again.load(batches.state())
    for _ in range(4):
        one, two = batches.next_step(), again.next_step()
        assert same(one, two) and all(torch.equal(a.starts, b.starts) for a, b in zip(one, two, strict=True)
                                      if a.starts is not None)


@settings(max_examples=100, deadline=None)
@given(**options, dataload=st.sampled_from(LOADERS), world_size=st.integers(2, 5))
def test_ranks_together_see_what_one_alone_does(sizes, accumulate, world_size, **kwargs):
    documents = make_documents(sizes)
    if not any(d.mask[1:3].any() for d in documents):
        return
    alone = Batches(source_of(documents), accumulate=accumulate * world_size, **kwargs)
    ranks = [Batches(source_of(documents), accumulate=accumulate, rank=r, world_size=world_size, **kwargs)
             for r in range(world_size)]
    for _ in range(alone.steps_per_epoch + 2):
        shares = [rank.next_step() for rank in ranks]
        assert trained(alone.next_step()) == sum((trained(share) for share in shares), collections.Counter())
        assert len({len(share) for share in shares}) == 1 and len(shares[0]) <= accumulate
    assert {rank.steps_per_epoch for rank in ranks} == {alone.steps_per_epoch}
    assert {str(rank.state()) for rank in ranks} == {str(alone.state())}


@pytest.mark.parametrize("dataload", LOADERS)
def test_a_state_of_another_loader_is_refused(dataload):
    kwargs = dict(ctx_len=8, micro_bsz=2, accumulate=1, seed=0)
    state = Batches(source_of(make_documents([20, 20])), dataload=dataload, **kwargs).state()
    for other in set(LOADERS) - {dataload}:
        with pytest.raises(Exception, match="began with other data"):
            Batches(source_of(make_documents([20, 20])), dataload=other, **kwargs).load(state)


def test_packing_fills_rows():
    sizes = np.random.default_rng(0).integers(5, 60, 500)
    documents = source_of(make_documents(sizes, share=1))
    batches = Batches(documents, ctx_len=128, micro_bsz=4, accumulate=1, seed=0, dataload="pack")
    assert batches.steps_per_epoch * 4 * 128 < 1.35 * (sizes - 1).sum()
