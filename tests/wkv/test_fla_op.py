"""The mapping to flash-linear-attention: its naive recurrences, called as its kernels are, against our definition."""

import functools
import inspect

import fla_naive
import pytest
import torch

from rwkv_nb.errors import KernelError
from rwkv_nb.wkv import WKV, fla_op
from rwkv_nb.wkv.selftest import outputs_and_grads, realistic_inputs, relative_error

pytest.importorskip("fla", reason="flash-linear-attention is not installed")
WAYS = {7: fla_op.wkv7, 6: fla_op.wkv6, 5: fla_op.wkv5}


@pytest.mark.parametrize("version", WKV)
@pytest.mark.parametrize("with_state", [True, False])
def test_the_mapping_of_arguments_and_states(version, with_state):
    chunk = fla_naive.as_kernels()[max(version, 6)]
    *inputs, state = realistic_inputs(2, 19, 3, 16, version=version)
    inputs.append(state if with_state else None)
    upstream = torch.randn(2, 19, 3, 16), torch.randn(2, 3, 16, 16)
    expected = outputs_and_grads(WKV[version], inputs, upstream, torch.float64, op="torch")
    out = outputs_and_grads(functools.partial(WAYS[version], chunk=chunk), inputs, upstream, torch.float32)
    assert max(map(relative_error, out, expected)) < 2e-6


@pytest.mark.parametrize("version", (7, 6))
def test_the_kernels_still_take_these_arguments(version):
    """The naive forms above stand in for kernels that want a GPU; those must be called the same way."""
    pytest.importorskip("triton", reason="fla's kernels need triton")
    kernel = getattr(pytest.importorskip(f"fla.ops.rwkv{version}"), f"chunk_rwkv{version}")
    ours = inspect.signature(fla_naive.as_kernels()[version]).parameters
    theirs = inspect.signature(kernel).parameters
    assert list(ours)[:6] == list(theirs)[:6] if version == 7 else list(ours)[:5] == list(theirs)[:5]
    assert set(ours) <= set(theirs)


def test_what_it_does_not_take_is_said(monkeypatch):
    with pytest.raises(KernelError, match="takes no float32 for WKV-7"):
        fla_op.wkv7(*torch.randn(6, 1, 2, 1, 16))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(KernelError, match=r"fla is not installed\n→ pip install 'rwkv_nb\[fla\]'"):
        fla_op.load()
