"""Texts one behind the other in a row: each runs through an operator from a state of zeros, as if it stood alone.

Axes: B batch, T time, H heads, N head size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def by_text(form: Callable, starts: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """y [B,T,H,N] of form(*inputs, None) on each text alone.

    starts: bool [B,T], where a text begins; each row begins with one. Texts of like length run side by side, so
    that little is computed behind the end of the shorter ones. What is computed there is not used.
    """
    B, T = starts.shape
    first = starts.flatten().nonzero()[:, 0]
    sizes = torch.diff(first, append=first.new_tensor([B * T]))
    likes, outputs, places = (sizes - 0.5).log2().ceil(), [], []
    for like in likes.unique():
        mine = likes == like
        at = torch.arange(sizes[mine].max(), device=starts.device)
        place, own = first[mine, None] + at, at < sizes[mine, None]
        index = place.clamp(max=B * T - 1)
        y, _ = form(*(_gathered(x, index) if x.dim() == 4 else x for x in inputs.values()), None)
        outputs.append(y[own])
        places.append(place[own])
    return torch.cat(outputs).index_select(0, torch.cat(places).argsort()).unflatten(0, (B, T))


def _gathered(x: Tensor, index: Tensor) -> Tensor:
    """x [B,T,H,N], index [n,longest] into B·T → [n,longest,H,N]."""
    return x.flatten(0, 1).index_select(0, index.flatten()).unflatten(0, index.shape)
