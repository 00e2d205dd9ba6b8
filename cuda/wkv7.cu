// WKV-7 on GPUs. Per head:  sa_t = S_{t-1} a_t;  S_t = S_{t-1} diag(d_t) + sa_t b_tᵀ + v_t k_tᵀ;  y_t = S_t r_t.
//
// Backward, with G_t the gradient at S_t and gb_t = G_t b_t:
//   values  G_t = dy_t r_tᵀ + G_{t+1} diag(d_{t+1}) + gb_{t+1} a_{t+1}ᵀ, dv = G k: forward with the roles exchanged
//   keys    dr = S_tᵀ dy, da = S_{t-1}ᵀ gb, dk = Gᵀ v, db = Gᵀ sa, dd = Σ_v G ⊙ S_{t-1}
// S is computed again from a state saved every SAVE steps, never divided back, so that any decay is exact.
#include "wkv_gpu.cuh"

namespace rwkv_nb {
namespace {

// One pass over rows of the state. Forward: in = v, out = y, extra = sa, from the first state to the last one. BACK in
// time: in = dy, out = dv, extra = gb, from the last state's gradient to the first one's. save: states, or null.
template <typename Real, int N, int LANES, bool BACK>
__global__ void __launch_bounds__(THREADS, 4)
wkv7_values(Size size, const Real* r, const Real* w, const Real* k, const Real* a, const Real* b, const Real* in,
            const float* from, Real* out, float* extra, float* to, float* save) {
  constexpr int ROWS = THREADS / LANES, COUNT = N / LANES;
  using Mine = Share<N, LANES, false>;
  __shared__ __align__(16) float rs[STEPS][N], ds[STEPS][N], ks[STEPS][N], as[STEPS][N], bs[STEPS][N];
  __shared__ __align__(16) float ins[STEPS][ROWS], outs[STEPS][ROWS], extras[STEPS][ROWS];

  const int64_t head = blockIdx.x / (N / ROWS), stride = size.H * N, T = size.T;
  const int first = blockIdx.x % (N / ROWS) * ROWS, row = threadIdx.x / LANES, lane = threadIdx.x % LANES;
  const int64_t base = (head / size.H * T * size.H + head % size.H) * N, rows = base + first;
  const int64_t chunks = (T + STEPS - 1) / STEPS, saves = (T + SAVE - 1) / SAVE;

  Rows<Real, STEPS, N> next_r, next_w, next_k, next_a, next_b;
  Rows<Real, STEPS, ROWS> next_in;
  const auto fetch = [&](int64_t t0) {
    next_r.fetch(r + base, stride, t0, T);
    next_w.fetch(w + base, stride, t0, T, -INFINITY);  // a step that does not exist changes nothing
    next_k.fetch(k + base, stride, t0, T);
    next_a.fetch(a + base, stride, t0, T);
    next_b.fetch(b + base, stride, t0, T);
    next_in.fetch(in ? in + rows : nullptr, stride, t0, T);
  };
  const auto flush = [&](int64_t t0) {
    Rows<Real, STEPS, ROWS>::flush(outs[0], out ? out + rows : nullptr, stride, t0, T);
    Rows<float, STEPS, ROWS>::flush(extras[0], extra ? extra + rows : nullptr, stride, t0, T);
  };

  float X[COUNT];
  Mine::load(X, from ? from + head * N * N : nullptr, first + row, lane);
  fetch(BACK ? (chunks - 1) * STEPS : 0);
  for (int64_t i = 0; i < chunks; ++i) {
    const int64_t t0 = (BACK ? chunks - 1 - i : i) * STEPS, then = BACK ? -STEPS : STEPS;
    __syncthreads();
    if (i) flush(t0 - then);
    next_r.store(rs[0]);
    next_w.store(ds[0], decay);
    next_k.store(ks[0]);
    next_a.store(as[0]);
    next_b.store(bs[0]);
    next_in.store(ins[0]);
    __syncthreads();
    fetch(t0 + then);
    if (save && t0 % SAVE == 0) Mine::save(X, save + (head * saves + t0 / SAVE) * N * N, first + row, lane);
#pragma unroll 2
    for (int j = 0; j < STEPS; ++j) {
      const int s = BACK ? STEPS - 1 - j : j;
      const float u = ins[s][row];
      float p[4] = {}, y[4] = {};
#pragma unroll
      for (int c = 0; c < COUNT; c += 4) {
        const int n = Mine::index(c, lane);
        if constexpr (BACK) {
          const Quads R = quad(&rs[s][n]), K = quad(&ks[s][n]), B = quad(&bs[s][n]);
          for (int e = 0; e < 4; ++e) {
            const float x = X[c + e] += u * R.x[e];
            y[e] += x * K.x[e];
            p[e] += x * B.x[e];
          }
        } else {
          const Quads A = quad(&as[s][n]);
          for (int e = 0; e < 4; ++e) p[e] += X[c + e] * A.x[e];
        }
      }
      const float q = sum<LANES>(p);
#pragma unroll
      for (int c = 0; c < COUNT; c += 4) {
        const int n = Mine::index(c, lane);
        const Quads D = quad(&ds[s][n]);
        if constexpr (BACK) {
          const Quads A = quad(&as[s][n]);
          for (int e = 0; e < 4; ++e) X[c + e] = X[c + e] * D.x[e] + q * A.x[e];
        } else {
          const Quads B = quad(&bs[s][n]), K = quad(&ks[s][n]), R = quad(&rs[s][n]);
          for (int e = 0; e < 4; ++e) {
            const float x = X[c + e] = X[c + e] * D.x[e] + q * B.x[e] + u * K.x[e];
            y[e] += x * R.x[e];
          }
        }
      }
      const float z = sum<LANES>(y);
      if (lane == 0) outs[s][row] = z, extras[s][row] = q;
    }
  }
  __syncthreads();
  flush(BACK ? 0 : (chunks - 1) * STEPS);
  if (to) Mine::save(X, to + head * N * N, first + row, lane);
}

// The gradients of what belongs to keys, over columns of the state, back in time.
template <typename Real, int N, int LANES>
__global__ void __launch_bounds__(THREADS, KEYS_BLOCKS)
wkv7_keys(Size size, const Real* r, const Real* w, const Real* k, const Real* v, const Real* a, const Real* b,
          const float* sa, const float* gb, const float* save, const Real* dy, const float* dlast, Real* dr, Real* dw,
          Real* dk, Real* da, Real* db) {
  constexpr int COLS = THREADS / LANES, COUNT = N / LANES;
  using Mine = Share<N, LANES, true>;
  __shared__ __align__(16) float vs[SAVE][N], sas[SAVE][N], gbs[SAVE][N], dys[SAVE][N];
  __shared__ __align__(16) float rs[SAVE][COLS], ds[SAVE][COLS], slopes[SAVE][COLS], ks[SAVE][COLS], as[SAVE][COLS],
      bs[SAVE][COLS];
  __shared__ __align__(16) float drs[SAVE][COLS], dws[SAVE][COLS], dks[SAVE][COLS], das[SAVE][COLS], dbs[SAVE][COLS];
  __shared__ float parts[SAVE / PART][COUNT][THREADS];  // the state at the start of every part

  const int64_t head = blockIdx.x / (N / COLS), stride = size.H * N, T = size.T, chunks = (T + SAVE - 1) / SAVE;
  const int first = blockIdx.x % (N / COLS) * COLS, col = threadIdx.x / LANES, lane = threadIdx.x % LANES;
  const int64_t base = (head / size.H * T * size.H + head % size.H) * N, cols = base + first;

  Rows<Real, SAVE, N> next_v, next_dy;
  Rows<float, SAVE, N> next_sa, next_gb;
  Rows<Real, SAVE, COLS> next_r, next_w, next_k, next_a, next_b;
  float next_S[COUNT];
  const auto fetch = [&](int64_t t0) {
    next_v.fetch(v + base, stride, t0, T);
    next_dy.fetch(dy ? dy + base : nullptr, stride, t0, T);
    next_sa.fetch(sa + base, stride, t0, T);
    next_gb.fetch(gb + base, stride, t0, T);
    next_r.fetch(r + cols, stride, t0, T);
    next_w.fetch(w + cols, stride, t0, T, -INFINITY);
    next_k.fetch(k + cols, stride, t0, T);
    next_a.fetch(a + cols, stride, t0, T);
    next_b.fetch(b + cols, stride, t0, T);
    if (t0 >= 0) Mine::load(next_S, save + (head * chunks + t0 / SAVE) * N * N, first + col, lane);
  };
  const auto flush = [&](int64_t t0) {
    using Out = Rows<Real, SAVE, COLS>;
    Out::flush(drs[0], dr + cols, stride, t0, T);
    Out::flush(dws[0], dw + cols, stride, t0, T);
    Out::flush(dks[0], dk + cols, stride, t0, T);
    Out::flush(das[0], da + cols, stride, t0, T);
    Out::flush(dbs[0], db + cols, stride, t0, T);
  };

  float G[COUNT];
  Mine::load(G, dlast ? dlast + head * N * N : nullptr, first + col, lane);
  fetch((chunks - 1) * SAVE);
  for (int64_t t0 = (chunks - 1) * SAVE; t0 >= 0; t0 -= SAVE) {
    float S[COUNT];
#pragma unroll
    for (int i = 0; i < COUNT; ++i) S[i] = next_S[i];
    __syncthreads();
    if (t0 + SAVE < chunks * SAVE) flush(t0 + SAVE);
    next_v.store(vs[0]);
    next_dy.store(dys[0]);
    next_sa.store(sas[0]);
    next_gb.store(gbs[0]);
    next_r.store(rs[0]);
    next_w.store(ds[0], decay);
    next_w.store(slopes[0], decay_slope);
    next_k.store(ks[0]);
    next_a.store(as[0]);
    next_b.store(bs[0]);
    __syncthreads();
    fetch(t0 - SAVE);

    const auto step = [&](int s, int c) {  // four numbers of S, one step on
      const int n = Mine::index(c, lane);
      const Quads V = quad(&vs[s][n]), P = quad(&sas[s][n]);
      for (int e = 0; e < 4; ++e) S[c + e] = S[c + e] * ds[s][col] + P.x[e] * bs[s][col] + V.x[e] * ks[s][col];
    };
#pragma unroll 1
    for (int s = 0; s < SAVE; ++s) {
      if (s % PART == 0) {
#pragma unroll
        for (int i = 0; i < COUNT; ++i) parts[s / PART][i][threadIdx.x] = S[i];
      }
      if (s < SAVE - PART) {
#pragma unroll
        for (int c = 0; c < COUNT; c += 4) step(s, c);
      }
    }
#pragma unroll 1
    for (int part = SAVE / PART - 1; part >= 0; --part) {
      float past[PART][COUNT];
#pragma unroll
      for (int i = 0; i < COUNT; ++i) S[i] = parts[part][i][threadIdx.x];
#pragma unroll
      for (int j = 0; j < PART; ++j) {
        const int s = part * PART + j;
        float sum_r[4] = {}, sum_a[4] = {};
#pragma unroll
        for (int c = 0; c < COUNT; c += 4) {
          const Quads GB = quad(&gbs[s][Mine::index(c, lane)]), DY = quad(&dys[s][Mine::index(c, lane)]);
          for (int e = 0; e < 4; ++e) past[j][c + e] = S[c + e], sum_a[e] += S[c + e] * GB.x[e];
          step(s, c);
          for (int e = 0; e < 4; ++e) sum_r[e] += S[c + e] * DY.x[e];
        }
        const float r_ = sum<LANES>(sum_r), a_ = sum<LANES>(sum_a);
        if (lane == 0) drs[s][col] = r_, das[s][col] = a_;
      }
#pragma unroll
      for (int j = PART - 1; j >= 0; --j) {
        const int s = part * PART + j;
        const float R = rs[s][col], D = ds[s][col], A = as[s][col];
        float sum_k[4] = {}, sum_b[4] = {}, sum_d[4] = {};
#pragma unroll
        for (int c = 0; c < COUNT; c += 4) {
          const int n = Mine::index(c, lane);
          const Quads V = quad(&vs[s][n]), P = quad(&sas[s][n]), DY = quad(&dys[s][n]), GB = quad(&gbs[s][n]);
          for (int e = 0; e < 4; ++e) {
            const float g = G[c + e] + DY.x[e] * R;
            sum_k[e] += g * V.x[e];
            sum_b[e] += g * P.x[e];
            sum_d[e] += g * past[j][c + e];
            G[c + e] = g * D + GB.x[e] * A;
          }
        }
        const float k_ = sum<LANES>(sum_k), b_ = sum<LANES>(sum_b), d_ = sum<LANES>(sum_d);
        if (lane == 0) dks[s][col] = k_, dbs[s][col] = b_, dws[s][col] = d_ * slopes[s][col];
      }
    }
  }
  __syncthreads();
  flush(0);
}

template <typename Real, bool BACK, typename... Args> void values(Size size, void* stream, Args... args) {
  constexpr int N = 64, LONG = 4, SHORT = 8;
  const int64_t heads = size.B * size.H;
  if (heads < FEW)
    LAUNCH(heads * N * SHORT / THREADS, stream, (wkv7_values<Real, N, SHORT, BACK>), size, args...);
  else
    LAUNCH(heads * N * LONG / THREADS, stream, (wkv7_values<Real, N, LONG, BACK>), size, args...);
}

}  // namespace
}  // namespace rwkv_nb

using namespace rwkv_nb;

// x: r, w, k, v, a, b. All tensors are contiguous and start at a multiple of 16 bytes; state, sa and save may be null.
extern "C" int rwkv_nb_wkv7_forward(int type, int64_t B, int64_t T, int64_t H, int64_t N, const void* const* x,
                                    const float* state, void* y, float* last, float* sa, float* save, void* stream) {
  return by_type(type, N, [&](auto zero) {
    using Real = decltype(zero);
    const auto in = [&](int i) { return static_cast<const Real*>(x[i]); };
    values<Real, false>(Size{B, T, H}, stream, in(0), in(1), in(2), in(4), in(5), in(3), state, static_cast<Real*>(y),
                        sa, last, save);
  });
}

// sa, save [B,H,ceil(T/SAVE),N,N]: as forward left them. dx: as x. gb: room for [B,T,H,N]; dy, dlast and dstate may be null.
extern "C" int rwkv_nb_wkv7_backward(int type, int64_t B, int64_t T, int64_t H, int64_t N, const void* const* x,
                                     const float* sa, const float* save, const void* dy, const float* dlast, float* gb,
                                     void* const* dx, float* dstate, void* stream) {
  return by_type(type, N, [&](auto zero) {
    using Real = decltype(zero);
    const auto in = [&](int i) { return static_cast<const Real*>(x[i]); };
    const auto out = [&](int i) { return static_cast<Real*>(dx[i]); };
    const Size size{B, T, H};
    float* const none = nullptr;
    values<Real, true>(size, stream, in(0), in(1), in(2), in(4), in(5), static_cast<const Real*>(dy), dlast, out(3), gb,
                       dstate, none);
    LAUNCH(B * H * 64 * 8 / THREADS, stream, (wkv7_keys<Real, 64, 8>), size, in(0), in(1), in(2), in(3), in(4), in(5),
           sa, gb, save, static_cast<const Real*>(dy), dlast, out(0), out(1), out(2), out(4), out(5));
  });
}
