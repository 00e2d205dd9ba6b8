"""WKV-7, -6 and -5 in Triton, for a GPU without a CUDA compiler. One pair of kernels: DELTA adds what WKV-7 has more.

Forward splits a head's value channels over several programs; backward takes a whole head, and computes the states of
a chunk again from the one saved at its start, into scratch memory, so that nothing is divided by a decay.
Tested on a CPU by Triton's interpreter. Not yet run on a GPU.
"""

from __future__ import annotations

import threading

import torch

from ..errors import KernelError
from .build import remembered
from .reference import at_every_step
from .selftest import try_out

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

SAVE = 16  # steps between two saved states
ROWS = 16  # value channels of one forward program
WARPS = 8  # of a backward program: with Triton's usual four, registers would spill

_lock = threading.Lock()


@torch.compiler.assume_constant_result
def load() -> None:
    """Registers the operators that torch.compile can hold, once, and tries them where there is a GPU. Raises
    KernelError where triton is missing or does not work."""
    with _lock:
        _load_once()


@remembered
def _load_once() -> None:
    if triton is None:
        raise KernelError("triton is not installed", where="op", fix="pip install 'rwkv_nb[triton]'")
    _register()
    if torch.cuda.is_available():
        try_out(wkv7)


def takes(head_size: int) -> bool:
    """Whether heads of so many channels can be computed: a power of 2 from 16 on."""
    return head_size >= 16 and head_size & (head_size - 1) == 0


def wkv7(r, w, k, v, a, b, state=None):
    """Shapes and results as rwkv_nb.wkv.wkv7; N is one that it `takes`."""
    return _run(r, w, k, v, a, b, state)


def wkv6(r, w, k, v, u, state=None):
    """As `wkv7`, for WKV-6."""
    return _run(r, w, k, v, u, None, state)


def wkv5(r, w, k, v, u, state=None):
    """As `wkv7`, for WKV-5."""
    return wkv6(r, at_every_step(w, r), k, v, u, state)


def _run(r, w, k, v, a, b, state):
    B, _, H, N = r.shape
    if state is None:
        state = r.new_zeros(B, H, N, N, dtype=torch.float32)
    inputs = r, w, k, v, a, b, state
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    y, last, _ = torch.ops.rwkv_nb.wkv_triton(*inputs, keep)
    return y, last


def _register() -> None:
    """r, w, k, v [B,T,H,N] and, for WKV-7, a and b like them; for WKV-6 a is u [H,N] and b None, its gradient empty."""
    for name, work, fake, more, results in (("", _forward_pass, _outputs, "Tensor state, bool keep", 3),
                                            ("_backward", _backward_pass, _gradients,
                                             "Tensor saved, Tensor dy, Tensor dlast", 7)):
        schema = (f"(Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor? b, {more}) -> "
                  f"({', '.join(['Tensor'] * results)})")
        torch.library.custom_op(f"rwkv_nb::wkv_triton{name}", work, mutates_args=(), schema=schema).register_fake(fake)
    torch.library.register_autograd("rwkv_nb::wkv_triton", _backward_of, setup_context=_keep_for_backward)


def _keep_for_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:6], output[2])
    ctx.set_materialize_grads(False)


def _backward_of(ctx, dy, dlast, _):
    r, (B, _, H, N) = ctx.saved_tensors[0], ctx.saved_tensors[0].shape
    if dy is None and dlast is None:
        return (None,) * 8
    dy = torch.zeros_like(r) if dy is None else dy
    dlast = r.new_zeros(B, H, N, N, dtype=torch.float32) if dlast is None else dlast
    *grads, db, dstate = torch.ops.rwkv_nb.wkv_triton_backward(*ctx.saved_tensors, dy, dlast)
    return *grads, db if ctx.saved_tensors[5] is not None else None, dstate, None


def _outputs(r, w, k, v, a, b, state, keep):
    (B, T, H, N), fp32 = r.shape, {"dtype": torch.float32}
    saved = r.new_empty(B * H * -(-T // SAVE) if keep else 1, N, N, **fp32)
    return r.new_empty(r.shape), r.new_empty(state.shape, **fp32), saved


def _forward_pass(r, w, k, v, a, b, state, keep):
    (_, T, H, N), delta = r.shape, b is not None
    inputs = [x.contiguous() for x in (r, w, k, v, a, b if delta else a)]
    y, last, saved = _outputs(r, w, k, v, a, b, state, keep)
    with torch.cuda.device_of(r):
        _forward[state.shape[0] * H, N // ROWS](*inputs, state.float().contiguous(), y, last, saved, T, H, N, ROWS,
                                                SAVE, delta, keep)
    return y, last, saved


def _gradients(r, w, k, v, a, b, saved, dy, dlast):
    return *(x.new_empty(x.shape) for x in (r, w, k, v, a)), (r if b is None else b).new_empty(
        0 if b is None else b.shape), dlast.new_empty(dlast.shape)


def _backward_pass(r, w, k, v, a, b, saved, dy, dlast):
    (B, T, H, N), delta = r.shape, b is not None
    inputs = [x.contiguous() for x in (r, w, k, v, a, b if delta else a)]
    *grads, db, dstate = _gradients(r, w, k, v, a, b, saved, dy, dlast)
    du, scratch = saved.new_empty(B, H, N), saved.new_empty(B * H, SAVE, N, N)
    with torch.cuda.device_of(r):
        _backward[B * H,](*inputs, saved, dy.contiguous(), dlast.contiguous(), *grads[:4],
                          *((grads[4], db) if delta else (du, du)), dstate, scratch, T, H, N, SAVE, delta,
                          num_warps=WARPS)
    return *grads[:4], grads[4] if delta else du.sum(0).to(a.dtype), db, dstate


def _jit(kernel):
    return triton.jit(kernel) if triton else kernel


@_jit
def _change(rate):
    """exp(-rate) - 1, what a step adds to a state: near 1 a decay's own rounding would add up over the steps."""
    small = -rate * (1 - rate / 2 * (1 - rate / 3 * (1 - rate / 4 * (1 - rate / 5 * (1 - rate / 6)))))
    return tl.where(rate < 0.25, small, tl.exp(-rate) - 1)


@_jit
def _forward(r, w, k, v, a, b, state, y, last, saved, T, H, N: tl.constexpr, ROWS: tl.constexpr, SAVE: tl.constexpr,
             DELTA: tl.constexpr, KEEP: tl.constexpr):
    head = tl.program_id(0).to(tl.int64)
    key = tl.arange(0, N)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    cell = row[:, None] * N + key[None, :]
    S = tl.load(state + head * N * N + cell)
    if not DELTA:
        u = tl.load(a + head % H * N + key).to(tl.float32)
    at = (head // H * T * H + head % H) * N
    for t in range(T):
        if KEEP:
            if t % SAVE == 0:
                tl.store(saved + (head * tl.cdiv(T, SAVE) + t // SAVE) * N * N + cell, S)
        r_t = tl.load(r + at + key).to(tl.float32)
        k_t = tl.load(k + at + key).to(tl.float32)
        v_t = tl.load(v + at + row).to(tl.float32)
        change = _change(tl.exp(tl.minimum(tl.load(w + at + key).to(tl.float32), 4.7)))  # above, the decay is 0
        if DELTA:
            sa = tl.sum(S * tl.load(a + at + key).to(tl.float32)[None, :], 1)
            S += S * change[None, :] + sa[:, None] * tl.load(b + at + key).to(tl.float32)[None, :]
            S += v_t[:, None] * k_t[None, :]
            y_t = tl.sum(S * r_t[None, :], 1)
        else:
            y_t = tl.sum(S * r_t[None, :], 1) + v_t * tl.sum(r_t * u * k_t, 0)
            S += S * change[None, :] + v_t[:, None] * k_t[None, :]
        tl.store(y + at + row, y_t.to(y.dtype.element_ty))
        at += H * N
    tl.store(last + head * N * N + cell, S)


@_jit
def _backward(r, w, k, v, a, b, saved, dy, dlast, dr, dw, dk, dv, da, db, dstate, scratch, T, H, N: tl.constexpr,
              SAVE: tl.constexpr, DELTA: tl.constexpr):
    head = tl.program_id(0).to(tl.int64)
    key = tl.arange(0, N)
    cell = key[:, None] * N + key[None, :]
    G = tl.load(dlast + head * N * N + cell)
    scratch += head * SAVE * N * N
    stride = head * 0 + H * N  # in 64 bits, as head is
    start = (head // H * T * H + head % H) * N
    if not DELTA:
        u = tl.load(a + head % H * N + key).to(tl.float32)
        du = tl.zeros([N], tl.float32)
    chunks = tl.cdiv(T, SAVE)
    for i in range(chunks):
        chunk = chunks - 1 - i
        steps = tl.minimum(SAVE, T - chunk * SAVE)
        S = tl.load(saved + (head * chunks + chunk) * N * N + cell)
        for s in range(steps):
            at = start + (chunk * SAVE + s) * stride
            tl.store(scratch + s * N * N + cell, S)
            change = _change(tl.exp(tl.minimum(tl.load(w + at + key).to(tl.float32), 4.7)))
            k_t = tl.load(k + at + key).to(tl.float32)
            v_t = tl.load(v + at + key).to(tl.float32)
            if DELTA:
                sa = tl.sum(S * tl.load(a + at + key).to(tl.float32)[None, :], 1)
                S += S * change[None, :] + sa[:, None] * tl.load(b + at + key).to(tl.float32)[None, :]
                S += v_t[:, None] * k_t[None, :]
            else:
                S += S * change[None, :] + v_t[:, None] * k_t[None, :]
        tl.debug_barrier()
        for j in range(steps):
            s = steps - 1 - j
            at = start + (chunk * SAVE + s) * stride
            S = tl.load(scratch + s * N * N + cell)  # before this step
            rate = tl.exp(tl.minimum(tl.load(w + at + key).to(tl.float32), 4.7))
            change = _change(rate)
            r_t = tl.load(r + at + key).to(tl.float32)
            k_t = tl.load(k + at + key).to(tl.float32)
            v_t = tl.load(v + at + key).to(tl.float32)
            dy_t = tl.load(dy + at + key).to(tl.float32)
            if DELTA:
                a_t = tl.load(a + at + key).to(tl.float32)
                b_t = tl.load(b + at + key).to(tl.float32)
                sa = tl.sum(S * a_t[None, :], 1)
                after = S + S * change[None, :] + sa[:, None] * b_t[None, :] + v_t[:, None] * k_t[None, :]
                G += dy_t[:, None] * r_t[None, :]
                gb = tl.sum(G * b_t[None, :], 1)
                dr_t = tl.sum(after * dy_t[:, None], 0)
                dk_t = tl.sum(G * v_t[:, None], 0)
                dv_t = tl.sum(G * k_t[None, :], 1)
                tl.store(da + at + key, tl.sum(S * gb[:, None], 0).to(da.dtype.element_ty))
                tl.store(db + at + key, tl.sum(G * sa[:, None], 0).to(db.dtype.element_ty))
            else:
                own = tl.sum(v_t * dy_t, 0)
                dr_t = tl.sum(S * dy_t[:, None], 0) + u * k_t * own
                dk_t = tl.sum(G * v_t[:, None], 0) + u * r_t * own
                dv_t = tl.sum(G * k_t[None, :], 1) + dy_t * tl.sum(r_t * u * k_t, 0)
                du += r_t * k_t * own
            dw_t = -tl.sum(G * S, 0) * tl.exp(-rate) * rate
            if DELTA:
                G += G * change[None, :] + gb[:, None] * a_t[None, :]
            else:
                G += G * change[None, :] + dy_t[:, None] * r_t[None, :]
            tl.store(dr + at + key, dr_t.to(dr.dtype.element_ty))
            tl.store(dw + at + key, dw_t.to(dw.dtype.element_ty))
            tl.store(dk + at + key, dk_t.to(dk.dtype.element_ty))
            tl.store(dv + at + key, dv_t.to(dv.dtype.element_ty))
        tl.debug_barrier()
    tl.store(dstate + head * N * N + cell, G)
    if not DELTA:
        tl.store(da + head * N + key, du)
