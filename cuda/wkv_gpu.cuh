// What the GPU kernels of every RWKV version share. No torch headers: a host compiler can run the same source on a
// CPU (tests/wkv/host.h), which is how the arithmetic is tested where there is no GPU.
//
// A head's state S is [V,K] (value, key), and so is its gradient G. Their rows are independent over time (the values
// pass), and once the values pass is done so are their columns (the keys pass). So a head is split over several
// blocks; in a block, LANES neighbouring threads share a row or a column, and each holds every LANES-th quad of it.
#pragma once
#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cstdint>
#define LAUNCH(blocks, stream, kernel, ...) \
  kernel<<<static_cast<unsigned>(blocks), THREADS, 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#else
#include "host.h"
#endif

// Blocks of the keys pass that share a multiprocessor, which bounds their registers: more would spill.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
#define KEYS_BLOCKS 2
#else
#define KEYS_BLOCKS 3
#endif

namespace rwkv_nb {

constexpr int THREADS = 128;    // a block
constexpr int STEPS = 8;        // of the values pass between two barriers
constexpr int SAVE = 16;        // distance of saved states, and steps of the keys pass between two barriers
constexpr int PART = 4;         // of these, steps whose states are in registers at once
constexpr int64_t FEW = 256;    // heads: below, more threads share a row, for time rather than threads is short
constexpr int REFUSED = -1;     // what a launcher returns for a size or type that has no kernel

struct Size { int64_t B, T, H; };

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline void from_float(float& to, float x) { to = x; }
__device__ inline void from_float(__nv_bfloat16& to, float x) { to = __float2bfloat16_rn(x); }
__device__ inline void from_float(__half& to, float x) { to = __float2half_rn(x); }

// Four numbers that lie side by side and travel as one.
template <typename Real> struct __align__(4 * sizeof(Real)) Quad { Real x[4]; };
using Quads = Quad<float>;

__device__ inline const Quads& quad(const float* x) { return *reinterpret_cast<const Quads*>(x); }
__device__ inline Quads& quad(float* x) { return *reinterpret_cast<Quads*>(x); }

// e = exp(w), the rate of a raw decay input; the decay is exp(-e). From w = 4.7 the decay is 0 in float32 anyway, and
// holding w there keeps e finite. (Written so that a NaN stays one.)
__device__ inline float decay_rate(float w) { return expf(w > 4.7f ? 4.7f : w); }
__device__ inline float decay(float w) { return expf(-decay_rate(w)); }
__device__ inline float decay_slope(float w) { return -decay_rate(w) * decay(w); }  // of the decay, by w
__device__ inline float same(float x) { return x; }

// The sum over WIDTH neighbouring threads, in each of them.
template <int WIDTH> __device__ inline float sum(float x) {
#pragma unroll
  for (int far = WIDTH / 2; far > 0; far /= 2) x += __shfl_xor_sync(0xffffffffu, x, far);
  return x;
}
template <int WIDTH> __device__ inline float sum(const float (&x)[4]) { return sum<WIDTH>((x[0] + x[1]) + (x[2] + x[3])); }

// ROWS steps of a tensor, COUNT numbers of each, on their way to shared memory: `fetch` asks for them, and the wait
// for global memory passes behind the steps before. Row t lies at from + t * stride; a row that does not exist, and
// any row of a null pointer, reads as `fill`.
template <typename Real, int ROWS, int COUNT> struct Rows {
  static constexpr int QUADS = ROWS * COUNT / 4, EACH = (QUADS + THREADS - 1) / THREADS;
  Quad<Real> q[EACH];

  static __device__ bool mine(int i) { return QUADS % THREADS == 0 || threadIdx.x + i * THREADS < QUADS; }
  static __device__ int row(int i) { return (threadIdx.x + i * THREADS) / (COUNT / 4); }
  static __device__ int column(int i) { return (threadIdx.x + i * THREADS) % (COUNT / 4) * 4; }

  __device__ void fetch(const Real* from, int64_t stride, int64_t t0, int64_t T, float fill = 0) {
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      const int64_t t = t0 + row(i);
      if (from && mine(i) && t >= 0 && t < T) q[i] = *reinterpret_cast<const Quad<Real>*>(from + t * stride + column(i));
      else
        for (int j = 0; j < 4; ++j) from_float(q[i].x[j], fill);
    }
  }
  __device__ Quads floats(int i) const {
    Quads x;
    for (int j = 0; j < 4; ++j) x.x[j] = to_float(q[i].x[j]);
    return x;
  }
  template <typename Of> __device__ void store(float* to, Of of) const {
#pragma unroll
    for (int i = 0; i < EACH; ++i)
      if (mine(i)) {
        Quads x = floats(i);
        for (int j = 0; j < 4; ++j) x.x[j] = of(x.x[j]);
        quad(to + row(i) * COUNT + column(i)) = x;
      }
  }
  __device__ void store(float* to) const { store(to, same); }

  // The way back: rows of shared memory to the steps from t0 that exist.
  static __device__ void flush(const float* from, Real* to, int64_t stride, int64_t t0, int64_t T) {
#pragma unroll
    for (int i = 0; i < EACH; ++i)
      if (to && mine(i) && t0 + row(i) < T) {
        const Quads x = quad(from + row(i) * COUNT + column(i));
        Quad<Real> y;
        for (int j = 0; j < 4; ++j) from_float(y.x[j], x.x[j]);
        *reinterpret_cast<Quad<Real>*>(to + (t0 + row(i)) * stride + column(i)) = y;
      }
  }
};

// What a thread holds of row `at` of a state (of column `at`: ACROSS), from memory and back. A null pointer is zeros.
template <int N, int LANES, bool ACROSS> struct Share {
  static constexpr int COUNT = N / LANES;
  static __device__ int index(int i, int lane) { return (i / 4 * LANES + lane) * 4 + i % 4; }
  static __device__ void load(float (&X)[COUNT], const float* state, int at, int lane) {
#pragma unroll
    for (int i = 0; i < COUNT; ++i)
      X[i] = !state ? 0 : ACROSS ? state[index(i, lane) * N + at] : state[at * N + index(i, lane)];
  }
  static __device__ void save(const float (&X)[COUNT], float* state, int at, int lane) {
#pragma unroll
    for (int i = 0; i < COUNT; i += 4) {
      Quads x;
      for (int j = 0; j < 4; ++j) x.x[j] = X[i + j];
      if (!ACROSS) quad(state + at * N + index(i, lane)) = x;
      else
        for (int j = 0; j < 4; ++j) state[index(i + j, lane) * N + at] = x.x[j];
    }
  }
};

// work(Real()) for the type of a number: 0 float, 1 bfloat16, 2 half. Returns 0, REFUSED or a cudaError_t.
template <typename Work> int by_type(int type, int64_t N, const Work& work) {
  if (N != 64 || type < 0 || type > 2) return REFUSED;
  if (type == 0) work(float());
  else if (type == 1) work(__nv_bfloat16());
  else work(__half());
  return static_cast<int>(cudaGetLastError());
}

}  // namespace rwkv_nb
