"""Frozen matrices held in int8 or nf4, and the one product that trains an adapter beside a frozen matrix.

int8: a scale for each output row. nf4: Dettmers et al. 2023, arXiv 2305.14314, blocks of 64; double quantisation holds
their scales in 8 bits too. The number formats are those of the `bitsandbytes` package. Axes: M rows (B·T), R rank.
"""

from __future__ import annotations

import logging

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .extras import extra

BLOCK, SLICE = 64, 2**18   # elements that share a scale; that are quantised at once


def bitsandbytes():
    """The package, imported when first needed. Raises SettingsError where it is missing."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of inference kernels that are not used here
    return extra("bitsandbytes", "quant")


class Held:
    """A frozen matrix [out,in] in int8 or nf4. `dense` makes it anew at each use, so that no copy stays behind.

    W: any floating dtype, on the device that will hold it. dtype: of what dense() returns. Raises SettingsError
    where bitsandbytes is missing.
    """

    def __init__(self, W: Tensor, kind: str, *, dtype: torch.dtype, double: bool = True):
        functional = bitsandbytes().functional
        self.shape, self.dtype, self.device, self.kind = W.shape, dtype, W.device, kind
        if kind == "int8":
            self.codes, self.scale = _int8(functional, W, dtype)
        else:
            self.codes, self.scale = _nf4(functional, W, dtype, double)

    def dense(self, rows: slice = slice(None)) -> Tensor:
        """The matrix, or some of its rows (int8 only), in self.dtype."""
        if self.kind == "int8":
            return torch.mul(self.codes[rows], self.scale[rows])
        return bitsandbytes().functional.dequantize_4bit(self.codes, self.scale)

    @property
    def nbytes(self) -> int:
        """Bytes that are held."""
        if self.kind == "int8":
            return self.codes.nbytes + self.scale.nbytes
        parts = [self.scale, self.scale.state2] if self.scale.nested else [self.scale]
        return self.codes.nbytes + sum(part.absmax.nbytes + part.code.nbytes for part in parts)


# Both work a slice at a time: on a CPU, bitsandbytes takes up to 40 bytes an element while it quantises.

def _int8(functional, W: Tensor, dtype: torch.dtype):
    """Codes and each row's scale."""
    codes, scale = torch.empty(W.shape, dtype=torch.int8, device=W.device), W.new_empty(len(W), 1, dtype=dtype)
    rows = max(SLICE // W.shape[1], 1)
    for part, c, s in zip(W.split(rows), codes.split(rows), scale.split(rows), strict=True):
        found, largest, _ = functional.int8_vectorwise_quant(part.half())  # no weight is beyond fp16's range
        c.copy_(found), s.copy_(largest[:, None] / 127)
    return codes, scale


def _nf4(functional, W: Tensor, dtype: torch.dtype, double: bool):
    """Codes and bitsandbytes' QuantState."""
    parts = [functional.quantize_4bit(part.to(dtype), blocksize=BLOCK, quant_type="nf4")
             for part in W.reshape(-1).split(SLICE)]
    codes, state = torch.cat([codes for codes, _ in parts]), parts[0][1]
    state.absmax, state.shape = torch.cat([part.absmax for _, part in parts]), W.shape
    if double:
        state.nested, state.offset = True, state.absmax.mean()
        state.absmax, state.state2 = functional.quantize_blockwise(state.absmax - state.offset, blocksize=256)
    return codes, state


class QuantLinear(nn.Linear):
    """A frozen linear whose weight is a Held; `.weight` is None. It has no entry in a state_dict."""

    def __init__(self, held: Held):
        nn.Module.__init__(self)
        self.out_features, self.in_features = held.shape
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)
        self.held = held

    def forward(self, x: Tensor) -> Tensor:
        return frozen_product(x, self.held)


def frozen_product(x: Tensor, W: Tensor | Held, bias: Tensor | None = None, A: Tensor | None = None,
                   B: Tensor | None = None, scale: float = 0.0, hits: Tensor | None = None) -> Tensor:
    """W x + bias + scale · B A x', where x' is x with the elements `hits` (as zero_hits takes them) set to 0.

    x [...,in], W frozen [out,in] as a tensor or Held, A [R,in] and B [out,R] of any dtype → [...,out] in x's dtype.
    Gradients for x, A and B.
    """
    return _FrozenProduct.apply(x, W, bias, A, B, scale, hits)


class _FrozenProduct(torch.autograd.Function):
    """Both paths in one node: the narrow path is added into the wide product in place, both ways, and backward keeps
    dropout(x), the few places that were hit, and the [M,R] middle. Autograd's own graph would write and read each
    [M,out] tensor once more, and keep a dense copy of a held matrix; here that is made once more in backward."""

    @staticmethod
    def forward(ctx, x, W, bias, A, B, scale, hits):
        rows = x.reshape(-1, x.shape[-1])                           # [M,in]
        y, kept, middle = F.linear(rows, _dense(W), bias), None, None
        if A is not None:
            kept = rows if hits is None else zero_hits(rows.clone(), hits)
            middle = kept @ A.to(x.dtype).t()                       # [M,R]
            y.addmm_(middle, B.to(x.dtype).t(), alpha=scale)
        ctx.held = W if isinstance(W, Held) else None
        ctx.save_for_backward(kept, hits, middle, None if ctx.held else W, A, B)
        ctx.scale, ctx.shape = scale, x.shape
        return y if x.dim() == 2 else y.view(*x.shape[:-1], -1)     # logits change in place, which a view could not

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        kept, hits, middle, W, A, B = ctx.saved_tensors
        need_x, _, _, need_A, need_B = ctx.needs_input_grad[:5]
        dy = dy.reshape(-1, dy.shape[-1])                           # [M,out]
        dx = dA = dB = None
        if A is not None:
            d_middle = dy @ (B * ctx.scale).to(dy.dtype)            # [M,R]
            if need_A:
                dA = (d_middle.t() @ kept).to(A.dtype)
            if need_B:
                dB = (dy.t() @ middle).to(B.dtype).mul_(ctx.scale)
            if need_x:
                dx = d_middle @ A.to(dy.dtype)
                dx = dx if hits is None else zero_hits(dx, hits)
        if need_x:
            W = _dense(ctx.held or W)
            dx = (dy @ W if dx is None else dx.addmm_(dy, W)).view(ctx.shape)
        return dx, None, None, dA, dB, None, None


def _dense(W: Tensor | Held) -> Tensor:
    return W.dense() if isinstance(W, Held) else W


def zero_hits(x: Tensor, hits: Tensor) -> Tensor:
    """x with the elements that were hit set to 0, in place. hits: int64 places in the flat x; those beyond it mean
    nothing."""
    flat, end = x.view(-1), x.numel() - 1
    # hits beyond the end are moved onto the last element, which then gets back what it is due: cutting them off
    # would make a GPU wait for the CPU to learn how many they are
    last = flat[-1] * (hits != end).all()
    flat.index_fill_(0, hits.clamp(max=end), 0)[-1] = last
    return x
