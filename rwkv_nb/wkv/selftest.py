"""A small proof of the WKV ops on this machine, for notebook 00_check."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..errors import KernelError, out_of_memory


class SelfTest(NamedTuple):
    op: str       # the op asked for
    error: float  # largest ‖out - ref‖ / ‖ref‖ over y, the state and every gradient of WKV-7, -6 and -5
    ok: bool      # error within the bar: 2e-6 on a CPU, 1e-5 on a GPU
    note: str     # why it could not run, or ""


def self_test(ops=("torch", "chunked", "cpu"), device="cpu") -> list[SelfTest]:
    """Each op in float32 against the definition in float64, forward and every gradient. About a second (more if a
    kernel is compiled first). Never raises: an op that cannot run is a row that is not ok."""
    from . import WKV
    errors, notes = {op: [] for op in ops}, {}
    for version, wkv in WKV.items():
        inputs = realistic_inputs(2, 37, 3, 64, version=version, device=device)
        upstream = torch.randn(2, 37, 3, 64, device=device), torch.randn(2, 3, 64, 64, device=device)
        reference = outputs_and_grads(wkv, inputs, upstream, torch.float64, op="torch")
        for op in ops:
            try:
                out = outputs_and_grads(wkv, inputs, upstream, torch.float32, op=op)
            except Exception as error:  # a kernel may build here and still fail to start
                notes[op] = str(error)
            else:
                errors[op] += map(relative_error, out, reference)
    bar = 2e-6 if device == "cpu" else 1e-5
    return [SelfTest(op, float("nan"), False, notes[op]) if op in notes else
            SelfTest(op, max(found), max(found) <= bar, "") for op, found in errors.items()]


def try_out(wkv) -> None:
    """One step of time, forward and backward, on the current GPU. wkv: takes what `wkv7` takes. Raises KernelError
    where it fails: a kernel that was built for another GPU, or for a newer driver, shows it when it is started."""
    inputs = [x.requires_grad_() for x in realistic_inputs(1, 1, 1, 64, device="cuda")]
    try:
        y, _ = wkv(*inputs)
        y.sum().backward()
        torch.cuda.synchronize()
    except Exception as error:  # Triton has errors of its own, and passes on those of the compiler that it calls
        if out_of_memory(error):
            raise
        raise KernelError(f"the kernels were built, but do not run on this GPU: {error}", where="op",
                          fix="00_check shows driver, torch and compiler; another op may work") from None


def realistic_inputs(B, T, H, N, *, version=7, wide=False, device="cpu") -> list[torch.Tensor]:
    """Random inputs of `wkv7`, `wkv6` or `wkv5` and a state, float32, with the statistics of its models: for
    WKV-7 w = -softplus(-x) - 0.5, a = -kk of unit norm, b = kk x gate. wide: w from -10 to 8, decays from 1 to 0."""
    r, k, v, x, kk, gate = torch.randn(6, B, T, H, N, device=device).unbind()
    w = torch.empty_like(x).uniform_(-10, 8) if wide else -F.softplus(-x) - 0.5 if version == 7 else x - 3
    kk = F.normalize(kk, dim=-1)
    rest = [-kk, kk * gate.sigmoid()] if version == 7 else [torch.randn(H, N, device=device)]
    return [r, w[0, 0] if version == 5 else w, k, v, *rest, torch.randn(B, H, N, N, device=device)]


def outputs_and_grads(fn, inputs, upstream, dtype, **kwargs) -> list[torch.Tensor]:
    """y, last state and the gradients of all inputs in `dtype` (the state never below float32), for the gradients
    `upstream` at y and the last state. A state of None is passed on."""
    state_dtype = torch.promote_types(dtype, torch.float32)
    *inputs, state = [None if x is None else x.detach() for x in inputs]
    leaves = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
    if state is not None:
        state = state.to(state_dtype, copy=True).requires_grad_()
    y, last = fn(*leaves, state, **kwargs)
    wanted = leaves if state is None else [*leaves, state]
    dy, dlast = upstream
    return [y, last, *torch.autograd.grad([y, last], wanted, [dy.to(y.dtype), dlast.to(last.dtype)])]


def relative_error(x, reference) -> float:
    """‖x - reference‖ / ‖reference‖ in float64."""
    return ((x.double() - reference.double()).norm() / reference.double().norm()).item()
