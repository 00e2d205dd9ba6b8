// WKV-6 and WKV-5 on GPUs. Per head, with c_t = Σ_k r_t u k_t:
//   y_t = S_{t-1} r_t + c_t v_t;   S_t = S_{t-1} diag(d_t) + v_t k_tᵀ
//
// Backward, with G_t the gradient at S_t and q_t = v_t · dy_t:
//   values  G_{t-1} = G_t diag(d_t) + dy_t r_tᵀ, dv = G_t k + c dy: forward with r and k, v and dy exchanged
//   keys    dr = S_{t-1}ᵀ dy + u k q, dk = G_tᵀ v + u r q, dd = Σ_v G_t ⊙ S_{t-1}, du = Σ_t r k q
// S is computed again from a state saved every SAVE steps, never divided back: these decays have no bound but 0.
// WKV-5 is the same with one w for all steps (once != null), whose gradient is a sum over them.
#include "wkv_gpu.cuh"

namespace rwkv_nb {
namespace {

// The raw decay of steps, or of WKV-5's every step that exists.
template <typename Real, int ROWS, int COUNT> struct Decays : Rows<Real, ROWS, COUNT> {
  using Base = Rows<Real, ROWS, COUNT>;
  template <typename Of> __device__ void store(float* to, const float* once, int64_t t0, int64_t T, Of of) const {
    if (!once) return Base::store(to, of);
#pragma unroll
    for (int i = 0; i < Base::EACH; ++i)
      if (Base::mine(i)) {
        Quads x;
        for (int j = 0; j < 4; ++j) x.x[j] = of(t0 + Base::row(i) < T ? once[Base::column(i) + j] : -INFINITY);
        quad(to + Base::row(i) * COUNT + Base::column(i)) = x;
      }
  }
};

// to[row] = Σ x y (z) of every row: 16 neighbouring threads hold one.
template <typename Real, int ROWS> __device__ void dots(float* to, const Rows<Real, ROWS, 64>& x,
                                                        const Rows<Real, ROWS, 64>& y, const float* z) {
#pragma unroll
  for (int i = 0; i < Rows<Real, ROWS, 64>::EACH; ++i) {
    const Quads X = x.floats(i), Y = y.floats(i);
    float p = 0;
    for (int j = 0; j < 4; ++j) p += X.x[j] * Y.x[j] * (z ? z[x.column(i) + j] : 1.0f);
    p = sum<16>(p);
    if (threadIdx.x % 16 == 0) to[x.row(i)] = p;
  }
}

// One pass over rows of the state. Forward: in = v, out = y, from the first state to the last. BACK in time, with r
// and k exchanged: in = dy, out = dv, from the last state's gradient to the first one's. save: states, or null.
template <typename Real, int N, int LANES, bool BACK>
__global__ void __launch_bounds__(THREADS, 4)
wkv6_values(Size size, const Real* r, const Real* w, const float* once, const Real* k, const float* u, const Real* in,
            const float* from, Real* out, float* to, float* save) {
  constexpr int ROWS = THREADS / LANES, COUNT = N / LANES;
  using Mine = Share<N, LANES, false>;
  __shared__ __align__(16) float rs[STEPS][N], ds[STEPS][N], ks[STEPS][N], ins[STEPS][ROWS], outs[STEPS][ROWS];
  __shared__ float own[STEPS];

  const int64_t head = blockIdx.x / (N / ROWS), h = head % size.H, stride = size.H * N, T = size.T;
  const int first = blockIdx.x % (N / ROWS) * ROWS, row = threadIdx.x / LANES, lane = threadIdx.x % LANES;
  const int64_t base = (head / size.H * T * size.H + h) * N, rows = base + first;
  const int64_t chunks = (T + STEPS - 1) / STEPS, saves = (T + SAVE - 1) / SAVE;
  if (once) once += h * N;

  Rows<Real, STEPS, N> next_r, next_k;
  Decays<Real, STEPS, N> next_w;
  Rows<Real, STEPS, ROWS> next_in;
  const auto fetch = [&](int64_t t0) {
    next_r.fetch(r + base, stride, t0, T);
    next_w.fetch(w ? w + base : nullptr, stride, t0, T, -INFINITY);  // a step that does not exist changes nothing
    next_k.fetch(k + base, stride, t0, T);
    next_in.fetch(in ? in + rows : nullptr, stride, t0, T);
  };
  const auto flush = [&](int64_t t0) {
    Rows<Real, STEPS, ROWS>::flush(outs[0], out ? out + rows : nullptr, stride, t0, T);
  };

  float X[COUNT];
  Mine::load(X, from ? from + head * N * N : nullptr, first + row, lane);
  fetch(BACK ? (chunks - 1) * STEPS : 0);
  for (int64_t i = 0; i < chunks; ++i) {
    const int64_t t0 = (BACK ? chunks - 1 - i : i) * STEPS, then = BACK ? -STEPS : STEPS;
    __syncthreads();
    if (i) flush(t0 - then);
    next_r.store(rs[0]);
    next_w.store(ds[0], once, t0, T, decay);
    next_k.store(ks[0]);
    next_in.store(ins[0]);
    dots(own, next_r, next_k, u + h * N);
    __syncthreads();
    fetch(t0 + then);
    if (save && t0 % SAVE == 0) Mine::save(X, save + (head * saves + t0 / SAVE) * N * N, first + row, lane);
#pragma unroll 2
    for (int j = 0; j < STEPS; ++j) {
      const int s = BACK ? STEPS - 1 - j : j;
      const float x = ins[s][row];
      float y[4] = {};
#pragma unroll
      for (int c = 0; c < COUNT; c += 4) {
        const int n = Mine::index(c, lane);
        const Quads R = quad(&rs[s][n]), D = quad(&ds[s][n]), K = quad(&ks[s][n]);
        for (int e = 0; e < 4; ++e) {
          y[e] += X[c + e] * R.x[e];
          X[c + e] = X[c + e] * D.x[e] + x * K.x[e];
        }
      }
      const float z = sum<LANES>(y);
      if (lane == 0) outs[s][row] = z + own[s] * x;
    }
  }
  __syncthreads();
  flush(BACK ? 0 : (chunks - 1) * STEPS);
  if (to) Mine::save(X, to + head * N * N, first + row, lane);
}

// The gradients of what belongs to keys, over columns of the state, back in time. dw: WKV-6; dw_once and du [B,H,N].
template <typename Real, int N, int LANES>
__global__ void __launch_bounds__(THREADS, KEYS_BLOCKS)
wkv6_keys(Size size, const Real* r, const Real* w, const float* once, const Real* k, const Real* v, const float* u,
          const float* save, const Real* dy, const float* dlast, Real* dr, Real* dw, Real* dk, float* dw_once,
          float* du) {
  constexpr int COLS = THREADS / LANES, COUNT = N / LANES;
  using Mine = Share<N, LANES, true>;
  __shared__ __align__(16) float vs[SAVE][N], dys[SAVE][N];
  __shared__ __align__(16) float rs[SAVE][COLS], ds[SAVE][COLS], slopes[SAVE][COLS], ks[SAVE][COLS];
  __shared__ __align__(16) float drs[SAVE][COLS], dws[SAVE][COLS], dks[SAVE][COLS];
  __shared__ float parts[SAVE / PART][COUNT][THREADS];  // the state at the start of every part
  __shared__ float own[SAVE];

  const int64_t head = blockIdx.x / (N / COLS), h = head % size.H, stride = size.H * N, T = size.T;
  const int64_t chunks = (T + SAVE - 1) / SAVE;
  const int first = blockIdx.x % (N / COLS) * COLS, col = threadIdx.x / LANES, lane = threadIdx.x % LANES;
  const int64_t base = (head / size.H * T * size.H + h) * N, cols = base + first;
  const float own_weight = u[h * N + first + col];
  if (once) once += h * N + first;

  Rows<Real, SAVE, N> next_v, next_dy;
  Rows<Real, SAVE, COLS> next_r, next_k;
  Decays<Real, SAVE, COLS> next_w;
  float next_S[COUNT];
  const auto fetch = [&](int64_t t0) {
    next_v.fetch(v + base, stride, t0, T);
    next_dy.fetch(dy ? dy + base : nullptr, stride, t0, T);
    next_r.fetch(r + cols, stride, t0, T);
    next_w.fetch(w ? w + cols : nullptr, stride, t0, T, -INFINITY);
    next_k.fetch(k + cols, stride, t0, T);
    if (t0 >= 0) Mine::load(next_S, save + (head * chunks + t0 / SAVE) * N * N, first + col, lane);
  };
  const auto flush = [&](int64_t t0) {
    using Out = Rows<Real, SAVE, COLS>;
    Out::flush(drs[0], dr + cols, stride, t0, T);
    Out::flush(dws[0], dw ? dw + cols : nullptr, stride, t0, T);
    Out::flush(dks[0], dk + cols, stride, t0, T);
  };

  float G[COUNT], all_u = 0, all_w = 0;
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
    next_r.store(rs[0]);
    next_w.store(ds[0], once, t0, T, decay);
    next_w.store(slopes[0], once, t0, T, decay_slope);
    next_k.store(ks[0]);
    dots(own, next_v, next_dy, nullptr);
    __syncthreads();
    fetch(t0 - SAVE);

    const auto step = [&](int s, int c) {  // four numbers of S, one step on
      const Quads V = quad(&vs[s][Mine::index(c, lane)]);
      for (int e = 0; e < 4; ++e) S[c + e] = S[c + e] * ds[s][col] + V.x[e] * ks[s][col];
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
      for (int j = 0; j < PART; ++j)
#pragma unroll
        for (int c = 0; c < COUNT; c += 4) {
          for (int e = 0; e < 4; ++e) past[j][c + e] = S[c + e];
          step(part * PART + j, c);
        }
#pragma unroll
      for (int j = PART - 1; j >= 0; --j) {
        const int s = part * PART + j;
        const float R = rs[s][col], D = ds[s][col], K = ks[s][col], UQ = own_weight * own[s];
        float sum_r[4] = {}, sum_k[4] = {}, sum_d[4] = {};
#pragma unroll
        for (int c = 0; c < COUNT; c += 4) {
          const Quads V = quad(&vs[s][Mine::index(c, lane)]), DY = quad(&dys[s][Mine::index(c, lane)]);
          for (int e = 0; e < 4; ++e) {
            sum_r[e] += past[j][c + e] * DY.x[e];
            sum_k[e] += G[c + e] * V.x[e];
            sum_d[e] += G[c + e] * past[j][c + e];
            G[c + e] = G[c + e] * D + DY.x[e] * R;
          }
        }
        const float r_ = sum<LANES>(sum_r), k_ = sum<LANES>(sum_k), w_ = sum<LANES>(sum_d) * slopes[s][col];
        if (lane == 0) drs[s][col] = r_ + K * UQ, dks[s][col] = k_ + R * UQ, dws[s][col] = w_;
        all_u += R * K * own[s];
        all_w += w_;
      }
    }
  }
  __syncthreads();
  flush(0);
  if (lane == 0) {
    du[head * N + first + col] = all_u;
    if (dw_once) dw_once[head * N + first + col] = all_w;
  }
}

template <typename Real, bool BACK, typename... Args> void values(Size size, void* stream, Args... args) {
  constexpr int N = 64, LONG = 4, SHORT = 8;
  const int64_t heads = size.B * size.H;
  if (heads < FEW)
    LAUNCH(heads * N * SHORT / THREADS, stream, (wkv6_values<Real, N, SHORT, BACK>), size, args...);
  else
    LAUNCH(heads * N * LONG / THREADS, stream, (wkv6_values<Real, N, LONG, BACK>), size, args...);
}

}  // namespace
}  // namespace rwkv_nb

using namespace rwkv_nb;

// x: r, w, k, v, of which w is null where `once` [H,N] (WKV-5's w) is given. All tensors are contiguous and start at a
// multiple of 16 bytes; state and save may be null.
extern "C" int rwkv_nb_wkv6_forward(int type, int64_t B, int64_t T, int64_t H, int64_t N, const void* const* x,
                                    const float* once, const float* u, const float* state, void* y, float* last,
                                    float* save, void* stream) {
  return by_type(type, N, [&](auto zero) {
    using Real = decltype(zero);
    const auto in = [&](int i) { return static_cast<const Real*>(x[i]); };
    values<Real, false>(Size{B, T, H}, stream, in(0), in(1), once, in(2), u, in(3), state, static_cast<Real*>(y), last,
                        save);
  });
}

// save [B,H,ceil(T/SAVE),N,N]: as forward left it. dx: as x, dx[1] null for WKV-5, which fills dw_once. du, dw_once:
// [B,H,N]. dy, dlast and dstate may be null.
extern "C" int rwkv_nb_wkv6_backward(int type, int64_t B, int64_t T, int64_t H, int64_t N, const void* const* x,
                                     const float* once, const float* u, const float* save,
                                     const void* dy, const float* dlast, void* const* dx, float* dw_once, float* du,
                                     float* dstate, void* stream) {
  return by_type(type, N, [&](auto zero) {
    using Real = decltype(zero);
    const auto in = [&](int i) { return static_cast<const Real*>(x[i]); };
    const auto out = [&](int i) { return static_cast<Real*>(dx[i]); };
    const Size size{B, T, H};
    const Real* const grad = static_cast<const Real*>(dy);
    float* const none = nullptr;
    values<Real, true>(size, stream, in(2), in(1), once, in(0), u, grad, dlast, out(3), dstate, none);
    LAUNCH(B * H * 64 * 8 / THREADS, stream, (wkv6_keys<Real, 64, 8>), size, in(0), in(1), once, in(2), in(3), u, save,
           grad, dlast, out(0), out(1), out(2), dw_once, du);
  });
}
