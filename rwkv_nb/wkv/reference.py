"""WKV-7 in plain PyTorch: the per-step definition, and a chunked form of the same sum.

Per head, with the state S [V,K] (value channels down, key channels across):

    sa_t = S_{t-1} a_t
    S_t  = S_{t-1} diag(d_t) + sa_t b_tᵀ + v_t k_tᵀ        d_t = exp(-exp(w_t))
    y_t  = S_t r_t

Both take r, w, k, v, a, b [B,T,H,N] of any floating dtype, state [B,H,N,N] or None (zeros), and return
y [B,T,H,N] in r's dtype and the last state in float32 (float64 for float64 inputs). Arithmetic is float32
(float64). autograd differentiates them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange

CHUNK = 16


def wkv7_steps(r, w, k, v, a, b, state=None):
    """The definition, one step at a time. Shapes and dtypes: see the module."""
    S, inputs = _prepare(state, r, w, k, v, a, b)
    inputs[1] = torch.exp(-torch.exp(inputs[1]))
    y = []
    for r_t, d_t, k_t, v_t, a_t, b_t in zip(*(x.unbind(1) for x in inputs), strict=True):  # (B, H, N) each
        sa = S @ a_t[..., None]                                                             # (B, H, V, 1)
        S = S * d_t[..., None, :] + sa * b_t[..., None, :] + v_t[..., None] * k_t[..., None, :]
        y.append(S @ r_t[..., None])
    return rearrange(y, "T B H V 1 -> B T H V").to(r.dtype), S


def wkv7_chunked(r, w, k, v, a, b, state=None):
    """The same in chunks of 16 steps: matrix products inside a chunk, the state carried from chunk to chunk.

    Every sa_t of a chunk is a linear function of the state before the chunk and of the sa_j before it (j < t),
    so they are one unit-triangular solve: U = (I - A_ab)⁻¹ (ã S₀ᵀ + A_ak V). Shapes and dtypes: see the module.
    """
    T, dtype = r.shape[1], r.dtype
    L = min(CHUNK, T)
    S, inputs = _prepare(state, r, w, k, v, a, b)
    # Below exp(-81) a decay is 0 in float32; the bound keeps every exponent here finite, in value and gradient.
    inputs[1] = -torch.exp(inputs[1].clamp(max=4.4))
    # Padding is a step with log-decay 0 and nothing added: it leaves the state alone.
    inputs = [F.pad(x, (0, 0, 0, 0, 0, -T % L)) for x in inputs]
    r, logd, k, v, a, b = (rearrange(x, "B (n L) H N -> B H n L N", L=L) for x in inputs)

    c = logd.double().cumsum(-2)             # log-decay from the chunk's start through step t
    before = c - logd                        # ... to just before step t
    middle, last = c[..., L // 2, None, :], c[..., -1:, :]
    # Σ_n x_i e^(c_i - c_j) z_j as one product of two factors. In float64, and centred, neither factor overflows
    # however strong the decay; above the diagonal the product may, and is cut away.
    queries = torch.cat([a * (before - middle).exp(), r * (c - middle).exp()], -2)
    keys = torch.cat([b, k], -2) * torch.cat([middle - c] * 2, -2).exp()
    scores = rearrange(queries @ keys.mT, "... (q i) (z j) -> q z ... i j", q=2, z=2)
    (A_ab, A_ak), (A_rb, A_rk) = scores[0].tril(-1).to(v.dtype), scores[1].tril().to(v.dtype)

    decayed = [(a * before.exp()).to(v.dtype), A_ak @ v]
    W, P = torch.linalg.solve_triangular(-A_ab, torch.cat(decayed, -1), upper=False, unitriangular=True).chunk(2, -1)
    to_end = (last - c).exp()
    b_end, k_end = (b * to_end).to(v.dtype), (k * to_end).to(v.dtype)
    through, added = last.exp().to(v.dtype), v.mT @ k_end
    U, starts = [], []
    for n in range(r.shape[2]):
        starts.append(S)
        U.append(W[:, :, n] @ S.mT + P[:, :, n])
        S = S * through[:, :, n] + U[-1].mT @ b_end[:, :, n] + added[:, :, n]
    U, starts = torch.stack(U, 2), torch.stack(starts, 2)
    y = (r * c.exp()).to(v.dtype) @ starts.mT + A_rb @ U + A_rk @ v
    return rearrange(y, "B H n L N -> B (n L) H N")[:, :T].to(dtype), S


def _prepare(state, *inputs):
    """The state (zeros for None) and the inputs, all in float32, or float64 where r is float64."""
    B, _, H, N = inputs[0].shape
    dtype = torch.float64 if inputs[0].dtype == torch.float64 else torch.float32
    if state is None:
        state = torch.zeros(B, H, N, N, dtype=dtype, device=inputs[0].device)
    return state.to(dtype), [x.to(dtype) for x in inputs]
