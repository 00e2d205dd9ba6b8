"""RWKV-7 (x070): parameter names are the checkpoint's keys.

One forward serves as training form (a whole sequence) and as RNN form (token by token from a state).
Source: Peng et al. 2025, "RWKV-7 Goose with Expressive Dynamic State Evolution", arXiv 2503.14456.
Axes: B batch, T time, C channels, H heads, N head size, V vocabulary, L layers, R rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..wkv import wkv7
from .pointwise import squared_relu, token_shift
from .shape import Shape


class State(NamedTuple):
    """All that the model remembers of a text."""

    att_x: Tensor  # [L, B, C] last input of each time mix
    wkv: Tensor    # [L, B, H, N, N] fp32, value channels by key channels
    ffn_x: Tensor  # [L, B, C] last input of each channel mix


def _vector(n: int, device, dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(1, 1, n, device=device, dtype=dtype))


class TimeMix(nn.Module):
    """Attention's place: receptance, decay, key, value, in-context learning rate (a) and gate around WKV-7."""

    def __init__(self, shape: Shape, layer: int, **on):
        super().__init__()
        C, H, N = shape.n_embd, shape.n_head, shape.head_size
        self.layer, self.head_size = layer, N
        for c in "rwkvag":
            self.register_parameter(f"x_{c}", _vector(C, **on))
        ranks = {"w": shape.rank_w, "a": shape.rank_a, "v": shape.rank_v if layer else shape.rank_v_layer0}
        for c, R in ranks.items():
            if R:
                self.register_parameter(f"{c}0", _vector(C, **on))
                self.register_parameter(f"{c}1", nn.Parameter(torch.empty(C, R, **on)))
                self.register_parameter(f"{c}2", nn.Parameter(torch.empty(R, C, **on)))
        self.g1 = nn.Parameter(torch.empty(C, shape.rank_g, **on))
        self.g2 = nn.Parameter(torch.empty(shape.rank_g, C, **on))
        self.k_k, self.k_a = _vector(C, **on), _vector(C, **on)
        self.r_k = nn.Parameter(torch.empty(H, N, **on))
        self.receptance = nn.Linear(C, C, bias=False, **on)
        self.key = nn.Linear(C, C, bias=False, **on)
        self.value = nn.Linear(C, C, bias=False, **on)
        self.output = nn.Linear(C, C, bias=False, **on)
        self.ln_x = nn.GroupNorm(H, C, eps=64e-5, **on)  # the published eps: 1e-5 times the squared divisor 8

    def forward(self, x, v_first, last_x, state, op):
        """x [B,T,C], v_first [B,T,C] of block 0 (None there), last_x [B,C], state [B,H,N,N] or None.

        Returns output [B,T,C], v_first, state.
        """
        xr, xw, xk, xv, xa, xg = token_shift(x, last_x, self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g)
        r, k, v = self.receptance(xr), self.key(xk), self.value(xv)
        # decay = exp(-exp(w)), w ≤ -0.5; worked out in fp32, where a slow decay keeps its digits
        w = F.logsigmoid((self.w0 + torch.tanh(xw @ self.w1) @ self.w2).float()) - 0.5
        a = torch.sigmoid(self.a0 + (xa @ self.a1) @ self.a2)
        g = torch.sigmoid(xg @ self.g1) @ self.g2
        if self.layer == 0:
            v_first = v
        else:
            v = torch.lerp(v, v_first, torch.sigmoid(self.v0 + (xv @ self.v1) @ self.v2))

        heads = "B T (H N) -> B T H N"
        kk = F.normalize(rearrange(k * self.k_k, heads, N=self.head_size), dim=-1)
        k = k * torch.addcmul(1 - self.k_a, a, self.k_a)
        r, w, k, v, a = (rearrange(t, heads, N=self.head_size) for t in (r, w.to(x.dtype), k, v, a))
        y, state = wkv7(r, w, k, v, -kk, kk * a, state, op=op)

        # ln_x: a group norm over each head is a layer norm over its channels, which runs several times faster
        weight, bias = (rearrange(p, "(H N) -> H N", N=self.head_size) for p in (self.ln_x.weight, self.ln_x.bias))
        y = torch.addcmul(bias, F.layer_norm(y, (self.head_size,), eps=self.ln_x.eps), weight)
        y = torch.addcmul(y, (r * k * self.r_k).sum(-1, keepdim=True), v)
        return self.output(rearrange(y, "B T H N -> B T (H N)") * g), v_first, state


class ChannelMix(nn.Module):
    """The feed-forward layer: squared ReLU."""

    def __init__(self, shape: Shape, **on):
        super().__init__()
        self.x_k = _vector(shape.n_embd, **on)
        self.key = nn.Linear(shape.n_embd, shape.ffn_dim, bias=False, **on)
        self.value = nn.Linear(shape.ffn_dim, shape.n_embd, bias=False, **on)

    def forward(self, x, last_x):
        """x [B,T,C], last_x [B,C] → [B,T,C]"""
        (xk,) = token_shift(x, last_x, self.x_k)
        return self.value(squared_relu(self.key(xk)))


class Block(nn.Module):
    """Time mix and channel mix, each behind a layer norm and beside a residual."""

    def __init__(self, shape: Shape, layer: int, **on):
        super().__init__()
        self.ln1 = nn.LayerNorm(shape.n_embd, **on)
        self.ln2 = nn.LayerNorm(shape.n_embd, **on)
        if layer == 0:
            self.ln0 = nn.LayerNorm(shape.n_embd, **on)
        self.att = TimeMix(shape, layer, **on)
        self.ffn = ChannelMix(shape, **on)

    def forward(self, x, v_first, att_x, wkv, ffn_x, op):
        """x [B,T,C] and this layer's part of a State → x, v_first and the new part of the State."""
        if self.att.layer == 0:
            x = self.ln0(x)
        z = self.ln1(x)
        y, v_first, wkv = self.att(z, v_first, att_x, wkv, op)
        x, att_x = x + y, z[:, -1]
        z = self.ln2(x)
        return x + self.ffn(z, ffn_x), v_first, att_x, wkv, z[:, -1]


class RWKV7(nn.Module):
    """The whole model. Parameters are empty until loaded (model.checkpoint) or initialised (model.init)."""

    def __init__(self, shape: Shape, device=None, dtype=None):
        super().__init__()
        on = {"device": device, "dtype": dtype}
        self.shape = shape
        self.emb = nn.Embedding(shape.vocab_size, shape.n_embd, _weight=torch.empty(
            shape.vocab_size, shape.n_embd, **on))
        self.blocks = nn.ModuleList(Block(shape, i, **on) for i in range(shape.n_layer))
        self.ln_out = nn.LayerNorm(shape.n_embd, **on)
        self.head = nn.Linear(shape.n_embd, shape.vocab_size, bias=False, **on)

    def zero_state(self, batch: int) -> State:
        """The state before any text, for B = batch."""
        s, weight = self.shape, self.emb.weight
        x = weight.new_zeros(s.n_layer, batch, s.n_embd)
        wkv = torch.zeros(s.n_layer, batch, s.n_head, s.head_size, s.head_size, device=weight.device)
        return State(x, wkv, x)

    def hidden(self, tokens: Tensor, state: State | None = None, *, op="auto", grad_cp=False) -> tuple[Tensor, State]:
        """tokens int64 [B,T] → hidden [B,T,C] behind ln_out, and the state after the last token.

        state None starts a text. grad_cp recomputes each block in backward (Chen et al. 2016, arXiv 1604.06174).
        """
        x, v_first = self.emb(tokens), None
        state = state or self.zero_state(tokens.shape[0])
        after = []
        for block, *before in zip(self.blocks, *state, strict=True):
            if grad_cp and torch.is_grad_enabled():
                out = checkpoint(block, x, v_first, *before, op, use_reentrant=False, preserve_rng_state=False)
            else:
                out = block(x, v_first, *before, op)
            x, v_first = out[:2]
            after.append(out[2:])
        return self.ln_out(x), State(*(torch.stack(part) for part in zip(*after, strict=True)))

    def forward(self, tokens: Tensor, state: State | None = None, *, op="auto") -> tuple[Tensor, State]:
        """tokens int64 [B,T] → logits [B,T,V], state."""
        x, state = self.hidden(tokens, state, op=op)
        return self.head(x), state
