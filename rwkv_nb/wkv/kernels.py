"""The compiled kernels as torch operators: shapes for torch.compile, and gradients. Sources: cuda/."""

from __future__ import annotations

import functools
import threading

import torch

from .build import load_cpu_kernels

_lock = threading.Lock()


def wkv7_kernel(r, w, k, v, a, b, state=None):
    """WKV-7 by the compiled kernel of r's device. Shapes and results as `wkv7`; `load` comes first."""
    inputs = (r, w, k, v, a, b, None if state is None else state.float())
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    y, last, _ = torch.ops.rwkv_nb.wkv7(*inputs, save)
    return y, last


@torch.compiler.assume_constant_result
def load() -> None:
    """Load the kernels, compiling them if need be, and register what autograd and torch.compile must know.

    Safe to call often and from several threads. Raises KernelError where the kernels cannot be had.
    """
    with _lock:
        _load_once()


@functools.cache
def _load_once() -> None:
    load_cpu_kernels()
    torch.library.register_fake("rwkv_nb::wkv7", _fake)
    torch.library.register_fake("rwkv_nb::wkv7_backward", _fake_backward)
    torch.library.register_autograd("rwkv_nb::wkv7", _backward, setup_context=_setup)


def _fake(r, w, k, v, a, b, state, save):
    B, T, H, N = r.shape
    last = r.new_empty(B, H, N, N, dtype=torch.float32)
    return r.new_empty(r.shape), last, last.new_empty(B, T if save else 0, H, N)


def _fake_backward(r, w, k, v, a, b, state, sa, dy, dlast):
    B, T, H, N = r.shape
    return *(x.new_empty(r.shape) for x in (r, w, k, v, a, b)), sa.new_empty(B if state is not None else 0, H, N, N)


def _setup(ctx, inputs, output):
    *tensors, _save = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, dlast, _dsa):
    *inputs, sa = ctx.saved_tensors
    if dy is None and dlast is None:
        return (None,) * 8
    grads = torch.ops.rwkv_nb.wkv7_backward(*inputs, sa, dy, dlast)
    return *grads[:6], grads[6] if inputs[6] is not None else None, None
