"""RWKV's pointwise steps around the products and WKV.

Some have gradients written by hand: plain autograd would pass over memory twice as often. On a GPU whose kernels are
loaded (wkv.kernels) each is one kernel, forward and backward (cuda/pointwise_gpu.cu), for everything that is frozen.
What was changed in place leaves a Function as a view: torch.compile up to 2.11 gives it no gradient else.
Axes: B batch, T time, C channels, H heads, N head size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..wkv.kernels import CUDA_HEAD, on_gpu


def token_shift(x: Tensor, last: Tensor, *mixes: Tensor) -> tuple[Tensor, ...]:
    """x + (x' - x) ⊙ mix for each mix, where x' is each token's predecessor.

    x [B,T,C], mixes [1,1,C] or [B,T,C] → as many tensors [B,T,C].
    last: [B,C], before the first token; or bool [B,T], for texts one behind the other: where one begins, x' is zero.
    """
    learnt = torch.is_grad_enabled() and mixes[0].numel() == x.shape[-1] and any(mix.requires_grad for mix in mixes)
    if on_gpu(x, *mixes) and not learnt:
        return _TokenShiftOnGpu.apply(x, last, *mixes)
    if torch.is_grad_enabled():
        return _TokenShift.apply(x, last, *mixes)
    step_back = _step_back(x, last)     # without a graph: a token at a time, the graph's cost would show
    return tuple(torch.addcmul(x, step_back, mix) for mix in mixes)


def _step_back(x: Tensor, last: Tensor) -> Tensor:
    """x' - x"""
    if last.dtype != torch.bool:
        before = last[:, None]
        return before - x if x.shape[1] == 1 else torch.cat([before, x[:, :-1]], dim=1).sub_(x)
    return torch.cat([x[:, :1], x[:, :-1]], dim=1).masked_fill_(last[..., None], 0).sub_(x)


class _TokenShift(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, last, *mixes):
        starts, step_back = last if last.dtype == torch.bool else None, _step_back(x, last)
        ctx.save_for_backward(step_back if any(ctx.needs_input_grad[2:]) else None, starts, *mixes)
        return tuple(torch.addcmul(x, step_back, mix) for mix in mixes)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        step_back, starts, *mixes = ctx.saved_tensors
        d_mixes = ((g * step_back).sum_to_size(mix.shape) if need else None
                   for g, mix, need in zip(grads, mixes, ctx.needs_input_grad[2:], strict=True))
        before = grads[0] * mixes[0]       # what goes to each token's predecessor ...
        for g, mix in zip(grads[1:], mixes[1:], strict=True):
            before.addcmul_(g, mix)
        dx = grads[0] - before             # ... and to the token itself
        for g in grads[1:]:
            dx.add_(g)
        if starts is not None:
            before.masked_fill_(starts[..., None], 0)
        dx[:, :-1].add_(before[:, 1:])
        return dx, before[:, 0] if starts is None else None, *d_mixes


class _TokenShiftOnGpu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, last, *mixes):
        ctx.each = mixes[0].numel() > x.shape[-1]
        ctx.save_for_backward(x if ctx.each else None, last, *mixes)
        return tuple(torch.ops.rwkv_nb.shift(x, last, mixes))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        x, last, *mixes = ctx.saved_tensors
        x = x if ctx.each else grads[0]     # only its shape counts
        dx, *more = torch.ops.rwkv_nb.shift_backward(x, last, mixes, grads)
        d_last = None if last.dtype == torch.bool else more.pop(0)
        return dx, d_last, *(more or [None] * len(mixes))


def wkv7_inputs(decay_: Tensor, rate: Tensor, k: Tensor, v: Tensor, mix: Tensor | None, v_first: Tensor | None,
                k_k: Tensor, k_a: Tensor, n_head: int) -> tuple[Tensor, ...]:
    """What WKV-7 takes beside r: w = `decay`, key, value, kk and -kk ⊙ a (`keys`), [B,T,H,N] each.

    a = σ(rate), value = v + (v_first - v) ⊙ σ(mix); without mix, v itself. All but k_k and k_a [1,1,C] are [B,T,C].
    """
    vectors_learnt = torch.is_grad_enabled() and (k_k.requires_grad or k_a.requires_grad)
    if on_gpu(decay_, rate, k, v, mix, v_first, k_k, k_a) and k.shape[-1] == n_head * CUDA_HEAD and not vectors_learnt:
        out = _Wkv7InputsOnGpu.apply(decay_, rate, k, v, mix, v_first, k_k, k_a)
        return tuple([x.unflatten(-1, (n_head, -1)) for x in out])
    value = v if mix is None else torch.lerp(v, v_first, torch.sigmoid(mix))
    w, value = (x.unflatten(-1, (n_head, -1)) for x in (decay(decay_), value))
    key, kk, minus = keys(k, torch.sigmoid(rate), k_k, k_a, n_head)
    return w, key, value, kk, minus


class _Wkv7InputsOnGpu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, decay_, rate, k, v, mix, v_first, k_k, k_a):
        ctx.save_for_backward(decay_, rate, k, v, k_k, k_a, mix, v_first)
        return tuple(torch.ops.rwkv_nb.prepare([decay_, rate, k, v, k_k, k_a], mix, v_first))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        *inputs, mix, v_first = ctx.saved_tensors
        d_decay, d_rate, d_k, d_v, *more = torch.ops.rwkv_nb.prepare_backward(inputs, mix, v_first, grads)
        return d_decay, d_rate, d_k, d_v, *(more or (None, None)), None, None


def gated_norm(y: Tensor, gate: Tensor, ln_x: nn.GroupNorm, bonus: tuple[Tensor, ...] = ()) -> Tensor:
    """What the output product takes of WKV's y [B,T,H,N]: (ln_x(y) + (Σ r ⊙ k ⊙ r_k) v) ⊙ gate, [B,T,C].

    gate [B,T,C]. bonus: r, k, v [B,T,H,N] and r_k [H,N] of RWKV-7; without, the gate goes through SiLU.
    ln_x is a group norm over each head, which is a layer norm over its channels, several times faster.
    """
    vectors = [ln_x.weight, ln_x.bias, *bonus[3:]]
    learnt = torch.is_grad_enabled() and any(x.requires_grad for x in vectors)
    if on_gpu(y, gate, *vectors, *bonus) and y.shape[-1] == CUDA_HEAD and not learnt:
        return _GatedNormOnGpu.apply(ln_x.eps, y, gate, ln_x.weight, ln_x.bias, *bonus)
    weight, bias = (p.view(y.shape[-2:]) for p in vectors[:2])
    y = torch.addcmul(bias, F.layer_norm(y, y.shape[-1:], eps=ln_x.eps), weight)
    if not bonus:
        return y.flatten(2) * F.silu(gate)
    r, k, v, r_k = bonus
    return torch.addcmul(y, (r * k * r_k).sum(-1, keepdim=True), v).flatten(2) * gate


class _GatedNormOnGpu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, eps, y, gate, weight, bias, *bonus):
        ctx.eps = eps
        ctx.save_for_backward(y, gate, weight, bias, *bonus)
        return torch.ops.rwkv_nb.finish([y, gate, weight, bias], bonus, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        tensors = ctx.saved_tensors
        dy, d_gate, *more = torch.ops.rwkv_nb.finish_backward(tensors[:4], tensors[4:], ctx.eps, d_out)
        return None, dy, d_gate, None, None, *((*more, None) if more else ())


def decay(x: Tensor) -> Tensor:
    """RWKV-7's raw decay w = log σ(x) - ½ (any shape) in x's dtype, worked out in fp32, where a slow decay keeps its
    digits. decay = exp(-exp(w))."""
    return _Decay.apply(x)


class _Decay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        w = F.logsigmoid(x.to(torch.promote_types(x.dtype, torch.float32)))
        return torch.sub(w, 0.5, out=torch.empty_like(x)).view_as(x)   # why a view: see the module

    @staticmethod
    @once_differentiable
    def backward(ctx, dw):
        (x,) = ctx.saved_tensors
        return torch.sigmoid(-x).mul_(dw)


def keys(k: Tensor, a: Tensor, k_k: Tensor, k_a: Tensor, n_head: int) -> tuple[Tensor, Tensor, Tensor]:
    """RWKV-7's keys: with kk = k ⊙ k_k, of length 1 in each head, k ⊙ (1 + (a - 1) ⊙ k_a), kk and -kk ⊙ a.

    k, a [B,T,C], k_k, k_a [1,1,C] → three tensors [B,T,H,N]. The state loses what it holds under kk, times a: the
    product of the second and the third, so either may have the sign.
    """
    return _Keys.apply(k, a, k_k, k_a, n_head)


class _Keys(torch.autograd.Function):
    @staticmethod
    def forward(ctx, k, a, k_k, k_a, n_head):
        k, a, k_k, k_a = (x.unflatten(-1, (n_head, -1)) for x in (k, a, k_k, k_a))
        kk = k * k_k
        length = torch.linalg.vector_norm(kk, dim=-1, keepdim=True).clamp_(min=1e-12)
        kk.div_(length)
        ctx.save_for_backward(k, a, k_k, k_a, kk, length)
        return torch.lerp(k, k * a, k_a), kk.view_as(k), (kk * a).neg_().view_as(k)

    @staticmethod
    @once_differentiable
    def backward(ctx, dk, d_kk, d_b):
        k, a, k_k, k_a, kk, length = ctx.saved_tensors
        need_k_k, need_k_a = ctx.needs_input_grad[2:4]
        d_kk = torch.addcmul(d_kk, d_b, a, value=-1)
        d_kk.addcmul_(kk, (d_kk * kk).sum(-1, keepdim=True), value=-1).div_(length)     # now of k ⊙ k_k
        da = dk * k
        d_k_a = (da * (a - 1)).sum_to_size(k_a.shape).flatten(2) if need_k_a else None
        d_k_k = (d_kk * k).sum_to_size(k_k.shape).flatten(2) if need_k_k else None
        da.mul_(k_a).addcmul_(d_b, kk, value=-1)
        dk = torch.lerp(dk, dk * a, k_a).addcmul_(d_kk, k_k)
        return dk.flatten(2), da.flatten(2), d_k_k, d_k_a, None
