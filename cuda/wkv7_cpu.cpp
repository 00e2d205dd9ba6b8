// WKV-7 on CPUs. Per head:  sa_t = S_{t-1} a_t;  S_t = S_{t-1} diag(d_t) + sa_t b_tᵀ + v_t k_tᵀ;  y_t = S_t r_t.
//
// Backward, with G_t the gradient at S_t, gb_t = G_t b_t:  G_t = G_{t+1} diag(d_{t+1}) + gb_{t+1} a_{t+1}ᵀ + dy_t r_tᵀ.
// Once forward in time, over key tiles, to have S at the start of every chunk; then chunk by chunk back in time:
//   values  G over value tiles, for gb and dv = G k
//   recall  S of the chunk over key tiles, computed again (never divided back, so that any decay is exact), for
//           dr = S_tᵀ dy and da = S_{t-1}ᵀ gb
//   keys    G over key tiles, for dk = Gᵀ v, db = Gᵀ sa and dd = Σ_v G ⊙ S_{t-1}
// Only sa, one row a step, is kept between forward and backward.
#include "wkv_tiles.h"
#include <ATen/ops/empty.h>
#include <torch/library.h>
#include <tuple>
#include <utility>

namespace rwkv_nb {
namespace {

using at::Tensor;

struct Inputs {
  Sequence r, w, k, v, a, b;
  int64_t B, T, H, N, tiles;
  OptTensor state;

  Inputs(const Tensor& r, const Tensor& w, const Tensor& k, const Tensor& v, const Tensor& a, const Tensor& b,
         const OptTensor& s)
      : r(r), w(w), k(k), v(v), a(a), b(b), B(r.size(0)), T(r.size(1)), H(r.size(2)), N(r.size(3)),
        tiles(tiles_of(N)), state(s ? OptTensor(s->contiguous()) : s) {}
};

// One step of a value tile, forward or backward in time:
//   X = X·decay + p·beta + u·kappa;   out = Σ_k X·rho;   p = Σ_k X·alpha, for the next step
void step(Tile* X, int64_t N, const float* decay, const float* beta, const float* kappa, const float* rho,
          const float* alpha, Tile& p, const Tile& u, Tile& out) {
  const Tile p0 = p, u0 = u;
  Tile sum, next;
  for (int64_t k = 0; k < N; ++k)
    for (int i = 0; i < 2; ++i) {
      const Vec x = X[k].x[i] * decay[k] + p0.x[i] * beta[k] + u0.x[i] * kappa[k];
      X[k].x[i] = x;
      sum.x[i] += x * rho[k];
      next.x[i] += x * alpha[k];
    }
  p = next, out = sum;
}

struct ForwardArgs { const Inputs& in; Sequence y; Tensor last; std::optional<Sequence> sa; };

struct Forward {
  const ForwardArgs& to;
  const Inputs& in;
  int64_t N;
  Rows d, k, b, r, a, v, y, sas;
  Tiles S, sa;

  explicit Forward(const ForwardArgs& args)
      : to(args), in(args.in), N(in.N), d(in.tiles), k(in.tiles), b(in.tiles), r(in.tiles), a(in.tiles), v(in.tiles),
        y(in.tiles), sas(in.tiles), S(in.tiles * N), sa(in.tiles) {}

  void run(int64_t bh, int64_t first, int64_t last) {
    load_values(S, head_of(in.state, bh, N), N, first, last);
    in.a.load(a, bh, 0, 1, 1, 0, in.tiles);
    for (int64_t j = first; j < last; ++j) {
      sa[j] = Tile();
      for (int64_t k = 0; k < N; ++k)
        for (int i = 0; i < 2; ++i) sa[j].x[i] += S[j * N + k].x[i] * a[0][k];
    }
    for (int64_t t0 = 0; t0 < in.T; t0 += CHUNK) chunk(bh, t0, std::min<int64_t>(CHUNK, in.T - t0), first, last);
    store_values(to.last.mutable_data_ptr<float>() + bh * N * N, S, N, first, last);
  }

  void chunk(int64_t bh, int64_t t0, int64_t steps, int64_t first, int64_t last) {
    const int64_t next = t0 + CHUNK;
    in.w.load(d, bh, t0, steps, next, 0, in.tiles);
    to_decay(d, d, steps, 0, in.tiles);
    in.k.load(k, bh, t0, steps, next, 0, in.tiles);
    in.b.load(b, bh, t0, steps, next, 0, in.tiles);
    in.r.load(r, bh, t0, steps, next, 0, in.tiles);
    in.a.load(a, bh, t0 + 1, steps, next + 1, 0, in.tiles);
    in.v.load(v, bh, t0, steps, next, first, last);
    for (int64_t j = first; j < last; ++j)
      for (int64_t t = 0; t < steps; ++t) {
        sas.tile(t, j) = sa[j];
        step(&S[j * N], N, d[t], b[t], k[t], r[t], a[t], sa[j], v.tile(t, j), y.tile(t, j));
      }
    to.y.store(y, bh, t0, steps, next, first, last);
    if (to.sa) to.sa->store(sas, bh, t0, steps, next, first, last);
  }
};

struct BackwardArgs {
  const Inputs& in;
  std::optional<Sequence> dy;
  OptTensor dlast;
  Sequence sa, dr, dw, dk, dv, da, db;
  Tensor dstate;  // empty where no state was given
};

struct Backward {
  const BackwardArgs& to;
  const Inputs& in;
  int64_t N, chunks;
  Rows r, w, d, k, v, a, b, sa, dy, dr, dw, dk, dv, da, db, gb;
  Tiles S, past;         // key tiles: the state at the start of every chunk, after every step of one chunk
  Tiles GK, GV, p;       // G as key tiles and as value tiles; gb of the step worked on
  Tiles d_next, a_next;  // d and a of the step after the chunk

  explicit Backward(const BackwardArgs& args)
      : to(args), in(args.in), N(in.N), chunks((in.T + CHUNK - 1) / CHUNK), r(in.tiles), w(in.tiles), d(in.tiles),
        k(in.tiles), v(in.tiles), a(in.tiles), b(in.tiles), sa(in.tiles), dy(in.tiles), dr(in.tiles), dw(in.tiles),
        dk(in.tiles), dv(in.tiles), da(in.tiles), db(in.tiles), gb(in.tiles), S(chunks * in.tiles * N),
        past(CHUNK * N), GK(in.tiles * N), GV(in.tiles * N), p(in.tiles), d_next(in.tiles), a_next(in.tiles) {}

  // The gradients of r, w, k, a, b and the state for keys, and of v for values, of tiles first..last. What the keys
  // need of the values, gb, takes all tiles of the values: a quarter of the work, done again in each part.
  void run(int64_t bh, int64_t first, int64_t last) {
    load_keys(S, head_of(in.state, bh, N), N, first, last);
    for (int64_t c = 0; c + 1 < chunks; ++c) {
      load(bh, c, c + 1, first, last);
      for (int64_t j = first; j < last; ++j)
        for (int64_t t = 0; t < CHUNK; ++t)
          advance(j, t, t ? start(j, c + 1) : start(j, c), start(j, c + 1));
    }
    load_keys(GK, head_of(to.dlast, bh, N), N, first, last);
    load_values(GV, head_of(to.dlast, bh, N), N, 0, in.tiles);
    for (int64_t j = 0; j < in.tiles; ++j)
      for (int i = 0; i < 2; ++i) p[j].x[i] = a_next[j].x[i] = Vec{}, d_next[j].x[i] = Vec{} + 1.0f;
    for (int64_t c = chunks - 1; c >= 0; --c) chunk(bh, c, first, last);
    if (in.state) store_keys(to.dstate.mutable_data_ptr<float>() + bh * N * N, GK, N, first, last);
  }

  int64_t steps(int64_t c) const { return std::min<int64_t>(CHUNK, in.T - c * CHUNK); }
  Tile* start(int64_t j, int64_t c) { return &S[(c * in.tiles + j) * N]; }

  // What the state needs, for keys of tiles first..last.
  void load(int64_t bh, int64_t c, int64_t next, int64_t first, int64_t last) {
    const int64_t t0 = c * CHUNK, n = steps(c), t1 = next * CHUNK;
    in.w.load(w, bh, t0, n, t1, first, last);
    to_decay(d, w, n, first, last);
    in.k.load(k, bh, t0, n, t1, first, last);
    in.b.load(b, bh, t0, n, t1, first, last);
    in.v.load(v, bh, t0, n, t1, 0, in.tiles);
    to.sa.load(sa, bh, t0, n, t1, 0, in.tiles);
  }

  void chunk(int64_t bh, int64_t c, int64_t first, int64_t last) {
    const int64_t t0 = c * CHUNK, n = steps(c), t1 = t0 - CHUNK;
    load(bh, c, c - 1, 0, in.tiles);
    in.a.load(a, bh, t0, n, t1, 0, in.tiles);
    in.r.load(r, bh, t0, n, t1, 0, in.tiles);
    if (to.dy) to.dy->load(dy, bh, t0, n, t1, 0, in.tiles);
    for (int64_t j = 0; j < in.tiles; ++j) values(j, n);
    std::copy(&d.tile(0, 0), &d.tile(0, 0) + in.tiles, d_next.begin());
    std::copy(&a.tile(0, 0), &a.tile(0, 0) + in.tiles, a_next.begin());
    for (int64_t j = first; j < last; ++j) {
      recall(j, c, n);
      keys(j, c, n);
    }
    for (auto [out, rows] : {std::pair(&to.dr, &dr), {&to.dw, &dw}, {&to.dk, &dk}, {&to.dv, &dv}, {&to.da, &da},
                             {&to.db, &db}})
      out->store(*rows, bh, t0, n, t1, first, last);
  }

  // Back in time over a value tile: forward's recurrence with the roles exchanged.
  void values(int64_t j, int64_t n) {
    for (int64_t t = n - 1; t >= 0; --t) {
      const float* decay = t + 1 < n ? d[t + 1] : reinterpret_cast<float*>(d_next.data());
      const float* beta = t + 1 < n ? a[t + 1] : reinterpret_cast<float*>(a_next.data());
      step(&GV[j * N], N, decay, beta, r[t], k[t], b[t], p[j], dy.tile(t, j), dv.tile(t, j));
      gb.tile(t, j) = p[j];
    }
  }

  // One step of the state of a key tile.
  void advance(int64_t j, int64_t t, const Tile* X, Tile* next) {
    const Tile d0 = d.tile(t, j), b0 = b.tile(t, j), k0 = k.tile(t, j);
    const float *vt = v[t], *sat = sa[t];
    for (int64_t n = 0; n < N; ++n)
      for (int i = 0; i < 2; ++i) next[n].x[i] = X[n].x[i] * d0.x[i] + b0.x[i] * sat[n] + k0.x[i] * vt[n];
  }

  // The states of chunk c once more, for dr and da.
  void recall(int64_t j, int64_t c, int64_t steps) {
    for (int64_t t = 0; t < steps; ++t) {
      const Tile *X = before(j, c, t), d0 = d.tile(t, j), b0 = b.tile(t, j), k0 = k.tile(t, j);
      const float *vt = v[t], *sat = sa[t], *gbt = gb[t], *dyt = dy[t];
      Tile* next = &past[t * N];
      Tile sum_r, sum_a;
      for (int64_t n = 0; n < N; ++n)
        for (int i = 0; i < 2; ++i) {
          const Vec s = X[n].x[i] * d0.x[i] + b0.x[i] * sat[n] + k0.x[i] * vt[n];
          sum_a.x[i] += X[n].x[i] * gbt[n];
          sum_r.x[i] += s * dyt[n];
          next[n].x[i] = s;
        }
      dr.tile(t, j) = sum_r, da.tile(t, j) = sum_a;
    }
  }

  const Tile* before(int64_t j, int64_t c, int64_t t) { return t ? &past[(t - 1) * N] : start(j, c); }

  // Back in time over a key tile.
  void keys(int64_t j, int64_t c, int64_t steps) {
    Tile* G = &GK[j * N];
    for (int64_t t = steps - 1; t >= 0; --t) {
      const Tile *X = before(j, c, t), d0 = d.tile(t, j), a0 = a.tile(t, j), r0 = r.tile(t, j);
      const float *vt = v[t], *sat = sa[t], *gbt = gb[t], *dyt = dy[t];
      Tile sum_k, sum_b, sum_d;
      for (int64_t n = 0; n < N; ++n)
        for (int i = 0; i < 2; ++i) {
          const Vec g = G[n].x[i] + r0.x[i] * dyt[n];
          sum_k.x[i] += g * vt[n];
          sum_b.x[i] += g * sat[n];
          sum_d.x[i] += g * X[n].x[i];
          G[n].x[i] = g * d0.x[i] + a0.x[i] * gbt[n];
        }
      dk.tile(t, j) = sum_k, db.tile(t, j) = sum_b;
      for (int i = 0; i < 2; ++i) dw.tile(t, j).x[i] = -sum_d.x[i] * d0.x[i] * w.tile(t, j).x[i];
    }
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
  Tensor dr = like(r), dw = like(w), dk = like(k), dv = like(v), da = like(a), db = like(b);
  Tensor dstate = at::empty({state ? in.B : 0, in.H, in.N, in.N}, sa.options());
  const BackwardArgs args{in, dy ? std::optional(Sequence(*dy)) : std::nullopt,
                          dlast ? OptTensor(dlast->contiguous()) : dlast, Sequence(sa), Sequence(dr), Sequence(dw),
                          Sequence(dk), Sequence(dv), Sequence(da), Sequence(db), dstate};
  for_heads<Backward>(in.B * in.H, in.tiles, args);
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
