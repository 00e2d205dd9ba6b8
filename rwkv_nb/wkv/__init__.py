"""The WKV operators: one signature each, the way they are computed picked by name."""

from __future__ import annotations

import functools
import warnings

import torch

from ..errors import KernelError
from . import kernels
from .build import compiler_info
from .reference import wkv7_chunked, wkv7_steps
from .selftest import self_test

__all__ = ["OPS", "compiler_info", "pick_op", "self_test", "wkv7"]

OPS = ("auto", "torch", "chunked", "cpu")
_FORMS = {"torch": wkv7_steps, "chunked": wkv7_chunked}


def wkv7(r, w, k, v, a, b, state=None, *, op="auto"):
    """RWKV-7's recurrence over a whole sequence; see reference.py for the formulas.

    r, w, k, v, a, b: [B,T,H,N], T >= 1, float32, bfloat16 or float16 (float64 for the PyTorch forms);
        w is the raw decay input (decay = exp(-exp(w))).
    state: [B,H,N,N] = [value, key], or None for zeros.
    op: "torch" (per step), "chunked" (PyTorch), "cpu" (C++) or "auto", the fastest that works here (`pick_op`).
    Returns y [B,T,H,N] in r's dtype and the last state, float32 (float64 for float64 inputs).
    Differentiable in all seven. Raises KernelError for shapes that do not fit or an op that cannot run here.
    """
    _check_shapes(state, r=r, w=w, k=k, v=v, a=a, b=b)
    op = pick_op(op, r.device, r.dtype)
    if op == "cpu":
        return kernels.wkv7_kernel(r, w, k, v, a, b, state)
    with torch.autocast(r.device.type, enabled=False):  # the state's sums stay float32
        return _FORMS[op](r, w, k, v, a, b, state)


def pick_op(op, device, dtype=torch.float32) -> str:
    """The op that `wkv7` will run: "torch", "chunked" or "cpu". device: a torch.device, its name, or a tensor.

    The first call may compile. "auto" without a compiler warns once and takes "chunked". Raises KernelError for a
    name that does not exist or cannot run here.
    """
    if op not in OPS:
        raise KernelError(f"there is no WKV op {op!r}", fix=f"use one of {', '.join(OPS)}")
    if op in _FORMS:
        return op
    device = torch.device(device.device if isinstance(device, torch.Tensor) else device)
    fits = device.type == "cpu" and dtype in (torch.float32, torch.bfloat16, torch.float16)
    if op == "auto":
        return "cpu" if fits and _cpu_kernel_works() else "chunked"
    if not fits:
        raise KernelError(f'WKV op "cpu" does not take {dtype} on {device.type}', where="op",
                          fix='use op "auto", or float32, bfloat16 or float16 tensors on the CPU')
    kernels.load()
    return op


@torch.compiler.assume_constant_result
def _cpu_kernel_works() -> bool:
    return _load_or_warn()


@functools.cache
def _load_or_warn() -> bool:
    try:
        kernels.load()
    except KernelError as error:
        warnings.warn(f"WKV runs in plain PyTorch, several times slower than its C++ kernel: {error}", stacklevel=2)
        return False
    return True


def _check_shapes(state, **inputs):
    shape = inputs["r"].shape
    for name, x in inputs.items():
        if x.shape != shape or x.dim() != 4 or not shape[1]:
            raise KernelError(f"{name} is {list(x.shape)}, r is {list(shape)}", where=name,
                              fix="r, w, k, v, a, b share one shape [B,T,H,N] with T >= 1")
    B, _, H, N = shape
    if state is not None and state.shape != (B, H, N, N):
        raise KernelError(f"the state is {list(state.shape)}", where="state", fix=f"it must be {[B, H, N, N]}")
