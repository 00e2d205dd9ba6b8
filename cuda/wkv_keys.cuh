// The pass over columns of the state: the keys' side of backward. See wkv_gpu.cu.
#pragma once
#include "wkv_gpu.cuh"

namespace rwkv_nb {

// The change of a decay that leaves e^-4. Beyond, up to a decay that is 0, its gradient is computed from the state
// itself, anew: φ's rounding, times so large a rate, would show.
constexpr float MOST_GONE = -0.98168f;

// The gradients of what belongs to keys, over columns of the state, back through a piece of time, of `piece` chunks.
// save: states before each chunk; gs: their gradients behind each piece. dw_once and du: [B,H,pieces,N].
template <typename Real, typename Decay, int THREADS, int LANES, int EACH, bool DELTA>
__global__ void __launch_bounds__(THREADS, THREADS == 64 ? 4 : 3)
keys(Inputs<Real, Decay> x, const float* sa, const float* gb, const float* save, const float* gs, const Real* dy,
     Real* dr, Real* dw, float* dw_once, Real* dk, Real* da, Real* db, float* du, int64_t pieces, int64_t piece) {
  constexpr int SPAN = THREADS / LANES * EACH, COUNT = N / LANES, MORE = DELTA ? STEPS : 1;
  __shared__ __align__(16) struct {  // in one piece, so that one register holds its address
    float v[STEPS][N], dy[STEPS][N], sa[MORE][N], gb[MORE][N];
    float r[STEPS][SPAN], m[STEPS][SPAN], k[STEPS][SPAN], a[MORE][SPAN], b[MORE][SPAN];
    float dr[STEPS][SPAN], dk[STEPS][SPAN], db[MORE][SPAN];
    float dw[STEPS][SPAN], da[STEPS][SPAN];  // dw: first the decay's rate. da: without DELTA, q of each step
  } room;

  const Part<SPAN> part(x, blockIdx.x / pieces);
  const Spot<LANES, EACH> spot;
  const int64_t mine = part.head * pieces + blockIdx.x % pieces, stride = part.stride;
  const int64_t begin = blockIdx.x % pieces * piece * STEPS, last = begin / STEPS + piece,
                end = (last < part.chunks ? last : part.chunks) * STEPS;  // before `begin` where a text is short
  const int own = spot.own;  // the column, of this place's, that is this lane's to finish

  Rows<Real, N, THREADS> next_v, next_dy;
  Rows<float, N, THREADS> next_sa, next_gb;
  Rows<Real, SPAN, THREADS> next_r, next_k, next_a, next_b;
  Rows<Decay, SPAN, THREADS> next_w;
  const auto fetch = [&](int64_t t0) {
    const int64_t at = part.row(t0), cols = at + part.first;
    const int left = part.left(t0);
    next_v.fetch(x.v + at, stride, left);
    next_dy.fetch(dy ? dy + at : nullptr, stride, left);
    next_r.fetch(x.r + cols, stride, left);
    next_w.fetch(x.w + part.w + part.first + t0 * part.w_stride, part.w_stride, left, -INFINITY);
    next_k.fetch(x.k + cols, stride, left);
    if constexpr (DELTA) {
      next_sa.fetch(sa + at, stride, left);
      next_gb.fetch(gb + at, stride, left);
      next_a.fetch(x.a + cols, stride, left);
      next_b.fetch(x.b + cols, stride, left);
    }
  };
  const auto flush = [&](int64_t t0) {
    using Out = Rows<Real, SPAN, THREADS>;
    const int64_t at = part.row(t0) + part.first;
    const int left = part.left(t0);
    Out::flush(room.dr[0], dr + at, stride, left);
    Out::flush(room.dw[0], dw ? dw + at : nullptr, stride, left);
    Out::flush(room.dk[0], dk + at, stride, left);
    if (DELTA) Out::flush(room.da[0], da + at, stride, left), Out::flush(room.db[0], db + at, stride, left);
  };
  const auto load = [&](float (&X)[COUNT][EACH], const float* state) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i) spot.read(X[i], state + spot.at(i) * N + part.first);
  };
  const auto save_of = [&](int64_t t0) { return save + (part.states + t0 / STEPS) * N * N; };

  const auto step = [&](float (&X)[COUNT][EACH], int s, int c) {  // four numbers of each column of S, one step on
    const Quads V = quad(&room.v[s][spot.at(c)]), P = DELTA ? quad(&room.sa[s][spot.at(c)]) : Quads{};
    float M[EACH], K[EACH], B[EACH] = {};
    spot.read(M, room.m[s]), spot.read(K, room.k[s]);
    if (DELTA) spot.read(B, room.b[s]);
    for (int e = 0; e < EACH; ++e)
      for (int f = 0; f < 4; ++f) {
        float& S = X[c + f][e];
        S += S * M[e], S += V.x[f] * K[e];
        if (DELTA) S += P.x[f] * B[e];
      }
  };

  float S[COUNT][EACH], G[COUNT][EACH], all_u = 0, all_w = 0;
  const float u = DELTA ? 0 : x.u[part.h * N + part.first + own];
  if (begin < end) load(G, gs + mine * N * N), load(S, save_of(end - STEPS)), fetch(end - STEPS);
  for (int64_t t0 = end - STEPS; t0 >= begin; t0 -= STEPS) {
    __syncthreads();
    if (t0 + STEPS < end) flush(t0 + STEPS);
    next_v.store(room.v[0]);
    next_dy.store(room.dy[0]);
    next_r.store(room.r[0]);
    next_w.store(room.m[0], change);
    next_w.store(room.dw[0], rate);
    next_k.store(room.k[0]);
    if (DELTA) next_sa.store(room.sa[0]), next_gb.store(room.gb[0]), next_a.store(room.a[0]), next_b.store(room.b[0]);
    __syncthreads();

#pragma unroll 1
    for (int s = 0; s < STEPS; ++s) {
      float sum_r[EACH] = {}, sum_a[EACH] = {};
#pragma unroll
      for (int c = 0; c < COUNT; c += 4) {
        const int n = spot.at(c);
        const Quads V = quad(&room.v[s][n]), DY = quad(&room.dy[s][n]), GB = DELTA ? quad(&room.gb[s][n]) : Quads{};
        for (int e = 0; e < EACH; ++e)
          for (int f = 0; f < 4; ++f) {
            sum_a[e] += DELTA ? S[c + f][e] * GB.x[f] : V.x[f] * DY.x[f];
            if (!DELTA) sum_r[e] += S[c + f][e] * DY.x[f];
          }
        step(S, s, c);
        for (int e = 0; DELTA && e < EACH; ++e)
          for (int f = 0; f < 4; ++f) sum_r[e] += S[c + f][e] * DY.x[f];
      }
      const float r_ = spot.share(sum_r), a_ = spot.share(sum_a);
      if (spot.tells) room.dr[s][own] = r_, room.da[s][own] = a_;
    }
    float phis[EACH] = {};
    for (int c = 0; c < COUNT; ++c)
      for (int e = 0; e < EACH; ++e) phis[e] += G[c][e] * S[c][e];
    float phi = spot.share(phis);
    if (t0 > begin) fetch(t0 - STEPS), load(S, save_of(t0 - STEPS));

#pragma unroll 1
    for (int s = STEPS - 1; s >= 0; --s) {
      float R[EACH], M[EACH], A[EACH] = {}, sum_k[EACH] = {}, sum_b[EACH] = {};
      spot.read(R, room.r[s]), spot.read(M, room.m[s]);
      if (DELTA) spot.read(A, room.a[s]);
      float direct = 0;
      bool fast = false;
      for (int e = 0; e < EACH; ++e) fast |= M[e] < MOST_GONE && M[e] > -1;
      if (__any_sync(0xffffffffu, fast)) {
        float Z[COUNT][EACH], sums[EACH] = {};
        load(Z, save_of(t0));
        for (int j = 0; j < s; ++j)
#pragma unroll
          for (int c = 0; c < COUNT; c += 4) step(Z, j, c);
        for (int c = 0; c < COUNT; ++c)
          for (int e = 0; e < EACH; ++e) sums[e] += (G[c][e] + (DELTA ? room.dy[s][spot.at(c)] * R[e] : 0)) * Z[c][e];
        direct = spot.share(sums) * expf(-room.dw[s][own]);
      }
#pragma unroll
      for (int c = 0; c < COUNT; c += 4) {
        const int n = spot.at(c);
        const Quads V = quad(&room.v[s][n]), DY = quad(&room.dy[s][n]), P = DELTA ? quad(&room.sa[s][n]) : Quads{},
                    GB = DELTA ? quad(&room.gb[s][n]) : Quads{};
        for (int e = 0; e < EACH; ++e)
          for (int f = 0; f < 4; ++f) {
            float& g = G[c + f][e];
            if (DELTA) g += DY.x[f] * R[e], sum_b[e] += g * P.x[f];
            sum_k[e] += g * V.x[f];
            g += g * M[e], g += DELTA ? GB.x[f] * A[e] : DY.x[f] * R[e];
          }
      }
      const float k_ = spot.share(sum_k), b_ = DELTA ? spot.share(sum_b) : 0;
      if (spot.tells) {
        const float K = room.k[s][own], r = room.r[s][own], Rr = r * room.dr[s][own], q = room.da[s][own];
        const float left = room.m[s][own] < MOST_GONE ? direct : phi + (DELTA ? Rr - room.b[s][own] * b_ : 0) - K * k_;
        phi = left + (DELTA ? room.a[s][own] * q : Rr);
        all_w += room.dw[s][own] *= -left;
        room.dk[s][own] = DELTA ? k_ : k_ + u * r * q;
        if (DELTA) room.db[s][own] = b_;
        else room.dr[s][own] += u * K * q, all_u += r * K * q;
      }
    }
  }
  __syncthreads();
  if (begin < end) flush(begin);
  if (!DELTA && spot.tells) {
    const int64_t to = mine * N + part.first + own;
    du[to] = all_u;
    if (dw_once) dw_once[to] = all_w;
  }
}

}  // namespace rwkv_nb
