"""The one loss, head included, without the logits of a whole batch ever in memory.

loss = (Σ cross-entropy + ½·10⁻⁴ Σ max-logit²) / N, both sums over trained tokens, N = trained tokens of the whole
optimizer step. The second term keeps logits from drifting (RWKV's L2Wrap); with one N for all micro-batches,
accumulation gives the gradient of one large batch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

MAX_LOGIT = 1e-4


def head_loss(hidden: Tensor, head: nn.Module, targets: Tensor, mask: Tensor, n_trained: int,
              *, chunk: int = 256) -> tuple[Tensor, Tensor]:
    """This micro-batch's share of the step's loss.

    hidden [B,T,C], head: C → V, targets int64 [B,T], mask bool [B,T] (which targets are trained),
    n_trained: N of the whole step. Returns (loss, Σ cross-entropy), fp32 scalars; the second carries no gradient.
    Logits are made for `chunk` trained tokens at a time, and the gradient for `hidden` in the same pass.
    No trained token gives 0.
    """
    parameters = [p for p in head.parameters() if p.requires_grad]
    return _HeadLoss.apply(hidden[mask], head, targets[mask], max(n_trained, 1), chunk, *parameters)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, targets, n_trained, chunk, *parameters):
        wanted = [t for t, need in zip((hidden, *parameters), (ctx.needs_input_grad[0], *ctx.needs_input_grad[5:]),
                                       strict=True) if need]
        grads = [torch.zeros_like(t) for t in wanted]
        loss, ce = (torch.zeros((), device=hidden.device) for _ in range(2))
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            h = hidden[rows].detach().requires_grad_(ctx.needs_input_grad[0])
            with torch.set_grad_enabled(bool(wanted)):
                logits = head(h)
            sum_ce, sum_top, d_logits = _loss_and_gradient(logits.detach(), targets[rows], n_trained, bool(wanted))
            ce += sum_ce
            loss += (sum_ce + 0.5 * MAX_LOGIT * sum_top) / n_trained
            if wanted:
                inputs = ([h] if ctx.needs_input_grad[0] else []) + list(parameters)
                parts = torch.autograd.grad(logits, inputs, d_logits.to(logits.dtype))
                for i, part in enumerate(parts):
                    of_hidden = i == 0 and ctx.needs_input_grad[0]
                    (grads[i][rows] if of_hidden else grads[i]).add_(part)
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(ce)
        return loss, ce

    @staticmethod
    def backward(ctx, d_loss, _):
        saved = iter(ctx.saved_tensors)
        needs = (ctx.needs_input_grad[0], *ctx.needs_input_grad[5:])
        d_hidden, *d_parameters = (next(saved) * d_loss if need else None for need in needs)
        return d_hidden, None, None, None, None, *d_parameters


def _loss_and_gradient(logits: Tensor, targets: Tensor, n_trained: int, with_gradient: bool):
    """logits [M,V] (overwritten when fp32), targets [M] → Σ ce, Σ max², d loss / d logits [M,V] or None."""
    z = logits.float()
    top, where = z.max(dim=-1, keepdim=True)
    targets = targets[:, None]
    ce = -(z.gather(1, targets) - top)
    z = z.sub_(top).exp_()
    total = z.sum(dim=-1, keepdim=True)
    ce = (ce + total.log()).sum()
    if not with_gradient:
        return ce, top.square().sum(), None
    z.div_(total * n_trained)
    z.scatter_add_(1, targets, torch.full_like(top, -1 / n_trained))
    z.scatter_add_(1, where, top * (MAX_LOGIT / n_trained))
    return ce, top.square().sum(), z
