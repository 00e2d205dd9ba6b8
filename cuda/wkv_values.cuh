// The pass over rows of the state: forward, and the values' side of backward. See wkv_gpu.cu.
#pragma once
#include "wkv_gpu.cuh"

namespace rwkv_nb {

// One pass over rows of the state. Forward: in = v, out = y, extra = sa, from the first state to the last one. BACK in
// time: in = dy, out = dv, extra = gb, from the last state's gradient to the first one's. save: states, or null.
template <typename Real, typename Decay, int LANES, int EACH, bool DELTA, bool BACK>
__global__ void __launch_bounds__(THREADS, EACH == 1 ? 4 : sizeof(Decay) == 2 ? CROWD : 3)
values(Inputs<Real, Decay> x, const Real* in, const float* from, Real* out, float* extra, float* to, float* save) {
  constexpr int SPAN = THREADS / LANES * EACH, COUNT = N / LANES, MORE = DELTA ? STEPS : 1;
  __shared__ __align__(16) float rs[STEPS][N], ms[STEPS][N], ks[STEPS][N], as[MORE][N], bs[MORE][N];
  __shared__ __align__(16) float ins[STEPS][SPAN], outs[STEPS][SPAN], extras[MORE][SPAN], us[N];

  const Part<SPAN> part(x);
  const Spot<LANES> spot;
  const int64_t T = x.T, chunks = (T + STEPS - 1) / STEPS, base = part.base, rows = base + part.first;
  const int mine = spot.place * EACH;

  Rows<Real, N> next_r, next_k, next_a, next_b;
  Rows<Decay, N> next_w;
  Rows<Real, SPAN> next_in;
  const auto fetch = [&](int64_t t0) {
    next_r.fetch(x.r + base, part.stride, t0, T);
    next_w.fetch(x.w + part.w, x.w_stride, t0, T, -INFINITY);  // a step that does not exist changes nothing
    next_k.fetch(x.k + base, part.stride, t0, T);
    if (DELTA) next_a.fetch(x.a + base, part.stride, t0, T), next_b.fetch(x.b + base, part.stride, t0, T);
    next_in.fetch(in ? in + rows : nullptr, part.stride, t0, T);
  };
  const auto flush = [&](int64_t t0) {
    Rows<Real, SPAN>::flush(outs[0], out ? out + rows : nullptr, part.stride, t0, T);
    if (DELTA) Rows<float, SPAN>::flush(extras[0], extra ? extra + rows : nullptr, part.stride, t0, T);
  };

  float X[EACH][COUNT];
  const auto states = [&](const auto& move) {  // move(memory's place for four numbers of a head's state, these four)
#pragma unroll
    for (int e = 0; e < EACH; ++e)
#pragma unroll
      for (int c = 0; c < COUNT; c += 4) move((part.first + mine + e) * N + spot.at(c), X[e] + c);
  };
  const auto save_to = [&](float* state) {
    states([=](int at, const float* x) { quad(state + at) = {x[0], x[1], x[2], x[3]}; });
  };
  states([=](int at, float* x) {
    const Quads first = from ? quad(from + part.head * N * N + at) : Quads{};
    for (int f = 0; f < 4; ++f) x[f] = first.x[f];
  });
  if (!DELTA && threadIdx.x < N) us[threadIdx.x] = x.u[part.h * N + threadIdx.x];

  fetch(BACK ? (chunks - 1) * STEPS : 0);
  for (int64_t i = 0; i < chunks; ++i) {
    const int64_t t0 = (BACK ? chunks - 1 - i : i) * STEPS, then = BACK ? -STEPS : STEPS;
    __syncthreads();
    if (i) flush(t0 - then);
    next_r.store(rs[0]);
    next_w.store(ms[0], change);
    next_k.store(ks[0]);
    if (DELTA) next_a.store(as[0]), next_b.store(bs[0]);
    next_in.store(ins[0]);
    __syncthreads();
    fetch(t0 + then);
    if (save) save_to(save + (part.head * chunks + t0 / STEPS) * N * N);
#pragma unroll (3 - EACH)
    for (int j = 0; j < STEPS; ++j) {
      const int s = BACK ? STEPS - 1 - j : j;
      float in_[EACH], p[EACH][4] = {}, q[EACH] = {}, y[EACH][4] = {};
      for (int e = 0; e < EACH; ++e) in_[e] = ins[s][mine + e];
      if constexpr (DELTA) {
#pragma unroll
        for (int c = 0; c < COUNT; c += 4) {
          const int n = spot.at(c);
          const Quads A = quad(&(BACK ? bs : as)[s][n]), R = BACK ? quad(&rs[s][n]) : Quads{},
                      K = BACK ? quad(&ks[s][n]) : Quads{};
          for (int e = 0; e < EACH; ++e)
            for (int f = 0; f < 4; ++f) {
              if (BACK) X[e][c + f] += in_[e] * R.x[f], y[e][f] += X[e][c + f] * K.x[f];
              p[e][f] += X[e][c + f] * A.x[f];
            }
        }
        for (int e = 0; e < EACH; ++e) q[e] = sum<LANES>(p[e]);
      }
#pragma unroll
      for (int c = 0; c < COUNT; c += 4) {
        const int n = spot.at(c);
        const Quads M = quad(&ms[s][n]);
        if constexpr (DELTA && BACK) {
          const Quads A = quad(&as[s][n]);
          for (int e = 0; e < EACH; ++e)
            for (int f = 0; f < 4; ++f) X[e][c + f] += X[e][c + f] * M.x[f] + q[e] * A.x[f];
        } else {
          const Quads K = quad(&ks[s][n]), R = quad(&rs[s][n]), B = DELTA ? quad(&bs[s][n]) : Quads{},
                      U = DELTA ? Quads{} : quad(&us[n]);
          for (int f = 0; f < 4; ++f) {
            const float own = U.x[f] * K.x[f];
            for (int e = 0; e < EACH; ++e) {
              float& S = X[e][c + f];
              if (!DELTA) y[e][f] += (S + in_[e] * own) * R.x[f];
              S += S * M.x[f] + in_[e] * K.x[f];
              if (DELTA) S += q[e] * B.x[f], y[e][f] += S * R.x[f];
            }
          }
        }
      }
      float z[EACH];
      for (int e = 0; e < EACH; ++e) z[e] = sum<LANES>(y[e]);
      for (int e = 0; spot.lane == 0 && e < EACH; ++e) {
        outs[s][mine + e] = z[e];
        if (DELTA) extras[s][mine + e] = q[e];
      }
    }
  }
  __syncthreads();
  flush(BACK ? 0 : (chunks - 1) * STEPS);
  if (to) save_to(to + part.head * N * N);
}

}  // namespace rwkv_nb
