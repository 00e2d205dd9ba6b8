// WKV-7 on CPUs. Per head:  sa_t = S_{t-1} a_t;  S_t = S_{t-1} diag(d_t) + sa_t b_tᵀ + v_t k_tᵀ;  y_t = S_t r_t.
//
// Backward, with G_t the gradient at S_t:  G_t = G_{t+1} diag(d_{t+1}) + (G_{t+1} b_{t+1}) a_{t+1}ᵀ + dy_t r_tᵀ.
//   Values: back in time over value tiles. It is forward's recurrence with the roles exchanged, and gives dv = G k
//     and gb = G b.
//   Keys: given sa and gb, over key tiles. Forward in time for dr = S_tᵀ dy and da = S_{t-1}ᵀ gb, remembering S
//     every CHUNK steps; then chunk by chunk back in time, S computed again (never divided back, so that any decay
//     is exact), for dk = Gᵀ v, db = Gᵀ sa, dd = Σ_v G ⊙ S_{t-1}.
// Only sa, one row a step, is kept between forward and backward.
#include "wkv_tiles.h"
#include <ATen/ops/empty.h>
#include <torch/library.h>
#include <optional>
#include <tuple>

namespace rwkv_nb {
namespace {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

struct Inputs {
  Sequence r, w, k, v, a, b;
  int64_t B, T, H, N, tiles;
  OptTensor state;

  Inputs(const Tensor& r, const Tensor& w, const Tensor& k, const Tensor& v, const Tensor& a, const Tensor& b,
         const OptTensor& s)
      : r(r), w(w), k(k), v(v), a(a), b(b), B(r.size(0)), T(r.size(1)), H(r.size(2)), N(r.size(3)),
        tiles(tiles_of(N)), state(s ? OptTensor(s->contiguous()) : s) {}
};

const float* head_of(const OptTensor& state, int64_t bh, int64_t N) {
  return state ? state->const_data_ptr<float>() + bh * N * N : nullptr;
}

// One step of a value tile, forward or backward in time:
//   X = X·decay + p·beta + u·kappa;   out = Σ_k X·rho;   p = Σ_k X·alpha, for the next step
Tile step(Tile* X, int64_t N, const float* decay, const float* beta, const float* kappa, const float* rho,
          const float* alpha, Tile& p, const Tile& u) {
  const Tile p0 = p, u0 = u;
  Tile out, next;
  for (int64_t k = 0; k < N; ++k)
    for (int i = 0; i < 2; ++i) {
      const Vec x = X[k].x[i] * decay[k] + p0.x[i] * beta[k] + u0.x[i] * kappa[k];
      X[k].x[i] = x;
      out.x[i] += x * rho[k];
      next.x[i] += x * alpha[k];
    }
  p = next;
  return out;
}

struct ForwardArgs { const Inputs& in; Sequence y; Tensor last; std::optional<Sequence> sa; };

struct Forward {
  const ForwardArgs& to;
  const Inputs& in;
  int64_t N;
  Rows w, k, b, r, a, v, y, sas;
  Tiles S, sa;

  explicit Forward(const ForwardArgs& args)
      : to(args), in(args.in), N(in.N), w(in.tiles), k(in.tiles), b(in.tiles), r(in.tiles), a(in.tiles), v(in.tiles),
        y(in.tiles), sas(in.tiles), S(in.tiles * N), sa(in.tiles) {}

  void run(int64_t bh, int64_t first, int64_t last) {
    load_values(S, head_of(in.state, bh, N), N, first, last);
    in.a.load(a, bh, 0, 1, 0, in.tiles);
    for (int64_t j = first; j < last; ++j) {
      sa[j] = Tile();
      for (int64_t k = 0; k < N; ++k)
        for (int i = 0; i < 2; ++i) sa[j].x[i] += S[j * N + k].x[i] * a[0][k];
    }
    for (int64_t t0 = 0; t0 < in.T; t0 += CHUNK) chunk(bh, t0, std::min<int64_t>(CHUNK, in.T - t0), first, last);
    store_values(to.last.mutable_data_ptr<float>() + bh * N * N, S, N, first, last);
  }

  void chunk(int64_t bh, int64_t t0, int64_t steps, int64_t first, int64_t last) {
    in.w.load(w, bh, t0, steps, 0, in.tiles);
    w.to_decay(steps);
    in.k.load(k, bh, t0, steps, 0, in.tiles);
    in.b.load(b, bh, t0, steps, 0, in.tiles);
    in.r.load(r, bh, t0, steps, 0, in.tiles);
    in.v.load(v, bh, t0, steps, first, last);
    in.a.load(a, bh, t0 + 1, steps, 0, in.tiles);
    for (int64_t j = first; j < last; ++j)
      for (int64_t t = 0; t < steps; ++t) {
        sas.tile(t, j - first) = sa[j];
        y.tile(t, j - first) = step(&S[j * N], N, w[t], b[t], k[t], r[t], a[t], sa[j], v.tile(t, j - first));
      }
    to.y.store(y, bh, t0, steps, first, last);
    if (to.sa) to.sa->store(sas, bh, t0, steps, first, last);
  }
};

struct BackwardArgs {
  const Inputs& in;
  std::optional<Sequence> dy;
  OptTensor dlast;
  Sequence sa, gb, dr, dw, dk, dv, da, db;
  Tensor dstate;  // empty where no state was given
};

struct BackwardValues {
  const BackwardArgs& to;
  const Inputs& in;
  int64_t N;
  Rows w, a, r, k, b, dy, dv, gbs;
  Tiles G, gb;

  explicit BackwardValues(const BackwardArgs& args)
      : to(args), in(args.in), N(in.N), w(in.tiles), a(in.tiles), r(in.tiles), k(in.tiles), b(in.tiles), dy(in.tiles),
        dv(in.tiles), gbs(in.tiles), G(in.tiles * N), gb(in.tiles) {}

  void run(int64_t bh, int64_t first, int64_t last) {
    load_values(G, head_of(to.dlast, bh, N), N, first, last);
    std::fill(gb.begin(), gb.end(), Tile());
    for (int64_t t0 = (in.T - 1) / CHUNK * CHUNK; t0 >= 0; t0 -= CHUNK)
      chunk(bh, t0, std::min<int64_t>(CHUNK, in.T - t0), first, last);
    if (in.state) first_state(bh, first, last);
  }

  void chunk(int64_t bh, int64_t t0, int64_t steps, int64_t first, int64_t last) {
    in.w.load(w, bh, t0 + 1, steps, 0, in.tiles, -87);  // behind the end the decay is 1
    w.to_decay(steps);
    in.a.load(a, bh, t0 + 1, steps, 0, in.tiles);
    in.r.load(r, bh, t0, steps, 0, in.tiles);
    in.k.load(k, bh, t0, steps, 0, in.tiles);
    in.b.load(b, bh, t0, steps, 0, in.tiles);
    if (to.dy) to.dy->load(dy, bh, t0, steps, first, last);
    for (int64_t j = first; j < last; ++j)
      for (int64_t t = steps - 1; t >= 0; --t) {
        dv.tile(t, j - first) = step(&G[j * N], N, w[t], a[t], r[t], k[t], b[t], gb[j], dy.tile(t, j - first));
        gbs.tile(t, j - first) = gb[j];
      }
    to.dv.store(dv, bh, t0, steps, first, last);
    to.gb.store(gbs, bh, t0, steps, first, last);
  }

  void first_state(int64_t bh, int64_t first, int64_t last) {
    in.w.load(w, bh, 0, 1, 0, in.tiles);
    w.to_decay(1);
    in.a.load(a, bh, 0, 1, 0, in.tiles);
    for (int64_t j = first; j < last; ++j)
      for (int64_t k = 0; k < N; ++k)
        for (int i = 0; i < 2; ++i) {
          Vec& g = G[j * N + k].x[i];
          g = g * w[0][k] + gb[j].x[i] * a[0][k];
        }
    store_values(to.dstate.mutable_data_ptr<float>() + bh * N * N, G, N, first, last);
  }
};

struct BackwardKeys {
  const BackwardArgs& to;
  const Inputs& in;
  int64_t N, chunks;
  Rows w{1}, d{1}, k{1}, b{1}, a{1}, r{1}, dr{1}, dw{1}, dk{1}, da{1}, db{1};  // one tile wide
  Rows v, sa, gb, dy;
  Tiles S, G, starts, past;

  explicit BackwardKeys(const BackwardArgs& args)
      : to(args), in(args.in), N(in.N), chunks((in.T + CHUNK - 1) / CHUNK), v(in.tiles), sa(in.tiles), gb(in.tiles),
        dy(in.tiles), S(N), G(N), starts(chunks * N), past(CHUNK * N) {}

  void run(int64_t bh, int64_t first, int64_t last) {
    for (int64_t j = first; j < last; ++j) {
      load_keys(S, head_of(in.state, bh, N), N, j);
      load_keys(G, head_of(to.dlast, bh, N), N, j);
      for (int64_t c = 0; c < chunks; ++c) remember(bh, j, c, steps_of(c));
      for (int64_t c = chunks - 1; c >= 0; --c) back(bh, j, c, steps_of(c));
    }
  }

  int64_t steps_of(int64_t c) const { return std::min<int64_t>(CHUNK, in.T - c * CHUNK); }

  void load(int64_t bh, int64_t j, int64_t t0, int64_t steps) {
    in.w.load(w, bh, t0, steps, j, j + 1);
    in.k.load(k, bh, t0, steps, j, j + 1);
    in.b.load(b, bh, t0, steps, j, j + 1);
    in.v.load(v, bh, t0, steps, 0, in.tiles);
    to.sa.load(sa, bh, t0, steps, 0, in.tiles);
    to.gb.load(gb, bh, t0, steps, 0, in.tiles);
    if (to.dy) to.dy->load(dy, bh, t0, steps, 0, in.tiles);
    std::copy(w.data.begin(), w.data.begin() + steps, d.data.begin());
    d.to_decay(steps);
  }

  // Forward in time through one chunk.
  void remember(int64_t bh, int64_t j, int64_t c, int64_t steps) {
    std::copy(S.begin(), S.end(), starts.begin() + c * N);
    load(bh, j, c * CHUNK, steps);
    for (int64_t t = 0; t < steps; ++t) {
      const Tile d0 = d.tile(t), b0 = b.tile(t), k0 = k.tile(t);
      const float *vt = v[t], *sat = sa[t], *gbt = gb[t], *dyt = dy[t];
      Tile sum_r, sum_a;
      for (int64_t n = 0; n < N; ++n)
        for (int i = 0; i < 2; ++i) {
          const Vec before = S[n].x[i];
          const Vec s = before * d0.x[i] + b0.x[i] * sat[n] + k0.x[i] * vt[n];
          sum_a.x[i] += before * gbt[n];
          sum_r.x[i] += s * dyt[n];
          S[n].x[i] = s;
        }
      dr.tile(t) = sum_r, da.tile(t) = sum_a;
    }
    to.dr.store(dr, bh, c * CHUNK, steps, j, j + 1);
    to.da.store(da, bh, c * CHUNK, steps, j, j + 1);
  }

  // past[t] = the state before step t of a chunk
  void recall(int64_t c, int64_t steps) {
    std::copy(starts.begin() + c * N, starts.begin() + (c + 1) * N, past.begin());
    for (int64_t t = 0; t + 1 < steps; ++t) {
      const Tile d0 = d.tile(t), b0 = b.tile(t), k0 = k.tile(t);
      const float *vt = v[t], *sat = sa[t];
      const Tile* X = &past[t * N];
      Tile* next = &past[(t + 1) * N];
      for (int64_t n = 0; n < N; ++n)
        for (int i = 0; i < 2; ++i) next[n].x[i] = X[n].x[i] * d0.x[i] + b0.x[i] * sat[n] + k0.x[i] * vt[n];
    }
  }

  // Back in time through one chunk.
  void back(int64_t bh, int64_t j, int64_t c, int64_t steps) {
    load(bh, j, c * CHUNK, steps);
    in.a.load(a, bh, c * CHUNK, steps, j, j + 1);
    in.r.load(r, bh, c * CHUNK, steps, j, j + 1);
    recall(c, steps);
    for (int64_t t = steps - 1; t >= 0; --t) {
      const Tile d0 = d.tile(t), a0 = a.tile(t), r0 = r.tile(t);
      const float *vt = v[t], *sat = sa[t], *gbt = gb[t], *dyt = dy[t];
      const Tile* X = &past[t * N];
      Tile sum_k, sum_b, sum_d;
      for (int64_t n = 0; n < N; ++n)
        for (int i = 0; i < 2; ++i) {
          const Vec g = G[n].x[i] + r0.x[i] * dyt[n];
          sum_k.x[i] += g * vt[n];
          sum_b.x[i] += g * sat[n];
          sum_d.x[i] += g * X[n].x[i];
          G[n].x[i] = g * d0.x[i] + a0.x[i] * gbt[n];
        }
      dk.tile(t) = sum_k, db.tile(t) = sum_b;
      for (int i = 0; i < 2; ++i) dw.tile(t).x[i] = -sum_d.x[i] * d0.x[i] * decay_rate(w.tile(t).x[i]);
    }
    to.dk.store(dk, bh, c * CHUNK, steps, j, j + 1);
    to.db.store(db, bh, c * CHUNK, steps, j, j + 1);
    to.dw.store(dw, bh, c * CHUNK, steps, j, j + 1);
  }
};

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& r, const Tensor& w, const Tensor& k, const Tensor& v,
                                           const Tensor& a, const Tensor& b, const OptTensor& state, bool save) {
  const Inputs in(r, w, k, v, a, b, state);
  const auto fp32 = r.options().dtype(at::kFloat);
  Tensor y = at::empty(r.sizes(), r.options()), last = at::empty({in.B, in.H, in.N, in.N}, fp32);
  Tensor sa = at::empty({in.B, save ? in.T : 0, in.H, in.N}, fp32);
  const ForwardArgs args{in, Sequence(y), last, save ? std::optional(Sequence(sa)) : std::nullopt};
  for_heads<Forward>(in.B * in.H, in.tiles, args);
  return {y, last, sa};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& r, const Tensor& w, const Tensor& k, const Tensor& v, const Tensor& a, const Tensor& b,
    const OptTensor& state, const Tensor& sa, const OptTensor& dy, const OptTensor& dlast) {
  const Inputs in(r, w, k, v, a, b, state);
  const auto like = [&](const Tensor& x) { return at::empty(r.sizes(), x.options()); };
  Tensor dr = like(r), dw = like(w), dk = like(k), dv = like(v), da = like(a), db = like(b), gb = like(sa);
  Tensor dstate = at::empty({state ? in.B : 0, in.H, in.N, in.N}, sa.options());
  const BackwardArgs args{in, dy ? std::optional(Sequence(*dy)) : std::nullopt,
                          dlast ? OptTensor(dlast->contiguous()) : dlast, Sequence(sa), Sequence(gb), Sequence(dr),
                          Sequence(dw), Sequence(dk), Sequence(dv), Sequence(da), Sequence(db), dstate};
  for_heads<BackwardValues>(in.B * in.H, in.tiles, args);
  for_heads<BackwardKeys>(in.B * in.H, in.tiles, args);
  return {dr, dw, dk, dv, da, db, dstate};
}

TORCH_LIBRARY_FRAGMENT(rwkv_nb, m) {
  m.def("wkv7(Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor b, Tensor? state, bool save) -> "
        "(Tensor y, Tensor state, Tensor sa)");
  m.def("wkv7_backward(Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor b, Tensor? state, Tensor sa, "
        "Tensor? dy, Tensor? dstate) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(rwkv_nb, CPU, m) {
  m.impl("wkv7", forward);
  m.impl("wkv7_backward", backward);
}

}  // namespace
}  // namespace rwkv_nb
