"""The WKV operators: one signature each, the way they are computed picked by name."""

import functools
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch

from ..errors import KernelError
from . import fla_op, kernels, reference, triton_op
from .build import compiler_info
from .packed import borders, by_text
from .selftest import self_test

__all__ = ["OPS", "WKV", "compiler_info", "left_out", "pick_op", "self_test", "wkv5", "wkv6", "wkv7"]


class _Op(NamedTuple):
    """One way to compute: a function a version, and where it works."""

    forms: dict[int, Callable]
    device: str = ""             # type of device, "" for any
    load: Callable | None = None  # makes it ready, or raises KernelError; None: plain PyTorch, any dtype
    auto: bool = True            # "auto" may take it
    packed: bool = False         # for the state, it also takes where texts begin (packed.borders)
    heads: Callable[[int], bool] = lambda N: True  # the head sizes that it takes


def _in(module) -> dict[int, Callable]:
    return {7: module.wkv7, 6: module.wkv6, 5: module.wkv5}


_COMPILED = {v: functools.partial(kernels.run, f"wkv{v}") for v in (7, 6, 5)}
_TABLE = {  # the fastest first: "auto" takes the first that works
    "cuda": _Op(_COMPILED, "cuda", kernels.load_cuda, packed=True, heads=lambda N: N == kernels.CUDA_HEAD),
    "triton": _Op(_in(triton_op), "cuda", triton_op.load, heads=triton_op.takes),
    "fla": _Op(_in(fla_op), "cuda", fla_op.load, auto=False),
    "cpu": _Op(_COMPILED, "cpu", kernels.load),
    "chunked": _Op({7: reference.wkv7_chunked, 6: reference.wkv6_chunked, 5: reference.wkv5_chunked}),
    "torch": _Op({7: reference.wkv7_steps, 6: reference.wkv6_steps, 5: reference.wkv5_steps}),
}
OPS = ("auto", *_TABLE)
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def wkv7(r, w, k, v, a, b, state=None, *, op="auto"):
    """RWKV-7's recurrence over a whole sequence; see reference.py for the formulas.

    r, w, k, v, a, b: [B,T,H,N], T >= 1, float32, bfloat16 or float16 (float64 for the PyTorch forms);
        w is the raw decay input (decay = exp(-exp(w))).
    state: [B,H,N,N] = [value, key], or None for zeros; or, for texts one behind the other, bool [B,T]: where a text
        begins and the state is zeros again (it comes back as it is).
    op: "torch" (per step), "chunked" (PyTorch), "cpu" (C++), "cuda" (heads of 64 channels), "triton", "fla", or
        "auto", the fastest that works here (`pick_op`).
    Returns y [B,T,H,N] in r's dtype and the last state, float32 (float64 for float64 inputs).
    Differentiable in all seven. Raises KernelError for shapes that do not fit or an op that cannot run here.
    """
    return _run(7, op, state, r=r, w=w, k=k, v=v, a=a, b=b)


def wkv6(r, w, k, v, u, state=None, *, op="auto"):
    """RWKV-6's recurrence. As `wkv7`, with u [H,N], the weight of a step's own k vᵀ ("time_faaaa"), and w without
    a bound: decays down to 0 are right. Differentiable in all six."""
    return _run(6, op, state, r=r, w=w, k=k, v=v, u=u)


def wkv5(r, w, k, v, u, state=None, *, op="auto"):
    """RWKV-5's recurrence. As `wkv6`, with one w [H,N] for all steps ("time_decay")."""
    return _run(5, op, state, r=r, w=w, k=k, v=v, u=u)


WKV = {7: wkv7, 6: wkv6, 5: wkv5}


def pick_op(op, device, dtype=torch.float32, version=7, head_size=64) -> str:
    """The op that `wkv7` (`wkv6`, `wkv5`: version) will run. device: a torch.device, its name, or a tensor.

    The first call may compile, and tries on a GPU whether it works. "auto" warns once of each faster op that cannot
    run: on a GPU it takes "cuda", else "triton", on a CPU "cpu", else "chunked". Raises KernelError for a name that
    does not exist or cannot run here.
    """
    if op not in OPS:
        raise KernelError(f"there is no WKV op {op!r}", fix=f"use one of {', '.join(OPS)}")
    device = torch.device(device.device if isinstance(device, torch.Tensor) else device)
    if op == "auto":
        return next(name for name in _TABLE
                    if _TABLE[name].auto and _fits(name, device, dtype) and _TABLE[name].heads(head_size)
                    and _works(name))
    if not _fits(op, device, dtype):
        raise KernelError(f'WKV-{version} op "{op}" does not take {dtype} on {device.type}', where="op",
                          fix=f'use op "auto", or float32, bfloat16 or float16 on {_TABLE[op].device}')
    if not _TABLE[op].heads(head_size):
        raise KernelError(f'op "{op}" does not take heads of {head_size} channels', where="op", fix='use op "auto"')
    if _TABLE[op].load:
        _TABLE[op].load()
    return op


def left_out(op, device, dtype) -> list[str]:
    """Why `pick_op`, which took `op` for "auto", passed over the faster ones, a sentence each."""
    faster = list(_TABLE)[:list(_TABLE).index(op)]
    return [why for name in faster if _TABLE[name].auto and _fits(name, torch.device(device), dtype)
            and (why := _why_not(name))]


def _run(version, op, state, **inputs):
    _check_shapes(version, state, inputs)
    r = inputs["r"]
    op = _TABLE[pick_op(op, r.device, r.dtype, version, r.shape[-1])]
    form = op.forms[version]
    mixed = not r.is_meta and torch.is_autocast_enabled(r.device.type)
    with torch.autocast(r.device.type, enabled=False) if mixed else nullcontext():  # the state's sums stay float32
        if state is not None and state.dtype == torch.bool:
            if op.packed:
                return form(*inputs.values(), borders(state).to(r.device, non_blocking=True))[0], state
            return by_text(form, state, inputs), state
        return form(*inputs.values(), state)


def _fits(name, device, dtype) -> bool:
    op = _TABLE[name]
    kind = device.type.replace("meta", "cpu")   # sizes without numbers: the CPU's operators tell theirs
    return op.device in ("", kind) and (not op.load or dtype in _KERNEL_DTYPES)


@torch.compiler.assume_constant_result
def _works(name) -> bool:
    return not _why_not(name)


@functools.cache
def _why_not(name) -> str:
    """A sentence of why an op cannot run here, warned of once; "" where it can."""
    try:
        if _TABLE[name].load:
            _TABLE[name].load()
    except KernelError as error:
        text = f'WKV runs without op "{name}", perhaps several times slower: {error}'
        warnings.warn(text, stacklevel=2)
        return text
    return ""


def _check_shapes(version, state, inputs):
    B, T, H, N = shape = inputs["r"].shape if inputs["r"].dim() == 4 else (0, 0, 0, 0)
    for name, x in inputs.items():
        static = name == "u" or version == 5 and name == "w"
        if x.shape != (shape[2:] if static else shape) or not T:
            raise KernelError(f"{name} is {list(x.shape)}, r is {list(inputs['r'].shape)}", where=name,
                              fix=f"{', '.join(inputs)} are [B,T,H,N] with T >= 1; u, and the w of WKV-5, are [H,N]")
    if state is not None and state.shape != ((B, T) if state.dtype == torch.bool else (B, H, N, N)):
        raise KernelError(f"the state is {list(state.shape)}", where="state", fix=f"it must be {[B, H, N, N]}")
