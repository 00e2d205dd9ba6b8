"""The three recurrences in plain PyTorch: each one's per-step definition, and a chunked form of the same sum.

Per head, with the state S [V,K] (value channels down, key channels across) and d_t = exp(-exp(w_t)):

    WKV-7   sa_t = S_{t-1} a_t
            S_t  = S_{t-1} diag(d_t) + sa_t b_tᵀ + v_t k_tᵀ
            y_t  = S_t r_t
    WKV-6   y_t  = S_{t-1} r_t + v_t (u ⊙ k_t)ᵀ r_t
            S_t  = S_{t-1} diag(d_t) + v_t k_tᵀ
    WKV-5   the same with one w for all steps

All take r, k, v (a, b) [B,T,H,N], w like them (WKV-5: [H,N]), u [H,N], each of any floating dtype, state [B,H,N,N]
or None (zeros), and return y [B,T,H,N] in r's dtype and the last state in float32 (float64 for float64 r).
Arithmetic is float32 (float64). Nothing is divided by a decay, which may be 0. autograd differentiates them.
"""

import torch
import torch.nn.functional as F
from einops import rearrange

CHUNK = 16


def wkv7_steps(r, w, k, v, a, b, state=None):
    """WKV-7's definition, one step at a time. Shapes and dtypes: see the module."""
    S, inputs = _prepare(state, r, w, k, v, a, b)
    inputs[1] = torch.exp(-torch.exp(inputs[1]))
    y = []
    for r_t, d_t, k_t, v_t, a_t, b_t in zip(*(x.unbind(1) for x in inputs), strict=True):  # (B, H, N) each
        sa = S @ a_t[..., None]                                                             # (B, H, V, 1)
        S = S * d_t[..., None, :] + sa * b_t[..., None, :] + v_t[..., None] * k_t[..., None, :]
        y.append(S @ r_t[..., None])
    return rearrange(y, "T B H V 1 -> B T H V").to(r.dtype), S


def wkv6_steps(r, w, k, v, u, state=None):
    """WKV-6's definition, one step at a time. Shapes and dtypes: see the module."""
    S, (R, w, K, V, u) = _prepare(state, r, w, k, v, u)
    d, y = torch.exp(-torch.exp(w)), []
    for r_t, d_t, k_t, v_t in zip(*(x.unbind(1) for x in (R, d, K, V)), strict=True):
        y.append(S @ r_t[..., None])
        S = S * d_t[..., None, :] + v_t[..., None] * k_t[..., None, :]
    y = rearrange(y, "T B H V 1 -> B T H V") + V * (R * u * K).sum(-1, keepdim=True)
    return y.to(r.dtype), S


def wkv5_steps(r, w, k, v, u, state=None):
    """WKV-5's definition, one step at a time. Shapes and dtypes: see the module."""
    return wkv6_steps(r, at_every_step(w, r), k, v, u, state)


def wkv7_chunked(r, w, k, v, a, b, state=None):
    """The same in chunks of 16 steps: matrix products inside a chunk, the state carried from chunk to chunk.

    Every sa_t of a chunk is a linear function of the state before the chunk and of the sa_j before it (j < t),
    so they are one unit-triangular solve: U = (I - A_ab)⁻¹ (ã S₀ᵀ + A_ak V). Shapes and dtypes: see the module.
    """
    T, dtype = r.shape[1], r.dtype
    S, inputs = _prepare(state, r, w, k, v, a, b)
    r, logd, k, v, a, b = _chunks(*inputs)
    c, before, middle, last = _sums(logd)
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


def wkv6_chunked(r, w, k, v, u, state=None):
    """The same in chunks of 16 steps, as of WKV-7; a step's own k vᵀ counts by u. Shapes and dtypes: see the module."""
    T, dtype = r.shape[1], r.dtype
    S, (*inputs, u) = _prepare(state, r, w, k, v, u)
    r, logd, k, v = _chunks(*inputs)
    c, before, middle, last = _sums(logd)
    A = ((r * (before - middle).exp()) @ (k * (middle - c).exp()).mT).tril(-1).to(v.dtype)
    own = (r * k * rearrange(u, "H N -> H 1 1 N")).sum(-1, keepdim=True)
    through, added = last.exp().to(v.dtype), v.mT @ (k * (last - c).exp()).to(v.dtype)
    starts = []
    for n in range(r.shape[2]):
        starts.append(S)
        S = S * through[:, :, n] + added[:, :, n]
    y = (r * before.exp()).to(v.dtype) @ torch.stack(starts, 2).mT + A @ v + own * v
    return rearrange(y, "B H n L N -> B (n L) H N")[:, :T].to(dtype), S


def wkv5_chunked(r, w, k, v, u, state=None):
    """The same in chunks of 16 steps, by WKV-6. Shapes and dtypes: see the module."""
    return wkv6_chunked(r, at_every_step(w, r), k, v, u, state)


def at_every_step(w, like):
    """WKV-5's w [H,N] seen as [B,T,H,N], in float32 at least: its gradient, a sum over B and T, is rounded once."""
    return w.to(torch.promote_types(w.dtype, torch.float32)).expand(like.shape)


def _prepare(state, *inputs):
    """The state (zeros for None) and the inputs, all in float32, or float64 where r is float64."""
    B, _, H, N = inputs[0].shape
    dtype = torch.float64 if inputs[0].dtype == torch.float64 else torch.float32
    if state is None:
        state = torch.zeros(B, H, N, N, dtype=dtype, device=inputs[0].device)
    return state.to(dtype), [x.to(dtype) for x in inputs]


def log_decay(w):
    """-exp(w). Below exp(-81) a decay is 0 in float32; the bound keeps sums of them finite, in value and gradient."""
    return -torch.exp(w.clamp(max=4.4))


def _chunks(r, w, *others):
    """r, the log-decay (float64: its gradients are sums that cancel) and the others as [B,H,n,L,N], L steps a chunk."""
    L = min(CHUNK, r.shape[1])
    inputs = r, log_decay(w).double(), *others
    # Padding is a step with log-decay 0 and nothing added: it leaves the state alone.
    return [rearrange(F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % L)), "B (n L) H N -> B H n L N", L=L) for x in inputs]


def _sums(logd):
    """Log-decays from the chunk's start: through each step, to just before it, to the middle and through the last.

    Σ_n x_i e^(c_i - c_j) z_j is one product of two factors, x e^(c - middle) and z e^(middle - c). In float64, and
    centred, neither overflows however strong the decay; above the diagonal the product may, and is cut away.
    """
    c = logd.cumsum(-2)
    return c, c - logd, c[..., (c.shape[-2] - 1) // 2, None, :], c[..., -1:, :]
