"""flash-linear-attention's chunked kernels under our signature. Theirs: log-decay for the raw one, a state [K,V], and a
scale that is 1/√N unless told. Its WKV-7 is not meant for float32; decays near 0 cost its sums digits. Its kernels were
run in Triton's interpreter, not yet on a GPU."""

import importlib.util

import torch

from ..errors import KernelError
from .reference import at_every_step, log_decay


def load() -> None:
    """Raises KernelError where fla or triton is missing."""
    for package in ("fla", "triton"):
        if importlib.util.find_spec(package) is None:
            raise KernelError(f"{package} is not installed", where="op", fix="pip install 'rwkv_nb[fla]'")


def wkv7(r, w, k, v, a, b, state=None, *, chunk=None):
    """Shapes and results as rwkv_nb.wkv.wkv7. chunk: fla.ops.rwkv7.chunk_rwkv7 or one of its signature. Raises
    KernelError for float32."""
    if chunk is None:
        if r.dtype == torch.float32:
            raise KernelError('op "fla" takes no float32 for WKV-7', where="op", fix='use bf16, or op "triton"')
        from fla.ops.rwkv7 import chunk_rwkv7 as chunk
    y, last = chunk(r, log_decay(w.float()), *(x.to(r.dtype) for x in (k, v, a, b)), scale=1.0, **_states(state))
    return y, last.mT


def wkv6(r, w, k, v, u, state=None, *, chunk=None):
    """As `wkv7`, for WKV-6 and fla.ops.rwkv6.chunk_rwkv6, float32 too."""
    if chunk is None:
        from fla.ops.rwkv6 import chunk_rwkv6 as chunk
    k, v, u = (x.to(r.dtype) for x in (k, v, u))
    y, last = chunk(r, k, v, log_decay(w.float()), u, scale=1.0, **_states(state))
    return y, last.mT


def wkv5(r, w, k, v, u, state=None, *, chunk=None):
    """As `wkv6`, for WKV-5."""
    return wkv6(r, at_every_step(w, r), k, v, u, state, chunk=chunk)


def _states(state):
    return {"initial_state": None if state is None else state.float().mT.contiguous(), "output_final_state": True}
