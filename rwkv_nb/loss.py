"""The one loss, head included, without the logits of a whole batch ever in memory.

loss = (Σ cross-entropy + ½·10⁻⁴ Σ max-logit²) / N, both sums over trained tokens, N = trained tokens of the whole
optimizer step. The second term keeps logits from drifting (RWKV's L2Wrap); with one N for all micro-batches,
accumulation gives the gradient of one large batch.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from .model.parts import Linear
from .quant import QuantLinear
from .wkv.kernels import on_gpu

MAX_LOGIT = 1e-4
CHUNK = 128        # tokens whose logits are made at once
GPU_CHUNK = 512    # with the GPU's kernel, which makes no copy in fp32: a head is read less often
SLICE = 2**19  # logits that a CPU works on at once: 2 MB in fp32


def head_loss(hidden: Tensor, head: nn.Module, targets: Tensor, mask: Tensor, n_trained: int,
              *, chunk: int | None = None) -> tuple[Tensor, Tensor]:
    """This micro-batch's share of the step's loss.

    hidden [B,T,C], head: C → V, targets int64 [B,T], mask bool [B,T] (which targets are trained; where it lies on
    the CPU, no GPU is waited for), n_trained: N of the whole step. Returns (loss, Σ cross-entropy), fp32 scalars; the
    second carries no gradient.
    Logits are made for `chunk` trained tokens at a time (None: as suits the device), and the gradient for `hidden` in
    the same pass. No trained token gives 0.
    """
    chunk = chunk or (GPU_CHUNK if on_gpu(hidden) else CHUNK)
    parameters = [p for p in head.parameters() if p.requires_grad]
    rows = mask.flatten().nonzero()[:, 0].to(hidden.device, non_blocking=True)
    hidden, targets = hidden.flatten(0, 1).index_select(0, rows), targets.flatten().index_select(0, rows)
    return _HeadLoss.apply(hidden, head, targets, max(n_trained, 1), chunk, *parameters)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, head, targets, n_trained, chunk, *parameters):
        wanted = any(ctx.needs_input_grad)
        d_hidden, *d_parameters = grads = [torch.zeros_like(x) for x in (hidden, *parameters)]
        sums = torch.zeros(2, device=hidden.device)
        # A frozen head is two products through one buffer: touching new memory for each chunk's logits costs a CPU
        # about a third of the product itself.
        slices = None if parameters else _weight_slices(head)
        buffer = None if slices is None else hidden.new_empty(min(chunk, len(hidden)), head.out_features)
        for h, t, d_h in zip(hidden.split(chunk), targets.split(chunk), d_hidden.split(chunk), strict=True):
            if slices is not None:
                logits = buffer[:len(h)]
                for rows, weight in slices:
                    torch.mm(h, weight().t(), out=logits[:, rows])
            else:
                h = h.detach().requires_grad_(wanted)
                with torch.set_grad_enabled(wanted):
                    logits = head(h)
            sums += _loss_and_gradient(logits.detach(), t, wanted)  # logits hold their own gradient from here on
            if wanted and slices is not None:
                for rows, weight in slices:  # d_h is 0 so far
                    d_h.addmm_(logits[:, rows], weight())
            elif wanted:
                parts = torch.autograd.grad(logits, [h, *parameters], logits.detach())
                for total, part in zip([d_h, *d_parameters], parts, strict=True):
                    total += part
        ctx.save_for_backward(*grads)
        ctx.n_trained = n_trained
        ce, squares = sums.unbind()
        ctx.mark_non_differentiable(ce)
        return (ce + 0.5 * MAX_LOGIT * squares) / n_trained, ce

    @staticmethod
    def backward(ctx, d_loss, _):
        d_hidden, *d_parameters = (grad * (d_loss / ctx.n_trained) for grad in ctx.saved_tensors)
        return d_hidden, None, None, None, None, *d_parameters


def _weight_slices(head: nn.Module) -> list[tuple[slice, Callable[[], Tensor]]] | None:
    """Which rows of the vocabulary, and what gives a frozen head's weight for them: all of a dense one at once, a few
    thousand rows of an int8 one at a time. None for any other head."""
    if type(head) in (nn.Linear, Linear) and head.bias is None:
        return [(slice(None), lambda: head.weight)]
    if type(head) is QuantLinear and head.held.kind == "int8":
        return [(rows, partial(head.held.dense, rows)) for rows in head.held.slices()]
    return None


def _loss_and_gradient(logits: Tensor, targets: Tensor, with_gradient: bool) -> Tensor:
    """logits [M,V], targets [M] → (Σ ce, Σ max²), fp32 [2]. logits become N · d loss / d logits, in place.

    A CPU takes a few rows at a time, which stay in its caches from one pass to the next; fp32 copies are that small.
    On a GPU one kernel does it (cuda/loss_gpu.cu), where it is loaded.
    """
    if on_gpu(logits) and logits.shape[1] % 4 == 0:
        return torch.ops.rwkv_nb.loss(logits, targets, MAX_LOGIT, with_gradient).sum(0)
    rows = SLICE // logits.shape[1] if logits.device.type == "cpu" else len(logits)
    sums = torch.zeros(2, device=logits.device)
    for part, t in zip(logits.split(max(rows, 1)), targets[:, None].split(max(rows, 1)), strict=True):
        z = part.float()
        p = torch.softmax(z, dim=-1)
        p_top, where = p.max(dim=-1, keepdim=True)
        top = z.gather(1, where)
        ce = top - z.gather(1, t) - p_top.log()  # p_top = 1 / Σ exp(z - top)
        sums += torch.stack([ce.sum(), top.square().sum()])
        if with_gradient:
            p.scatter_add_(1, t, torch.full_like(top, -1))
            p.scatter_add_(1, where, top * MAX_LOGIT)
            part.copy_(p)
    return sums
