// The pass over columns of the state: the keys' side of backward. See wkv_gpu.cu.
#pragma once
#include "wkv_gpu.cuh"

namespace rwkv_nb {

// The change of a decay that leaves an eighth. Below, the decay's gradient is computed from the state itself.
constexpr float MOST_GONE = -0.875f;

// The gradients of what belongs to keys, over columns of the state, back in time. dw_once and du: [B,H,N].
template <typename Real, typename Decay, int LANES, int EACH, bool DELTA>
__global__ void __launch_bounds__(THREADS, sizeof(Real) == 2 ? 4 : 3)
keys(Inputs<Real, Decay> x, const float* sa, const float* gb, const float* save, const Real* dy, const float* dlast,
     Real* dr, Real* dw, float* dw_once, Real* dk, Real* da, Real* db, float* du) {
  constexpr int SPAN = THREADS / LANES * EACH, COUNT = N / LANES, MORE = DELTA ? STEPS : 1;
  __shared__ __align__(16) float vs[STEPS][N], dys[STEPS][N], sas[MORE][N], gbs[MORE][N];
  __shared__ __align__(16) float rs[STEPS][SPAN], ms[STEPS][SPAN], ks[STEPS][SPAN], as[MORE][SPAN], bs[MORE][SPAN];
  // dws: first the decay's rate. das: without DELTA, q of each step.
  __shared__ __align__(16) float drs[STEPS][SPAN], dws[STEPS][SPAN], dks[STEPS][SPAN], das[STEPS][SPAN], dbs[MORE][SPAN];

  const Part<SPAN> part(x);
  const Spot<LANES> spot;
  const int64_t T = x.T, chunks = (T + STEPS - 1) / STEPS, base = part.base, cols = base + part.first;
  const int mine = spot.place * EACH;

  Rows<Real, N> next_v, next_dy;
  Rows<float, N> next_sa, next_gb;
  Rows<Real, SPAN> next_r, next_k, next_a, next_b;
  Rows<Decay, SPAN> next_w;
  const auto fetch = [&](int64_t t0) {
    next_v.fetch(x.v + base, part.stride, t0, T);
    next_dy.fetch(dy ? dy + base : nullptr, part.stride, t0, T);
    next_r.fetch(x.r + cols, part.stride, t0, T);
    next_w.fetch(x.w + part.w + part.first, x.w_stride, t0, T, -INFINITY);
    next_k.fetch(x.k + cols, part.stride, t0, T);
    if constexpr (DELTA) {
      next_sa.fetch(sa + base, part.stride, t0, T);
      next_gb.fetch(gb + base, part.stride, t0, T);
      next_a.fetch(x.a + cols, part.stride, t0, T);
      next_b.fetch(x.b + cols, part.stride, t0, T);
    }
  };
  const auto flush = [&](int64_t t0) {
    using Out = Rows<Real, SPAN>;
    Out::flush(drs[0], dr + cols, part.stride, t0, T);
    Out::flush(dws[0], dw ? dw + cols : nullptr, part.stride, t0, T);
    Out::flush(dks[0], dk + cols, part.stride, t0, T);
    if (DELTA) Out::flush(das[0], da + cols, part.stride, t0, T), Out::flush(dbs[0], db + cols, part.stride, t0, T);
  };
  const auto load = [&](float (&X)[EACH][COUNT], const float* state) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
#pragma unroll
      for (int e = 0; e < EACH; ++e) X[e][i] = state ? state[spot.at(i) * N + part.first + mine + e] : 0;
  };

  const auto step = [&](float (&X)[EACH][COUNT], int s, int c) {  // four numbers of each column of S, one step on
    const Quads V = quad(&vs[s][spot.at(c)]), P = DELTA ? quad(&sas[s][spot.at(c)]) : Quads{};
    float M[EACH], K[EACH], B[EACH];
    for (int e = 0; e < EACH; ++e) M[e] = ms[s][mine + e], K[e] = ks[s][mine + e], B[e] = DELTA ? bs[s][mine + e] : 0;
    for (int e = 0; e < EACH; ++e)
      for (int f = 0; f < 4; ++f) X[e][c + f] += X[e][c + f] * M[e] + V.x[f] * K[e] + (DELTA ? P.x[f] * B[e] : 0);
  };

  float S[EACH][COUNT], G[EACH][COUNT], u[EACH] = {}, all_u[EACH] = {}, all_w[EACH] = {};
  load(G, dlast ? dlast + part.head * N * N : nullptr);
  load(S, save + (part.head * chunks + chunks - 1) * N * N);
  for (int e = 0; e < EACH; ++e) u[e] = DELTA ? 0 : x.u[part.h * N + part.first + mine + e];
  fetch((chunks - 1) * STEPS);
  for (int64_t t0 = (chunks - 1) * STEPS; t0 >= 0; t0 -= STEPS) {
    __syncthreads();
    if (t0 + STEPS < chunks * STEPS) flush(t0 + STEPS);
    next_v.store(vs[0]);
    next_dy.store(dys[0]);
    next_r.store(rs[0]);
    next_w.store(ms[0], change);
    next_w.store(dws[0], rate);
    next_k.store(ks[0]);
    if (DELTA) next_sa.store(sas[0]), next_gb.store(gbs[0]), next_a.store(as[0]), next_b.store(bs[0]);
    __syncthreads();

#pragma unroll 2
    for (int s = 0; s < STEPS; ++s) {
      float sum_r[EACH][4] = {}, sum_a[EACH][4] = {};
#pragma unroll
      for (int c = 0; c < COUNT; c += 4) {
        const int n = spot.at(c);
        const Quads V = quad(&vs[s][n]), DY = quad(&dys[s][n]), GB = DELTA ? quad(&gbs[s][n]) : Quads{};
        for (int e = 0; e < EACH; ++e)
          for (int f = 0; f < 4; ++f) {
            sum_a[e][f] += DELTA ? S[e][c + f] * GB.x[f] : V.x[f] * DY.x[f];
            if (!DELTA) sum_r[e][f] += S[e][c + f] * DY.x[f];
          }
        step(S, s, c);
        for (int e = 0; DELTA && e < EACH; ++e)
          for (int f = 0; f < 4; ++f) sum_r[e][f] += S[e][c + f] * DY.x[f];
      }
      float r_[EACH], a_[EACH];
      for (int e = 0; e < EACH; ++e) r_[e] = sum<LANES>(sum_r[e]), a_[e] = sum<LANES>(sum_a[e]);
      for (int e = 0; spot.lane == 0 && e < EACH; ++e) drs[s][mine + e] = r_[e], das[s][mine + e] = a_[e];
    }
    float phi[EACH];
    for (int e = 0; e < EACH; ++e) {
      float p[4] = {};
#pragma unroll
      for (int c = 0; c < COUNT; ++c) p[c % 4] += G[e][c] * S[e][c];
      phi[e] = sum<LANES>(p);
    }
    fetch(t0 - STEPS);
    if (t0) load(S, save + (part.head * chunks + t0 / STEPS - 1) * N * N);

#pragma unroll (3 - EACH)
    for (int s = STEPS - 1; s >= 0; --s) {
      float R[EACH], M[EACH], A[EACH], sum_k[EACH][4] = {}, sum_b[EACH][4] = {};
      for (int e = 0; e < EACH; ++e)
        R[e] = rs[s][mine + e], M[e] = ms[s][mine + e], A[e] = DELTA ? as[s][mine + e] : 0;
      float direct[EACH] = {};
      bool fast = false;  // little is left of S_{t-1}: less than φ's rounding, times a large rate
      for (int e = 0; e < EACH; ++e) fast |= M[e] < MOST_GONE;
      if (__any_sync(0xffffffffu, fast)) {
        float Z[EACH][COUNT];
        load(Z, save + (part.head * chunks + t0 / STEPS) * N * N);
        for (int j = 0; j < s; ++j)
#pragma unroll
          for (int c = 0; c < COUNT; c += 4) step(Z, j, c);
        for (int e = 0; e < EACH; ++e) {
          float p[4] = {};
#pragma unroll
          for (int c = 0; c < COUNT; ++c) p[c % 4] += (G[e][c] + (DELTA ? dys[s][spot.at(c)] * R[e] : 0)) * Z[e][c];
          direct[e] = sum<LANES>(p) * expf(-dws[s][mine + e]);
        }
      }
#pragma unroll
      for (int c = 0; c < COUNT; c += 4) {
        const int n = spot.at(c);
        const Quads V = quad(&vs[s][n]), DY = quad(&dys[s][n]), P = DELTA ? quad(&sas[s][n]) : Quads{},
                    GB = DELTA ? quad(&gbs[s][n]) : Quads{};
        for (int e = 0; e < EACH; ++e)
          for (int f = 0; f < 4; ++f) {
            float& g = G[e][c + f];
            if (DELTA) g += DY.x[f] * R[e], sum_b[e][f] += g * P.x[f];
            sum_k[e][f] += g * V.x[f];
            g += g * M[e] + (DELTA ? GB.x[f] * A[e] : DY.x[f] * R[e]);
          }
      }
      float k_[EACH], b_[EACH];
      for (int e = 0; e < EACH; ++e) k_[e] = sum<LANES>(sum_k[e]), b_[e] = DELTA ? sum<LANES>(sum_b[e]) : 0;
      for (int e = 0; spot.lane == 0 && e < EACH; ++e) {
        const int at = mine + e;
        const float K = ks[s][at], Rr = R[e] * drs[s][at], q = das[s][at];
        const float left = M[e] < MOST_GONE ? direct[e] : phi[e] + (DELTA ? Rr - bs[s][at] * b_[e] : 0) - K * k_[e];
        phi[e] = left + (DELTA ? A[e] * q : Rr);
        all_w[e] += dws[s][at] *= -left;
        dks[s][at] = DELTA ? k_[e] : k_[e] + u[e] * R[e] * q;
        if (DELTA) dbs[s][at] = b_[e];
        else drs[s][at] += u[e] * K * q, all_u[e] += R[e] * K * q;
      }
    }
  }
  __syncthreads();
  flush(0);
  for (int e = 0; e < EACH; ++e)
    if (!DELTA && spot.lane == 0) {
      du[part.head * N + part.first + mine + e] = all_u[e];
      if (dw_once) dw_once[part.head * N + part.first + mine + e] = all_w[e];
    }
}

}  // namespace rwkv_nb
