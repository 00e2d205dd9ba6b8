"""A small proof of the WKV ops on this machine, for notebook 00_check."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..errors import KernelError


class SelfTest(NamedTuple):
    op: str       # the op asked for
    error: float  # largest ‖out - ref‖ / ‖ref‖ over y, the state and the seven gradients, float64 as the reference
    ok: bool      # error within the bar of 2e-6
    note: str     # why it could not run, or ""


def self_test(ops=("torch", "chunked", "cpu")) -> list[SelfTest]:
    """Each op in float32 on the CPU against the definition in float64, forward and every gradient. About a second
    (more if the C++ kernel is compiled first). Never raises: an op that cannot run is a row that is not ok."""
    from . import wkv7
    inputs = realistic_inputs(2, 37, 3, 64)
    upstream = torch.randn(2, 37, 3, 64), torch.randn(2, 3, 64, 64)
    reference = outputs_and_grads(wkv7, inputs, upstream, torch.float64, op="torch")
    rows = []
    for op in ops:
        try:
            out = outputs_and_grads(wkv7, inputs, upstream, torch.float32, op=op)
        except KernelError as error:
            rows.append(SelfTest(op, float("nan"), False, str(error)))
            continue
        error = max(relative_error(x, ref) for x, ref in zip(out, reference, strict=True))
        rows.append(SelfTest(op, error, error <= 2e-6, ""))
    return rows


def realistic_inputs(B, T, H, N, *, clamped=True, dtype=torch.float32) -> list[torch.Tensor]:
    """Random r, w, k, v, a, b [B,T,H,N] and state [B,H,N,N] (float32) with RWKV-7's statistics: a = -kk of unit
    norm, b = kk x gate, w = -softplus(-x) - 0.5. clamped=False draws decays from nearly 1 to nearly 0."""
    r, k, v, x, kk, gate = torch.randn(6, B, T, H, N).unbind()
    w = -F.softplus(-x) - 0.5 if clamped else 2.5 * x
    kk = F.normalize(kk, dim=-1)
    return [*(z.to(dtype) for z in (r, w, k, v, -kk, kk * gate.sigmoid())), torch.randn(B, H, N, N)]


def outputs_and_grads(fn, inputs, upstream, dtype, **kwargs) -> list[torch.Tensor]:
    """y, last state and the gradients of all inputs in `dtype` (the state never below float32), for the gradients
    `upstream` at y and the last state. A state of None is passed on."""
    state_dtype = torch.promote_types(dtype, torch.float32)
    *six, state = [None if x is None else x.detach() for x in inputs]
    leaves = [x.to(dtype, copy=True).requires_grad_() for x in six]
    if state is not None:
        state = state.to(state_dtype, copy=True).requires_grad_()
    y, last = fn(*leaves, state, **kwargs)
    wanted = leaves if state is None else [*leaves, state]
    dy, dlast = upstream
    return [y, last, *torch.autograd.grad([y, last], wanted, [dy.to(y.dtype), dlast.to(last.dtype)])]


def relative_error(x, reference) -> float:
    """‖x - reference‖ / ‖reference‖ in float64."""
    return ((x.double() - reference.double()).norm() / reference.double().norm()).item()
