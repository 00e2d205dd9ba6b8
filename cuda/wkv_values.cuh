// The pass over rows of the state: forward, and the values' side of backward. See wkv_gpu.cu.
#pragma once
#include "wkv_gpu.cuh"

namespace rwkv_nb {

// One pass over rows of the state. Forward: in = v, out = y, extra = sa, from the first state to the last one, and
// `save` takes the state before each chunk. BACK in time: in = dy, out = dv, extra = gb, from the last state's gradient
// to the first one's, and `save` takes the one behind each piece of time (see `keys`).
template <typename Real, typename Decay, int THREADS, int LANES, int EACH, bool DELTA, bool BACK>
__global__ void __launch_bounds__(THREADS, sizeof(Decay) == 2 ? 4 : 3)
values(Inputs<Real, Decay> x, const Real* in, const float* from, Real* out, float* extra, float* to, float* save,
       int64_t pieces, int64_t piece) {
  constexpr int SPAN = THREADS / LANES * EACH, COUNT = N / LANES, MORE = DELTA ? STEPS : 1;
  constexpr int PARTS = EACH == 4 ? 2 : 4;  // of a sum, so that no addition waits for the one before
  __shared__ __align__(16) struct {  // in one piece, so that one register holds its address
    float r[STEPS][N], m[STEPS][N], k[STEPS][N], a[MORE][N], b[MORE][N];
    float in[STEPS][SPAN], out[STEPS][SPAN], extra[MORE][SPAN], u[N];
  } room;

  const Part<SPAN> part(x, blockIdx.x);
  const Spot<LANES, EACH> spot;
  const int64_t chunks = part.chunks, stride = part.stride;

  Rows<Real, N, THREADS> next_r, next_k, next_a, next_b;
  Rows<Decay, N, THREADS> next_w;
  Rows<Real, SPAN, THREADS> next_in;
  const auto fetch = [&](int64_t t0) {
    const int64_t at = part.row(t0);
    const int left = part.left(t0);
    next_r.fetch(x.r + at, stride, left);
    next_w.fetch(x.w + part.w + t0 * part.w_stride, part.w_stride, left, -INFINITY);  // no step changes nothing
    next_k.fetch(x.k + at, stride, left);
    if (DELTA) next_a.fetch(x.a + at, stride, left), next_b.fetch(x.b + at, stride, left);
    next_in.fetch(in ? in + at + part.first : nullptr, stride, left);
  };
  const auto flush = [&](int64_t t0) {
    const int64_t at = part.row(t0) + part.first;
    const int left = part.left(t0);
    Rows<Real, SPAN, THREADS>::flush(room.out[0], out ? out + at : nullptr, stride, left);
    if (DELTA) Rows<float, SPAN, THREADS>::flush(room.extra[0], extra ? extra + at : nullptr, stride, left);
  };

  float X[EACH][COUNT];
  const auto states = [&](const auto& move) {  // move(memory's place for four numbers of a head's state, these four)
#pragma unroll
    for (int e = 0; e < EACH; ++e)
#pragma unroll
      for (int c = 0; c < COUNT; c += 4) move((part.first + spot.first + e) * N + spot.at(c), X[e] + c);
  };
  const auto save_to = [&](float* state) {
    states([=](int at, const float* x) { quad(state + at) = {x[0], x[1], x[2], x[3]}; });
  };
  states([=](int at, float* x) {
    const Quads first = from ? quad(from + part.head * N * N + at) : Quads{};
    for (int f = 0; f < 4; ++f) x[f] = first.x[f];
  });
  if (!DELTA && threadIdx.x < N) room.u[threadIdx.x] = x.u[part.h * N + threadIdx.x];

  fetch(BACK ? (chunks - 1) * STEPS : 0);
  for (int64_t i = 0; i < chunks; ++i) {
    const int64_t chunk = BACK ? chunks - 1 - i : i, t0 = chunk * STEPS, then = BACK ? -STEPS : STEPS;
    __syncthreads();
    if (i) flush(t0 - then);
    next_r.store(room.r[0]);
    next_w.store(room.m[0], change);
    next_k.store(room.k[0]);
    if (DELTA) next_a.store(room.a[0]), next_b.store(room.b[0]);
    next_in.store(room.in[0]);
    __syncthreads();
    if (i + 1 < chunks) fetch(t0 + then);
    if (save && !BACK) save_to(save + (part.states + chunk) * N * N);
    if (save && BACK && (!i || (chunk + 1) % piece == 0)) save_to(save + (part.head * pieces + chunk / piece) * N * N);
#pragma unroll (EACH == 1 ? 2 : 1)
    for (int j = 0; j < STEPS; ++j) {
      const int s = BACK ? STEPS - 1 - j : j;
      float in_[EACH], p[EACH][PARTS] = {}, q[EACH] = {}, y[EACH][PARTS] = {}, z[EACH], own = 0;
      spot.read(in_, room.in[s]);
      if constexpr (DELTA) {
#pragma unroll
        for (int c = 0; c < COUNT; c += 4) {
          const int n = spot.at(c);
          const Quads A = quad(&(BACK ? room.b : room.a)[s][n]), R = BACK ? quad(&room.r[s][n]) : Quads{},
                      K = BACK ? quad(&room.k[s][n]) : Quads{};
          for (int e = 0; e < EACH; ++e)
            for (int f = 0; f < 4; ++f) {
              if (BACK) X[e][c + f] += in_[e] * R.x[f], y[e][f % PARTS] += X[e][c + f] * K.x[f];
              p[e][f % PARTS] += X[e][c + f] * A.x[f];
            }
        }
        for (int e = 0; e < EACH; ++e) z[e] = total(p[e]);
        own = spot.share(z);
        spot.spread(own, q);
        if (spot.tells) room.extra[s][spot.own] = own;
      }
#pragma unroll
      for (int c = 0; c < COUNT; c += 4) {
        const int n = spot.at(c);
        const Quads M = quad(&room.m[s][n]);
        if constexpr (DELTA && BACK) {
          const Quads A = quad(&room.a[s][n]);
          for (int e = 0; e < EACH; ++e)
            for (int f = 0; f < 4; ++f) X[e][c + f] += X[e][c + f] * M.x[f], X[e][c + f] += q[e] * A.x[f];
        } else {
          const Quads K = quad(&room.k[s][n]), R = quad(&room.r[s][n]), B = DELTA ? quad(&room.b[s][n]) : Quads{},
                      U = DELTA ? Quads{} : quad(&room.u[n]);
          for (int f = 0; f < 4; ++f) {
            const float bonus = U.x[f] * K.x[f];
            for (int e = 0; e < EACH; ++e) {
              float& S = X[e][c + f];
              if (!DELTA) y[e][f % PARTS] += (S + in_[e] * bonus) * R.x[f];
              S += S * M.x[f], S += in_[e] * K.x[f];
              if (DELTA) S += q[e] * B.x[f], y[e][f % PARTS] += S * R.x[f];
            }
          }
        }
      }
      for (int e = 0; e < EACH; ++e) z[e] = total(y[e]);
      own = spot.share(z);
      if (spot.tells) room.out[s][spot.own] = own;
    }
  }
  __syncthreads();
  flush(BACK ? 0 : (chunks - 1) * STEPS);
  if (to) save_to(to + part.head * N * N);
}

}  // namespace rwkv_nb
