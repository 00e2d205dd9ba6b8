"""Dropout whose masks follow from a seed: a block that is computed again meets the same."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Dropout(NamedTuple):
    """Elements become 0, each with probability p; which ones follows from the seed and the kind of device alone."""

    p: float
    seed: int
    masks: bool = False  # on device meta: what a GPU would need, not a CPU

    def draw(self, x: Tensor) -> Tensor | None:
        """The hits of a tensor like x, to be kept for backward; None on a GPU, which draws them again in two launches
        of its kernels."""
        return None if self.masks or x.device.type == "cuda" else draw_places(x, self)

    def of(self, x: Tensor, hits: Tensor | None, out: Tensor | None = None) -> Tensor:
        """x (any shape, contiguous) with its hits, as of draw(), set to 0: a new tensor, or x itself, changed in place,
        if out is x. What is left is not scaled up."""
        return by_mask(x, self, out) if hits is None else by_places(x, hits, out)


def by_mask(x: Tensor, dropout: Dropout, out: Tensor | None) -> Tensor:
    """As of Dropout.of, with a number drawn for each element."""
    generator = None if x.is_meta else torch.Generator(x.device).manual_seed(dropout.seed)
    keep = torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1 - dropout.p, generator=generator)
    return torch.mul(x, keep, out=out)


def draw_places(x: Tensor, dropout: Dropout) -> Tensor:
    """Which of x's n elements are hit: int64, ascending; those from n on mean nothing.

    The gaps between hits are drawn (geometric), not one number an element: at p = 0.01 a small part of the work.
    """
    n, p, generator = x.numel(), dropout.p, torch.Generator().manual_seed(dropout.seed)
    enough = int(n * p + 8 * math.sqrt(n * p) + 16)  # hits: mean np, and eight standard deviations to be sure
    uniform = torch.rand(enough, generator=generator, device=x.device)
    gaps = uniform.neg_().log1p_().div_(math.log1p(-p)).long().add_(1)
    return gaps.cumsum_(0).sub_(1)


def by_places(x: Tensor, hits: Tensor, out: Tensor | None) -> Tensor:
    """As of Dropout.of."""
    out = x.clone() if out is None else out
    flat, end = out.view(-1), x.numel() - 1
    # Hits beyond the end are moved onto the last element, which then gets back what it is due: cut off, they would be
    # a tensor whose size follows from numbers, which there are none of when memory is predicted.
    last = flat[-1] * (hits != end).all()
    flat.index_fill_(0, hits.clamp(max=end), 0)[-1] = last
    return out
