"""Frozen matrices held in int8 or nf4, and the one product that trains an adapter beside a frozen matrix.

int8: a scale for each output row. nf4: Dettmers et al. 2023, arXiv 2305.14314, blocks of 64; double quantisation holds
their scales in 8 bits too. The number formats are those of the `bitsandbytes` package. Axes: M rows (B·T), R rank.
"""

import logging

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .dropout import Dropout
from .errors import SettingsError
from .extras import extra

BLOCK = 64          # elements of nf4 that share a scale
HEAD_ROWS = 8192    # rows of an int8 matrix that are dense at once, where not all are needed at once


def bitsandbytes():
    """The package, imported when first needed. Raises SettingsError where it is missing or has no library that fits."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of inference kernels that are not used here
    package = extra("bitsandbytes", "quant")
    if isinstance(package.cextension.lib, package.cextension.ErrorHandlerMockBNBNativeLibrary):
        raise SettingsError(f"bitsandbytes {package.__version__} has no library that fits torch {torch.__version__}",
                            where="quant, adam_state",
                            fix="pip install -U bitsandbytes; python -m bitsandbytes says more")
    return package


class Held:
    """A frozen matrix [out,in] in int8 or nf4. `dense` makes it anew at each use, so that no copy stays behind.

    W: any floating dtype, on the device that will hold it. dtype: of what dense() returns. Raises SettingsError
    for nf4 where bitsandbytes is missing.
    """

    def __init__(self, W: Tensor, kind: str, *, dtype: torch.dtype, double: bool = True):
        self.shape, self.dtype, self.device, self.kind = W.shape, dtype, W.device, kind
        if kind == "int8":
            self.codes, self.scale = _int8(W, dtype)
        else:
            functional = bitsandbytes().functional  # once: asking for it costs as much as a few kernels
            self.codes, self.scale = _nf4(functional, W, dtype, double)
            self._dequantize = functional.dequantize_4bit

    def dense(self, rows: slice = slice(None)) -> Tensor:
        """The matrix, or some of its rows (int8 only), in self.dtype."""
        if self.kind == "int8":
            return torch.mul(self.codes[rows], self.scale[rows])
        return self._dequantize(self.codes, self.scale)

    def slices(self) -> list[slice]:
        """Rows to ask dense() for, one after the other, so that a large int8 matrix is never dense at once."""
        if self.kind != "int8":
            return [slice(None)]
        return [slice(i, i + HEAD_ROWS) for i in range(0, self.shape[0], HEAD_ROWS)]

    @property
    def nbytes(self) -> int:
        """Bytes that are held."""
        if self.kind == "int8":
            return self.codes.nbytes + self.scale.nbytes
        parts = [self.scale, self.scale.state2] if self.scale.nested else [self.scale]
        return self.codes.nbytes + sum(part.absmax.nbytes + part.code.nbytes for part in parts)


def _at_once(W: Tensor) -> int:
    """Elements to quantise at once: on a CPU, bitsandbytes takes up to 40 bytes for each while it does so; on a GPU it
    makes its table of codes anew for each slice."""
    return 2**18 if W.device.type == "cpu" else 2**24


def _int8(W: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Codes [out,in], and each row's scale [out,1] in dtype, in which it is rounded before the codes are made."""
    codes, scale = torch.empty(W.shape, dtype=torch.int8, device=W.device), W.new_empty(len(W), 1, dtype=dtype)
    rows = max(_at_once(W) // W.shape[1], 1)
    for part, c, s in zip(W.split(rows), codes.split(rows), scale.split(rows), strict=True):
        part = part.float()
        s.copy_(part.abs().amax(1, keepdim=True) / 127)
        c.copy_((part / s.float().clamp(min=1e-30)).round_().clamp_(-127, 127))
    return codes, scale


def _nf4(functional, W: Tensor, dtype: torch.dtype, double: bool):
    """Codes and bitsandbytes' QuantState."""
    parts = [functional.quantize_4bit(part.to(dtype), blocksize=BLOCK, quant_type="nf4")
             for part in W.reshape(-1).split(_at_once(W))]
    codes, state = torch.cat([codes for codes, _ in parts]), parts[0][1]
    state.absmax, state.shape = torch.cat([part.absmax for _, part in parts]), W.shape
    if double:
        state.nested, state.offset = True, state.absmax.mean()
        state.absmax, state.state2 = functional.quantize_blockwise(state.absmax - state.offset, blocksize=256)
    return codes, state


class QuantLinear(nn.Linear):
    """A frozen linear whose weight is a Held; `.weight` is None. It has no entry in a state_dict."""

    squares = True  # forward knows `squared`

    def __init__(self, held: Held):
        nn.Module.__init__(self)
        self.out_features, self.in_features = held.shape
        self.register_parameter("weight", None)
        self.register_parameter("bias", None)
        self.held = held

    def forward(self, x: Tensor, squared: bool = False) -> Tensor:
        if torch.is_grad_enabled() or squared or len(self.held.slices()) == 1:
            return frozen_product(x, self.held, squared=squared)
        return torch.cat([F.linear(x, self.held.dense(rows)) for rows in self.held.slices()], -1)


def frozen_product(x: Tensor, W: Tensor | Held, bias: Tensor | None = None, A: Tensor | None = None,
                   B: Tensor | None = None, scale: float = 0.0, dropout: Dropout | None = None,
                   squared: bool = False) -> Tensor:
    """W x + bias + scale · B A dropout(x); with `squared`, of max(x, 0)² in x's place.

    x [...,in], W frozen [out,in] as a tensor or Held, A [R,in] and B [out,R] of any dtype → [...,out] in x's dtype.
    Gradients for x, A and B.
    """
    return _FrozenProduct.apply(x, W, bias, A, B, scale, dropout, squared)


class _FrozenProduct(torch.autograd.Function):
    """Both paths in one node: the narrow path is added into the wide product in place, both ways, and backward keeps
    dropout(x), or x where that is squared, the few places that were hit (on a CPU), and the [M,R] middle. Autograd's
    own graph would write and read each [M,out] tensor once more, and keep a dense copy of a held matrix; here that is
    made once more in backward."""

    @staticmethod
    def forward(ctx, x, W, bias, A, B, scale, dropout, squared):
        rows = x.reshape(-1, x.shape[-1])                           # [M,in]
        inputs = _squared(rows) if squared else rows
        y, middle, hits = F.linear(inputs, _dense(W), bias), None, None
        if A is not None:
            if dropout:
                hits = dropout.draw(inputs)
                inputs = dropout.of(inputs, hits, inputs if squared else None)
            A_, B_ = _cast(x.dtype, A, B)
            middle = _scaled_product(inputs, A_.t(), scale)         # [M,R]
            y.addmm_(middle, B_.t())
        kept = rows if squared else inputs if A is not None else None
        ctx.held = W if isinstance(W, Held) else None
        ctx.save_for_backward(kept, hits, middle, None if ctx.held else W, A, B)
        ctx.scale, ctx.dropout, ctx.squared, ctx.shape = scale, dropout, squared, x.shape
        return y if x.dim() == 2 else y.view(*x.shape[:-1], -1)     # logits change in place, which a view could not

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        kept, hits, middle, W, A, B = ctx.saved_tensors
        need_x, _, _, need_A, need_B = ctx.needs_input_grad[:5]
        dy = dy.reshape(-1, dy.shape[-1])                           # [M,out]
        dx = dA = dB = None
        if A is not None:
            A_, B_ = _cast(dy.dtype, A, B)
            d_middle = _scaled_product(dy, B_, ctx.scale)           # [M,R]
            if need_A:
                dA = _product(d_middle.t(), _inputs_again(kept, hits, ctx), A.dtype)
            if need_B:
                dB = _product(dy.t(), middle, B.dtype)
            if need_x:
                dx = d_middle @ A_
                dx = ctx.dropout.of(dx, hits, dx) if ctx.dropout else dx
        if need_x:
            W, factor = _dense(ctx.held or W), 2 if ctx.squared else 1
            dx = _scaled_product(dy, W, factor) if dx is None else dx.addmm_(dy, W, beta=factor, alpha=factor)
            if ctx.squared:  # times 2 max(x, 0), without a tensor for it: relu's own backward, then times x
                torch.ops.aten.threshold_backward.grad_input(dx, kept, 0, grad_input=dx).mul_(kept)
            dx = dx.view(ctx.shape)
        return dx, None, None, dA, dB, None, None, None


def _dense(W: Tensor | Held) -> Tensor:
    return W.dense() if isinstance(W, Held) else W


def _squared(x: Tensor) -> Tensor:
    return torch.relu(x).square_()


def _inputs_again(kept: Tensor, hits: Tensor | None, ctx) -> Tensor:
    """What A was multiplied with in forward."""
    if not ctx.squared:
        return kept
    inputs = _squared(kept)
    return ctx.dropout.of(inputs, hits, inputs) if ctx.dropout else inputs


def _scaled_product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale · a @ b, in one kernel."""
    return a.new_empty(len(a), b.shape[1]).addmm_(a, b, beta=0, alpha=scale)


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b in dtype: a GPU writes its fp32 sums as they are, in the same kernel."""
    if a.device.type == "cuda" and a.itemsize == 2 and dtype == torch.float32:
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a, b).to(dtype)


def _cast(dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, all of one dtype, in another: one kernel of a GPU for all."""
    if tensors[0].dtype == dtype:
        return tensors
    cast = tuple(torch.empty_like(x, dtype=dtype) for x in tensors)
    torch._foreach_copy_(cast, tensors)
    return cast
