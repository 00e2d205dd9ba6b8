"""Texts one behind the other in a row: each runs through an operator from a state of zeros, as if it stood alone.

Axes: B batch, T time, H heads, N head size.
"""

from collections import defaultdict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def borders(starts: Tensor) -> Tensor:
    """int64 [texts + 1], on the starts' device: where each text begins in the B·T steps, and where all end."""
    return torch.cat([starts.flatten().nonzero()[:, 0], torch.tensor([starts.numel()], device=starts.device)])


def by_text(form: Callable, starts: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """y [B,T,H,N] of form(*inputs, None) on each text alone.

    starts: bool [B,T], where a text begins; each row begins with one. Texts of like length run side by side, so
    that little is computed behind the end of the shorter ones. What is computed there is not used.
    """
    sizes = borders(starts).diff().tolist()
    # split, pad and stack: their gradients are slices, several times faster on a CPU than those of a gather
    parts = {name: x.flatten(0, 1).split(sizes) for name, x in inputs.items() if x.dim() == 4}
    outputs, like = [None] * len(sizes), defaultdict(list)
    for i, size in enumerate(sizes):
        like[(size - 1).bit_length()].append(i)
    for mine in like.values():
        longest = max(sizes[i] for i in mine)
        y, _ = form(*(torch.stack([F.pad(parts[name][i], (0, 0, 0, 0, 0, longest - sizes[i])) for i in mine])
                      if name in parts else x for name, x in inputs.items()), None)
        for i, row in zip(mine, y, strict=True):
            outputs[i] = row[:sizes[i]]
    return torch.cat(outputs).unflatten(0, starts.shape)
