"""Contexts longer than memory: a text in chunks along time, the state carried, the gradient exact.

Forward, chunk by chunk and without a graph, keeps only the states at the borders, in the host's memory. Backward goes
from the last chunk to the first, computes each one again, and hands the state's gradient on to the chunk before it.
Device memory is that of one chunk, whatever the text's length.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..data.batches import Batch
from ..loss import head_loss
from ..model import State


def backward_by_chunks(model, batch: Batch, n_trained: int, chunk: int, *, truncated: bool, scale: float,
                       before_chunk: Callable[[int], None], **how) -> Tensor:
    """Add the gradients of one micro-batch's loss · scale; returns its Σ cross-entropy, fp32.

    batch: its tensors [B,T], on the host; n_trained: N of the whole step; chunk: tokens at once
    truncated: no gradient crosses a border (truncated backpropagation): one pass, another gradient
    before_chunk(i) is called before chunk i is computed, each time; how: for model.hidden
    """
    device, ce = model.ln_out.weight.device, 0.0
    chunks = list(zip(*(t.split(chunk, 1) for t in batch[:3]), strict=True))

    def learn(i: int, state: State | None, d_after: list[Tensor] | None) -> State:
        nonlocal ce
        before_chunk(i)
        inputs, targets, mask = chunks[i][0], chunks[i][1].to(device), chunks[i][2]
        hidden, after = model.hidden(inputs, state, **how)
        loss, sum_ce = head_loss(hidden, model.head, targets, mask, n_trained)
        torch.autograd.backward([loss * scale, *(after if d_after else ())], [None, *(d_after or ())])
        ce = ce + sum_ce
        return after

    if truncated:
        state = None
        for i in range(len(chunks)):
            state = State(*(part.detach() for part in learn(i, state, None)))
        return ce
    borders, d_state = [], None
    with torch.no_grad():
        state = None
        for i in range(len(chunks) - 1):
            before_chunk(i)
            _, state = model.hidden(chunks[i][0], state, **how)
            borders.append(State(*(part.cpu() for part in state)))
    for i in reversed(range(len(chunks))):
        state = State(*(part.to(device).requires_grad_() for part in borders.pop())) if i else None
        learn(i, state, d_state)
        d_state = [part.grad for part in state] if i else None
    return ce
