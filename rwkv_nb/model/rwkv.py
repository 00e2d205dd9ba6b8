"""The model around the versions' blocks: parameter names are the checkpoint's keys.

One forward serves as training form (a whole sequence) and as RNN form (token by token from a state).
Axes: B batch, T time, C channels, H heads, N head size, V vocabulary, L layers.
"""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from ..wkv import pick_op
from . import rwkv5, rwkv6, rwkv7
from .parts import Linear
from .recompute import recomputed
from .shape import Shape

PARTS = {"x070": rwkv7, "x060": rwkv6, "x052": rwkv5}


class State(NamedTuple):
    """All that the model remembers of a text."""

    att_x: Tensor  # [L, B, C] last input of each time mix
    wkv: Tensor    # [L, B, H, N, N] fp32, value channels by key channels
    ffn_x: Tensor  # [L, B, C] last input of each channel mix


class Block(nn.Module):
    """Time mix and channel mix, each behind a layer norm and beside a residual."""

    def __init__(self, shape: Shape, layer: int, **on):
        super().__init__()
        parts, self.first = PARTS[shape.version], layer == 0
        self.ln1 = nn.LayerNorm(shape.n_embd, **on)
        self.ln2 = nn.LayerNorm(shape.n_embd, **on)
        if self.first:
            self.ln0 = nn.LayerNorm(shape.n_embd, **on)
        self.att = parts.TimeMix(shape.att_keys(layer), shape.n_head, **on)
        self.ffn = parts.ChannelMix(shape.ffn_keys(), shape.n_head, **on)

    def forward(self, x, v_first, att_x, wkv, ffn_x, op):
        """x [B,T,C] and this layer's part of a State → x, v_first and the new part of the State.

        v_first [B,T,C] is what RWKV-7's block 0 hands on to the others; None before it, and in other versions.
        """
        if self.first:
            x = self.ln0(x)
        z = self.ln1(x)
        y, v_first, wkv = self.att(z, v_first, att_x, wkv, op)
        x, att_x = x + y, z[:, -1]
        z = self.ln2(x)
        return x + self.ffn(z, ffn_x), v_first, att_x, wkv, z[:, -1]


def _keep_wkv():
    """Selective checkpointing's contexts: results of our WKV operators are kept, all else is computed again, a GPU's
    pointwise kernels too."""
    def policy(_, op, *args, **kwargs):
        wkv = op.name().startswith("rwkv_nb::wkv")
        return CheckpointPolicy.MUST_SAVE if wkv else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


class RWKV(nn.Module):
    """The model of a shape, its version too. Parameters are empty until loaded (.checkpoint) or initialised (.init)."""

    def __init__(self, shape: Shape, device=None, dtype=None):
        super().__init__()
        on = {"device": device, "dtype": dtype}
        self.shape = shape
        self.emb = nn.Embedding(shape.vocab_size, shape.n_embd, _weight=torch.empty(
            shape.vocab_size, shape.n_embd, **on))
        self.blocks = nn.ModuleList(Block(shape, i, **on) for i in range(shape.n_layer))
        self.ln_out = nn.LayerNorm(shape.n_embd, **on)
        self.head = Linear(shape.n_embd, shape.vocab_size, bias=False, **on)

    def zero_state(self, batch: int) -> State:
        """The state before any text, for B = batch."""
        s, weight = self.shape, self.ln_out.weight
        x = weight.new_zeros(s.n_layer, batch, s.n_embd)
        wkv = torch.zeros(s.n_layer, batch, s.n_head, s.head_size, s.head_size, device=weight.device)
        return State(x, wkv, x.clone())

    def _embedded(self, tokens: Tensor) -> Tensor:
        """The tokens' rows of the embedding, which may have stayed on the CPU, on the model's device [B,T,C]."""
        here, there = self.emb.weight.device, self.ln_out.weight.device
        x = self.emb(tokens.to(here, non_blocking=here.type != "cpu"))  # what comes from a GPU must be there first
        if there.type == "cuda" and here.type == "cpu" and not x.requires_grad:
            x = x.pin_memory()                                          # else a GPU's queue is waited for
        return x.to(there, non_blocking=True)

    def hidden(self, tokens: Tensor, state: State | None = None, *, op="auto", grad_cp="none",
               keep_state=True, starts: Tensor | None = None) -> tuple[Tensor, State | None]:
        """tokens int64 [B,T] → hidden [B,T,C] behind ln_out, and the state after the last token (None if not kept).

        tokens may lie on the CPU wherever the model is; with the embedding there, best so: then nothing waits.
        state None starts a text. grad_cp "block" recomputes each block in backward (.recompute), "selective" all of
        it but compiled WKV operators.
        starts: bool [B,T], best on the CPU, where a row holds several texts: True where one begins, as each row does.
        None sees another; there is no state before, and none of use afterwards.
        """
        x, v_first, after = self._embedded(tokens), None, []
        op = pick_op(op, x, x.dtype, self.shape.generation, self.shape.head_size)  # once: all blocks compute alike
        zeros = x.new_zeros(len(x), self.shape.n_embd)
        here = None if starts is None else starts.to(x.device, non_blocking=True)
        begin = (zeros, None, zeros) if starts is None else (here, starts, here)
        befores = zip(*state, strict=True) if state else itertools.repeat(begin, len(self.blocks))
        way = grad_cp if torch.is_grad_enabled() else "none"
        for block, before in zip(self.blocks, befores, strict=True):
            if way == "none":
                out = block(x, v_first, *before, op)
            elif way == "selective":
                out = checkpoint(block, x, v_first, *before, op, use_reentrant=False, preserve_rng_state=False,
                                 context_fn=_keep_wkv)
            else:
                out = recomputed(block, x, v_first, *before, op=op)
            x, v_first = out[:2]
            after += [out[2:]] if keep_state else []
        return self.ln_out(x), State(*map(torch.stack, zip(*after, strict=True))) if keep_state else None

    def forward(self, tokens: Tensor, state: State | None = None, *, op="auto") -> tuple[Tensor, State]:
        """tokens int64 [B,T] → logits [B,T,V], state."""
        x, state = self.hidden(tokens, state, op=op)
        return self.head(x), state
