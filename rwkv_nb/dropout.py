"""Dropout whose masks follow from a seed: nothing of one is kept, backward and a recomputed block draw it again."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Dropout(NamedTuple):
    """Elements become 0, each with probability p; which ones follows from the seed and the kind of device alone."""

    p: float
    seed: int

    def of(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """x (any shape, contiguous) with its hits set to 0: a new tensor, or x itself, changed in place, if out is x.
        What is left is not scaled up."""
        generator = torch.Generator(x.device).manual_seed(self.seed)
        return (by_places if x.device.type == "cpu" else by_mask)(x, out, self.p, generator)


def by_mask(x: Tensor, out: Tensor | None, p: float, generator: torch.Generator) -> Tensor:
    """As of Dropout.of, with a number drawn for each element: two launches of a GPU's kernels."""
    keep = torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - p, generator=generator)
    return torch.mul(x, keep, out=out)


def by_places(x: Tensor, out: Tensor | None, p: float, generator: torch.Generator) -> Tensor:
    """As of Dropout.of, with the gaps between hits drawn (geometric), not one number an element: at p = 0.01 a small
    part of the work."""
    n = x.numel()
    enough = int(n * p + 8 * math.sqrt(n * p) + 16)  # hits: mean np, and eight standard deviations to be sure
    uniform = torch.rand(enough, generator=generator)
    gaps = uniform.neg_().log1p_().div_(math.log1p(-p)).long().add_(1)
    hits = gaps.cumsum_(0).sub_(1)
    out = x.clone() if out is None else out
    flat, end = out.view(-1), n - 1
    # Hits beyond the end are moved onto the last element, which then gets back what it is due: cut off, they would be
    # a tensor whose size follows from numbers, which there are none of when memory is predicted.
    last = flat[-1] * (hits != end).all()
    flat.index_fill_(0, hits.clamp_(max=end), 0)[-1] = last
    return out
