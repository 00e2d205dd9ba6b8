// WKV-6 on CPUs; WKV-5 is WKV-6 with one row w for all steps. Per head, with own_t = Σ_k u r_t k_t:
//   y_t = S_{t-1} r_t + own_t v_t;   S_t = S_{t-1} diag(d_t) + v_t k_tᵀ.
//
// Backward, with G_t the gradient at S_t:  G_{t-1} = G_t diag(d_t) + dy_t r_tᵀ.
// Once forward in time, over key tiles, to have S at the start of every chunk; then chunk by chunk back in time:
//   values  G over value tiles, for dv = G k + own dy
//   recall  S of the chunk over key tiles, computed again (never divided back: a decay may be 0), for dr = S_{t-1}ᵀ dy
//   keys    G over key tiles, for dk = Gᵀ v and dd = Σ_v G ⊙ S_{t-1}
// and, with vdy = v·dy, the rest of dr = u k vdy, of dk = u r vdy, and du = Σ_t r k vdy. Nothing is kept from forward.
#include "wkv_tiles.h"
#include <ATen/Functions.h>
#include <torch/library.h>
#include <tuple>
#include <utility>

namespace rwkv_nb {
namespace {

using at::Tensor;

struct Inputs {
  Sequence r, w, k, v;
  Tensor u;
  int64_t B, T, H, N, tiles;
  OptTensor state;

  Inputs(const Tensor& r, const Tensor& w, const Tensor& k, const Tensor& v, const Tensor& u, const OptTensor& s)
      : r(r), w(w.dim() == 2 ? w.contiguous().expand(r.sizes()) : w), k(k), v(v),
        u(u.to(at::kFloat).contiguous()), B(r.size(0)), T(r.size(1)), H(r.size(2)), N(r.size(3)), tiles(tiles_of(N)),
        state(s ? OptTensor(s->contiguous()) : s) {}

  void load_u(Tiles& to, int64_t bh) const {
    const float* from = u.const_data_ptr<float>() + bh % H * N;
    std::copy(from, from + N, reinterpret_cast<float*>(to.data()));
  }
};

// One step of a value tile, forward or back in time:  out = Σ_k X·rho + own·u;   X = X·decay + u·kappa
void step(Tile* X, int64_t N, const float* decay, const float* kappa, const float* rho, float own, const Tile& u,
          Tile& out) {
  const Tile u0 = u;
  Tile sum;
  for (int i = 0; i < 2; ++i) sum.x[i] = u0.x[i] * own;
  for (int64_t k = 0; k < N; ++k)
    for (int i = 0; i < 2; ++i) {
      const Vec x = X[k].x[i];
      sum.x[i] += x * rho[k];
      X[k].x[i] = x * decay[k] + u0.x[i] * kappa[k];
    }
  out = sum;
}

float total(Tile x) {
  float sum = 0;
  for (int l = 0; l < LANES; ++l) sum += x.x[0][l] + x.x[1][l];
  return sum;
}

struct ForwardArgs { const Inputs& in; Sequence y; Tensor last; };

struct Forward {
  const ForwardArgs& to;
  const Inputs& in;
  int64_t N;
  Rows d, k, r, v, y;
  Tiles S, u;

  explicit Forward(const ForwardArgs& args)
      : to(args), in(args.in), N(in.N), d(in.tiles), k(in.tiles), r(in.tiles), v(in.tiles), y(in.tiles),
        S(in.tiles * N), u(in.tiles) {}

  void run(int64_t bh, int64_t first, int64_t last) {
    load_values(S, head_of(in.state, bh, N), N, first, last);
    in.load_u(u, bh);
    for (int64_t t0 = 0; t0 < in.T; t0 += CHUNK) chunk(bh, t0, std::min<int64_t>(CHUNK, in.T - t0), first, last);
    store_values(to.last.mutable_data_ptr<float>() + bh * N * N, S, N, first, last);
  }

  void chunk(int64_t bh, int64_t t0, int64_t steps, int64_t first, int64_t last) {
    const int64_t next = t0 + CHUNK;
    in.w.load(d, bh, t0, steps, next, 0, in.tiles);
    to_decay(d, d, steps, 0, in.tiles);
    in.k.load(k, bh, t0, steps, next, 0, in.tiles);
    in.r.load(r, bh, t0, steps, next, 0, in.tiles);
    in.v.load(v, bh, t0, steps, next, first, last);
    float own[CHUNK];
    for (int64_t t = 0; t < steps; ++t) own[t] = dot(u, r, k, t);
    for (int64_t j = first; j < last; ++j)
      for (int64_t t = 0; t < steps; ++t) step(&S[j * N], N, d[t], k[t], r[t], own[t], v.tile(t, j), y.tile(t, j));
    to.y.store(y, bh, t0, steps, next, first, last);
  }

  // Σ u a b of step t.
  static float dot(const Tiles& u, Rows& a, Rows& b, int64_t t) {
    Tile sum;
    for (int64_t j = 0; j < a.tiles; ++j)
      for (int i = 0; i < 2; ++i) sum.x[i] += u[j].x[i] * a.tile(t, j).x[i] * b.tile(t, j).x[i];
    return total(sum);
  }
};

struct BackwardArgs {
  const Inputs& in;
  std::optional<Sequence> dy;
  OptTensor dlast;
  Sequence dr, dk, dv;
  std::optional<Sequence> dw;  // of each step, or
  Tensor sum_w, sum_u;         // [B,H,N], sums over the steps
  Tensor dstate;               // empty where no state was given
};

struct Backward {
  const BackwardArgs& to;
  const Inputs& in;
  int64_t N, chunks;
  Rows r, w, d, k, v, dy, dr, dw, dk, dv;
  Tiles S, past;             // key tiles: the state at the start of every chunk, after every step of one chunk
  Tiles GK, GV;              // G as key tiles and as value tiles
  Tiles u, sum_w, sum_u;
  float own[CHUNK], vdy[CHUNK];

  explicit Backward(const BackwardArgs& args)
      : to(args), in(args.in), N(in.N), chunks((in.T + CHUNK - 1) / CHUNK), r(in.tiles), w(in.tiles), d(in.tiles),
        k(in.tiles), v(in.tiles), dy(in.tiles), dr(in.tiles), dw(in.tiles), dk(in.tiles), dv(in.tiles),
        S(chunks * in.tiles * N), past(CHUNK * N), GK(in.tiles * N), GV(in.tiles * N), u(in.tiles), sum_w(in.tiles),
        sum_u(in.tiles) {}

  // The gradients of r, w, k, u and the state for keys, and of v for values, of tiles first..last.
  void run(int64_t bh, int64_t first, int64_t last) {
    load_keys(S, head_of(in.state, bh, N), N, first, last);
    for (int64_t c = 0; c + 1 < chunks; ++c) {
      load(bh, c, c + 1, first, last);
      for (int64_t j = first; j < last; ++j)
        for (int64_t t = 0; t < CHUNK; ++t)
          advance(j, t, t ? start(j, c + 1) : start(j, c), start(j, c + 1));
    }
    load_keys(GK, head_of(to.dlast, bh, N), N, first, last);
    load_values(GV, head_of(to.dlast, bh, N), N, first, last);
    in.load_u(u, bh);
    std::fill(sum_w.begin(), sum_w.end(), Tile());
    std::fill(sum_u.begin(), sum_u.end(), Tile());
    for (int64_t c = chunks - 1; c >= 0; --c) chunk(bh, c, first, last);
    const int64_t from = first * TILE, n = std::min(last * TILE, N);
    for (auto [out, sum] : {std::pair(&to.sum_w, &sum_w), {&to.sum_u, &sum_u}})
      std::copy(floats(*sum) + from, floats(*sum) + n, out->mutable_data_ptr<float>() + bh * N + from);
    if (in.state) store_keys(to.dstate.mutable_data_ptr<float>() + bh * N * N, GK, N, first, last);
  }

  static const float* floats(const Tiles& x) { return reinterpret_cast<const float*>(x.data()); }
  int64_t steps(int64_t c) const { return std::min<int64_t>(CHUNK, in.T - c * CHUNK); }
  Tile* start(int64_t j, int64_t c) { return &S[(c * in.tiles + j) * N]; }
  const Tile* before(int64_t j, int64_t c, int64_t t) { return t ? &past[(t - 1) * N] : start(j, c); }

  // What the state needs, for keys of tiles first..last.
  void load(int64_t bh, int64_t c, int64_t next, int64_t first, int64_t last) {
    const int64_t t0 = c * CHUNK, n = steps(c), t1 = next * CHUNK;
    in.w.load(w, bh, t0, n, t1, first, last);
    to_decay(d, w, n, first, last);
    in.k.load(k, bh, t0, n, t1, first, last);
    in.v.load(v, bh, t0, n, t1, 0, in.tiles);
  }

  void chunk(int64_t bh, int64_t c, int64_t first, int64_t last) {
    const int64_t t0 = c * CHUNK, n = steps(c), t1 = t0 - CHUNK;
    load(bh, c, c - 1, 0, in.tiles);
    in.r.load(r, bh, t0, n, t1, 0, in.tiles);
    if (to.dy) to.dy->load(dy, bh, t0, n, t1, 0, in.tiles);
    for (int64_t t = 0; t < n; ++t) {
      Tile sum_own, sum_vdy;
      for (int64_t j = 0; j < in.tiles; ++j)
        for (int i = 0; i < 2; ++i) {
          sum_own.x[i] += u[j].x[i] * r.tile(t, j).x[i] * k.tile(t, j).x[i];
          sum_vdy.x[i] += v.tile(t, j).x[i] * dy.tile(t, j).x[i];
        }
      own[t] = total(sum_own), vdy[t] = total(sum_vdy);
    }
    for (int64_t j = first; j < last; ++j) {
      for (int64_t t = n - 1; t >= 0; --t)  // forward's recurrence with the roles exchanged
        step(&GV[j * N], N, d[t], r[t], k[t], own[t], dy.tile(t, j), dv.tile(t, j));
      recall(j, c, n);
      keys(j, c, n);
    }
    for (auto [out, rows] : {std::pair(&to.dr, &dr), {&to.dk, &dk}, {&to.dv, &dv}})
      out->store(*rows, bh, t0, n, t1, first, last);
    if (to.dw) to.dw->store(dw, bh, t0, n, t1, first, last);
  }

  // One step of the state of a key tile.
  void advance(int64_t j, int64_t t, const Tile* X, Tile* next) {
    const Tile d0 = d.tile(t, j), k0 = k.tile(t, j);
    const float* vt = v[t];
    for (int64_t n = 0; n < N; ++n)
      for (int i = 0; i < 2; ++i) next[n].x[i] = X[n].x[i] * d0.x[i] + k0.x[i] * vt[n];
  }

  // The states of chunk c once more, for dr.
  void recall(int64_t j, int64_t c, int64_t steps) {
    for (int64_t t = 0; t < steps; ++t) {
      const Tile *X = before(j, c, t), d0 = d.tile(t, j), k0 = k.tile(t, j);
      const float *vt = v[t], *dyt = dy[t];
      Tile* next = &past[t * N];
      Tile sum;
      for (int64_t n = 0; n < N; ++n)
        for (int i = 0; i < 2; ++i) {
          sum.x[i] += X[n].x[i] * dyt[n];
          next[n].x[i] = X[n].x[i] * d0.x[i] + k0.x[i] * vt[n];
        }
      for (int i = 0; i < 2; ++i) dr.tile(t, j).x[i] = sum.x[i] + u[j].x[i] * k0.x[i] * vdy[t];
    }
  }

  // Back in time over a key tile.
  void keys(int64_t j, int64_t c, int64_t steps) {
    Tile* G = &GK[j * N];
    Tile chunk_w, chunk_u;
    for (int64_t t = steps - 1; t >= 0; --t) {
      const Tile *X = before(j, c, t), d0 = d.tile(t, j), r0 = r.tile(t, j), k0 = k.tile(t, j);
      const float *vt = v[t], *dyt = dy[t];
      Tile sum_k, sum_d;
      for (int64_t n = 0; n < N; ++n)
        for (int i = 0; i < 2; ++i) {
          const Vec g = G[n].x[i];
          sum_k.x[i] += g * vt[n];
          sum_d.x[i] += g * X[n].x[i];
          G[n].x[i] = g * d0.x[i] + r0.x[i] * dyt[n];
        }
      for (int i = 0; i < 2; ++i) {
        dk.tile(t, j).x[i] = sum_k.x[i] + u[j].x[i] * r0.x[i] * vdy[t];
        dw.tile(t, j).x[i] = -sum_d.x[i] * d0.x[i] * w.tile(t, j).x[i];
        chunk_w.x[i] += dw.tile(t, j).x[i];
        chunk_u.x[i] += r0.x[i] * k0.x[i] * vdy[t];
      }
    }
    for (int i = 0; i < 2; ++i) sum_w[j].x[i] += chunk_w.x[i], sum_u[j].x[i] += chunk_u.x[i];
  }
};

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& r, const Tensor& w, const Tensor& k, const Tensor& v,
                                           const Tensor& u, const OptTensor& state, bool) {
  const Inputs in(r, w, k, v, u, state);
  const auto fp32 = r.options().dtype(at::kFloat);
  Tensor y = at::empty(r.sizes(), r.options()), last = at::empty({in.B, in.H, in.N, in.N}, fp32);
  for_heads<Forward>(in.B * in.H, in.tiles, ForwardArgs{in, Sequence(y), last});
  return {y, last, at::empty({in.B, 0, in.H, in.N}, fp32)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& r, const Tensor& w, const Tensor& k, const Tensor& v, const Tensor& u, const OptTensor& state,
    const Tensor& saved, const OptTensor& dy, const OptTensor& dlast) {
  const Inputs in(r, w, k, v, u, state);
  const auto like = [&](const Tensor& x) { return at::empty(x.sizes(), x.options()); };
  const auto sum = [&] { return at::empty({in.B, in.H, in.N}, saved.options()); };
  Tensor dr = like(r), dw = like(w), dk = like(k), dv = like(v);
  Tensor dstate = at::empty({state ? in.B : 0, in.H, in.N, in.N}, saved.options());
  const BackwardArgs args{in, dy ? std::optional(Sequence(*dy)) : std::nullopt,
                          dlast ? OptTensor(dlast->contiguous()) : dlast, Sequence(dr), Sequence(dk), Sequence(dv),
                          w.dim() == 2 ? std::nullopt : std::optional(Sequence(dw)), sum(), sum(), dstate};
  for_heads<Backward>(in.B * in.H, in.tiles, args);
  if (w.dim() == 2) dw = args.sum_w.sum(0).to(w.scalar_type());
  return {dr, dw, dk, dv, args.sum_u.sum(0).to(u.scalar_type()), dstate};
}

TORCH_LIBRARY_FRAGMENT(rwkv_nb, m) {
  for (const std::string name : {"wkv6", "wkv5"}) {
    m.def(torch::schema((name + "(Tensor r, Tensor w, Tensor k, Tensor v, Tensor u, Tensor? state, bool save) -> "
          "(Tensor y, Tensor state, Tensor saved)").c_str()));
    m.def(torch::schema((name + "_backward(Tensor r, Tensor w, Tensor k, Tensor v, Tensor u, Tensor? state, Tensor saved, "
          "Tensor? dy, Tensor? dstate) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)").c_str()));
  }
}

TORCH_LIBRARY_IMPL(rwkv_nb, CPU, m) {
  for (const std::string name : {"wkv6", "wkv5"}) {
    m.impl(name.c_str(), forward);
    m.impl((name + "_backward").c_str(), backward);
  }
}

}  // namespace
}  // namespace rwkv_nb
