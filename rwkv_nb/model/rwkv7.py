"""RWKV-7 (x070): time mix and channel mix.

Source: Peng et al. 2025, "RWKV-7 Goose with Expressive Dynamic State Evolution", arXiv 2503.14456.
Axes: B batch, T time, C channels, H heads, N head size.
"""

import torch
import torch.nn.functional as F

from ..wkv import wkv7
from .parts import Part, of_squared_relu
from .pointwise import gated_norm, token_shift, wkv7_inputs


class TimeMix(Part):
    """Attention's place: receptance, decay, key, value, in-context learning rate (a) and gate around WKV-7."""

    def forward(self, x, v_first, last_x, state, op):
        """x [B,T,C], v_first [B,T,C] of block 0 (None there), last_x [B,C], state [B,H,N,N] or None.

        Returns output [B,T,C], v_first, state.
        """
        xr, xw, xk, xv, xa, xg = token_shift(x, last_x, self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g)
        r, k, v = self.receptance(xr), self.key(xk), self.value(xv)
        decay = F.linear(torch.tanh(xw @ self.w1), self.w2.mT, self.w0.flatten())
        rate = F.linear(xa @ self.a1, self.a2.mT, self.a0.flatten())
        gate = torch.sigmoid(xg @ self.g1) @ self.g2
        mix = None if v_first is None else F.linear(xv @ self.v1, self.v2.mT, self.v0.flatten())

        w, key, value, kk, minus = wkv7_inputs(decay, rate, k, v, mix, v_first, self.k_k, self.k_a, self.n_head)
        v_first, (r,) = v if v_first is None else v_first, self.heads(r)
        y, state = wkv7(r, w, key, value, kk, minus, state, op=op)
        return self.output(gated_norm(y, gate, self.ln_x, (r, key, value, self.r_k))), v_first, state


class ChannelMix(Part):
    """The feed-forward layer: squared ReLU."""

    def forward(self, x, last_x):
        """x [B,T,C], last_x [B,C] → [B,T,C]"""
        (xk,) = token_shift(x, last_x, self.x_k)
        return of_squared_relu(self.value, self.key(xk))
