"""What is told of a ctx_len is what the batches then do."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_batches import make_documents
from token_files import source_of

from rwkv_nb.data.batches import Batches
from rwkv_nb.data.estimate import fit


@settings(max_examples=100, deadline=None)
@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=12), ctx_len=st.integers(2, 20),
       micro_bsz=st.integers(1, 4), accumulate=st.integers(1, 3), seed=st.integers(0, 5))
def test_the_estimate_is_what_batches_do(sizes, ctx_len, micro_bsz, accumulate, seed):
    if max(sizes) < 2:
        assert fit(np.array(sizes), ctx_len) == (0, 0, 0, 0, 0)
        return
    kwargs = dict(ctx_len=ctx_len, micro_bsz=micro_bsz, accumulate=accumulate, seed=seed)
    told, batches = fit(np.array(sizes), **kwargs), Batches(source_of(make_documents(sizes, share=1)), **kwargs)
    done = [b for _ in range(batches.steps_per_epoch) for b in batches.next_step()]
    trained, computed = sum(int(b.mask.sum()) for b in done), sum(b.mask.numel() for b in done)
    assert told.pieces == len(batches.items) and told.padding == pytest.approx(1 - trained / computed)
    over = [size - ctx_len - 1 for size in sizes if size > ctx_len + 1]
    assert told.cut == pytest.approx(len(over) / sum(size > 1 for size in sizes))
    assert told.lost == pytest.approx(sum(over) / sum(sizes))
    packed = Batches(source_of(make_documents(sizes, share=1)), dataload="pack", **kwargs)
    assert told.rows <= packed.state()["items"] <= told.pieces
