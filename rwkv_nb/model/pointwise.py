"""Some of RWKV's pointwise steps with gradients written by hand: plain autograd would pass over memory twice as often.

Axes: B batch, T time, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def token_shift(x: Tensor, last: Tensor, *mixes: Tensor) -> tuple[Tensor, ...]:
    """x + (x' - x) ⊙ mix for each mix, where x' is each token's predecessor.

    x [B,T,C], mixes [1,1,C] or [B,T,C] → as many tensors [B,T,C].
    last: [B,C], before the first token; or bool [B,T], for texts one behind the other: where one begins, x' is zero.
    """
    if torch.is_grad_enabled():
        return _TokenShift.apply(x, last, *mixes)
    step_back = _step_back(x, last)     # without a graph: a token at a time, the graph's cost would show
    return tuple(torch.addcmul(x, step_back, mix) for mix in mixes)


def _step_back(x: Tensor, last: Tensor) -> Tensor:
    """x' - x"""
    if last.dtype != torch.bool:
        before = last[:, None]
        return (before if x.shape[1] == 1 else torch.cat([before, x[:, :-1]], dim=1)) - x
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
