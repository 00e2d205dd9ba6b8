"""RWKV-6 (x060): time mix and channel mix.

Source: Peng et al. 2024, "Eagle and Finch: RWKV with Matrix-Valued States and Dynamic Recurrence", arXiv 2404.05892.
Axes: B batch, T time, C channels, H heads, N head size, R rank, M the five mixes w k v r g.
"""

import torch
import torch.nn.functional as F
from einops import rearrange

from ..wkv import wkv6
from .parts import Part, of_squared_relu
from .pointwise import gated_norm, token_shift


class TimeMix(Part):
    """Attention's place: receptance, decay, key, value and gate around WKV-6."""

    wkv = staticmethod(wkv6)

    def forward(self, x, v_first, last_x, state, op):
        """x [B,T,C], last_x [B,C], state [B,H,N,N] or None → output [B,T,C], v_first as it came, state."""
        xr, xk, xv, xg, w = self.inputs(x, last_x)
        r, k, v = self.heads(self.receptance(xr), self.key(xk), self.value(xv))
        y, state = self.wkv(r, w, k, v, self.time_faaaa, state, op=op)
        return self.output(gated_norm(y, self.gate(xg), self.ln_x)), v_first, state

    def inputs(self, x, last_x):
        """What receptance, key, value and gate read, [B,T,C] each, and the raw decay [B,T,H,N].

        How far each channel looks back a token follows from the text itself, through a narrow layer.
        """
        (xx,) = token_shift(x, last_x, self.time_maa_x)
        narrow = rearrange(torch.tanh(xx @ self.time_maa_w1), "B T (M R) -> M (B T) R", M=5)
        fixed = torch.cat([self.time_maa_w, self.time_maa_k, self.time_maa_v, self.time_maa_r, self.time_maa_g])
        mixes = torch.baddbmm(fixed, narrow, self.time_maa_w2)
        xw, xk, xv, xr, xg = token_shift(x, last_x, *rearrange(mixes, "M (B T) C -> M B T C", B=x.shape[0]))
        w, = self.heads(F.linear(torch.tanh(xw @ self.time_decay_w1), self.time_decay_w2.mT, self.time_decay.flatten()))
        return xr, xk, xv, xg, w


class ChannelMix(Part):
    """The feed-forward layer: squared ReLU behind a gate of its own (receptance)."""

    def forward(self, x, last_x):
        """x [B,T,C], last_x [B,C] → [B,T,C]"""
        xk, xr = token_shift(x, last_x, *self.mixes())
        return torch.sigmoid(self.receptance(xr)) * of_squared_relu(self.value, self.key(xk))

    def mixes(self):
        """How much of the token before key and receptance see, [1,1,C] each."""
        return self.time_maa_k, self.time_maa_r
