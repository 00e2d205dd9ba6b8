// The three recurrences on CPUs as one; DELTA: WKV-7. Per head, with d = exp(-exp(w)):
//   q_t = S_{t-1} a_t
//   S_t = S_{t-1} diag(d_t) + v_t k_tᵀ     WKV-7: + q_t b_tᵀ
//   WKV-7: y_t = S_t r_t     WKV-6: a is r; y_t = q_t + own_t v_t, own_t = Σ_k u r_t k_t
//   WKV-5: WKV-6 with one w for all steps
// In WKV-6 no key's row of a value tile needs another's: ROWS of them stay in registers for a whole chunk.
#pragma once
#include "wkv_tiles.h"

namespace rwkv_nb {
using at::Tensor;

struct Inputs {
  Sequence r, w, k, v, a, b;  // WKV-6: a is r, and b is not read
  Tensor u;                   // WKV-6: float [H,N]
  OptTensor state;
  int64_t B, T, H, N, tiles, rows;

  Inputs(const Tensor& r, const Tensor& w, const Tensor& k, const Tensor& v, const Tensor& a, const Tensor& b,
         const Tensor& u, const OptTensor& state)
      : r(r), w(w.dim() == 2 ? w.contiguous().expand(r.sizes()) : w), k(k), v(v), a(a), b(b), u(u),
        state(state ? OptTensor(state->contiguous()) : state), B(r.size(0)), T(r.size(1)), H(r.size(2)), N(r.size(3)),
        tiles(tiles_of(N)), rows(rows_of(N)) {}

  void load_u(Tiles& to, int64_t bh) const {
    const float* from = u.const_data_ptr<float>() + bh % H * N;
    std::copy(from, from + N, floats(to));
  }
};

// WKV-7, one step of a value tile, forward or back in time:
//   X = X·decay + p·beta + u·kappa;   out = Σ_k X·rho;   p = Σ_k X·alpha, for the next step
inline void step(Tile* X, int64_t rows, const float* decay, const float* beta, const float* kappa, const float* rho,
          const float* alpha, Tile& p, const Tile& u, Tile& out) {
  const Tile p0 = p, u0 = u;
  Tile sum, next;
  for (int64_t k = 0; k < rows; ++k) {
    const Vec d = lanes(decay[k]), b = lanes(beta[k]), c = lanes(kappa[k]), r = lanes(rho[k]), a = lanes(alpha[k]);
    for (int i = 0; i < 2; ++i) {
      const Vec x = X[k].x[i] * d + p0.x[i] * b + u0.x[i] * c;
      X[k].x[i] = x;
      sum.x[i] += x * r;
      next.x[i] += x * a;
    }
  }
  p = next, out = sum;
}

// WKV-6, keys k..k+ROWS of value tile j through a chunk, forward (by = 1) or back (-1) in time:
//   out = Σ_k X·rho + own·u;   X = X·decay + u·kappa
inline void sweep(Tile* X, int64_t k, int64_t j, int64_t steps, int64_t by, Rows& decay, Rows& kappa, Rows& rho,
                  const float* own, Rows& u, Rows& out) {
  Block x(X + k);
  for (int64_t s = 0, t = by > 0 ? 0 : steps - 1; s < steps; ++s, t += by) {
    const Tile u0 = u.tile(t, j);
    const float *d = decay[t] + k, *kap = kappa[t] + k, *rh = rho[t] + k;
    Tile sum = k ? out.tile(t, j) : Tile();
    if (!k)
      for (int i = 0; i < 2; ++i) sum.x[i] = u0.x[i] * own[t];
#pragma GCC unroll 4
    for (int n = 0; n < ROWS; ++n) {
      const Vec dn = lanes(d[n]), kn = lanes(kap[n]), rn = lanes(rh[n]);
#pragma GCC unroll 2
      for (int i = 0; i < 2; ++i) {
        sum.x[i] += x.x[n][i] * rn;
        x.x[n][i] = x.x[n][i] * dn + u0.x[i] * kn;
      }
    }
    out.tile(t, j) = sum;
  }
  x.store(X + k);
}

struct ForwardArgs { const Inputs& in; Sequence y; Tensor last; std::optional<Sequence> q; };

template <bool DELTA>
struct Forward {
  const ForwardArgs& to;
  const Inputs& in = to.in;
  const int64_t tiles = in.tiles;
  Rows d{tiles}, k{tiles}, b{tiles}, r{tiles}, a{tiles}, v{tiles}, y{tiles}, q{tiles};
  Tiles S = Tiles(tiles * in.rows), next_q = Tiles(tiles), u = Tiles(tiles);
  std::vector<const Sequence*> wanted{&in.w, &in.k, &in.v, &in.a, &to.y};

  explicit Forward(const ForwardArgs& args) : to(args) {
    if (DELTA) wanted.insert(wanted.end(), {&in.b, &in.r});
    if (DELTA && to.q) wanted.push_back(&*to.q);
  }

  void run(int64_t bh, int64_t first, int64_t last) {
    load_values(S, head_of(in.state, bh, in.N), in.N, first, last);
    if constexpr (DELTA) {
      in.a.load(a, bh, 0, 1, 0, tiles);
      for (int64_t j = first; j < last; ++j) {
        next_q[j] = Tile();
        for (int64_t k = 0; k < in.rows; ++k)
          for (int i = 0; i < 2; ++i) next_q[j].x[i] += S[j * in.rows + k].x[i] * a[0][k];
      }
    } else {
      in.load_u(u, bh);
    }
    for (int64_t t0 = 0; t0 < in.T; t0 += CHUNK) chunk(bh, t0, std::min<int64_t>(CHUNK, in.T - t0), first, last);
    store_values(to.last.mutable_data_ptr<float>() + bh * in.N * in.N, S, in.N, first, last);
  }

  void chunk(int64_t bh, int64_t t0, int64_t steps, int64_t first, int64_t last) {
    in.w.load(d, bh, t0, steps, 0, tiles);
    to_decay(d, d, steps, 0, tiles);
    in.k.load(k, bh, t0, steps, 0, tiles);
    in.v.load(v, bh, t0, steps, first, last);
    in.a.load(a, bh, t0 + DELTA, steps, 0, tiles);
    if constexpr (DELTA) {
      in.b.load(b, bh, t0, steps, 0, tiles);
      in.r.load(r, bh, t0, steps, 0, tiles);
      for (int64_t j = first; j < last; ++j)
        for (int64_t t = 0; t < steps; ++t) {
          q.tile(t, j) = next_q[j];
          step(&S[j * in.rows], in.rows, d[t], b[t], k[t], r[t], a[t], next_q[j], v.tile(t, j), y.tile(t, j));
          ask(wanted, bh, t0 + CHUNK, (j - first) * steps + t, (last - first) * steps, 1);
        }
      if (to.q) to.q->store(q, bh, t0, steps, first, last);
    } else {
      float own[CHUNK];
      for (int64_t t = 0; t < steps; ++t) own[t] = dot(t, a, k, &u);
      for (int64_t j = first; j < last; ++j)
        for (int64_t n = 0; n < in.rows; n += ROWS) {
          sweep(&S[j * in.rows], n, j, steps, 1, d, k, a, own, v, y);
          ask(wanted, bh, t0 + CHUNK, (j - first) * in.rows + n, (last - first) * in.rows, ROWS);
        }
    }
    to.y.store(y, bh, t0, steps, first, last);
  }
};

}  // namespace rwkv_nb
