// What the passes of wkv_gpu.cu have in common. No torch headers: a host compiler can run the same source on a CPU
// (tests/wkv/host.h), which is how the arithmetic is tested where there is no GPU.
#pragma once
#include "wkv_gpu.h"
#include <cstring>
#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define LAUNCH(blocks, stream, kernel, ...) \
  kernel<<<static_cast<unsigned>(blocks), THREADS, 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#else
#include "host.h"
#endif

// Large blocks that share a multiprocessor, which bounds their registers: more would spill.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
#define CROWD 3
#else
#define CROWD 4
#endif

namespace rwkv_nb {

constexpr int THREADS = 128;   // a block
constexpr int N = 64;          // channels of a head

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline void from_float(float& to, float x) { to = x; }
__device__ inline void from_float(__nv_bfloat16& to, float x) { to = __float2bfloat16_rn(x); }
__device__ inline void from_float(__half& to, float x) { to = __float2half_rn(x); }

// Four numbers that lie side by side and travel as one: in memory, where they are words of 32 bits, and as floats.
template <typename Real> struct __align__(4 * sizeof(Real)) Quad { uint32_t words[sizeof(Real)]; };
struct __align__(16) Quads { float x[4]; };

__device__ inline const Quads& quad(const float* x) { return *reinterpret_cast<const Quads*>(x); }
__device__ inline Quads& quad(float* x) { return *reinterpret_cast<Quads*>(x); }

template <typename Real> __device__ inline Quads unpack(const Quad<Real>& from) {
  Real x[4];
  memcpy(x, from.words, sizeof x);
  return {to_float(x[0]), to_float(x[1]), to_float(x[2]), to_float(x[3])};
}
template <typename Real> __device__ inline Quad<Real> pack(const Quads& from) {
  Real x[4];
  Quad<Real> to;
  for (int i = 0; i < 4; ++i) from_float(x[i], from.x[i]);
  memcpy(to.words, x, sizeof x);
  return to;
}

// e = exp(w), the rate of a raw decay input; the decay is exp(-e). From w = 4.7 the decay is 0 in float32 anyway, and
// holding w there keeps e finite. (Written so that a NaN stays one.) What a step adds to a state X is X · change:
// near 1 the decay itself would be rounded, the same way at every step, and thousands of them would add that up.
__device__ inline float rate(float w) { return expf(w > 4.7f ? 4.7f : w); }
__device__ inline float change(float w) { return expm1f(-rate(w)); }
__device__ inline float same(float x) { return x; }

// A thread's place in its block, and its lane: the LANES threads of one place share rows (or columns) of the state,
// and each holds every LANES-th quad of them. Threads that differ in bit 0 have one lane, those that differ in bit 1
// one place: so the 16 bytes that each lane reads of shared memory, and the 8 of each place, come in the fewest turns.
template <int LANES> struct Spot {
  static constexpr int WIDE = LANES == 8 ? 5 : 4;   // bits 1, 3 (and 4) are the lane's
  const int t = threadIdx.x, lane = (t >> 1 & 1) | (t >> 3 & (LANES / 2 - 1)) << 1,
            place = (t & 1) | (t >> 2 & 1) << 1 | t >> WIDE << 2;
  __device__ int at(int i) const { return (i / 4 * LANES + lane) * 4 + i % 4; }  // channel of the i-th number held
};

// The sum over the lanes of a place, in each of them.
template <int LANES> __device__ inline float sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 2);
  x += __shfl_xor_sync(0xffffffffu, x, 8);
  return LANES == 8 ? x + __shfl_xor_sync(0xffffffffu, x, 16) : x;
}
template <int LANES> __device__ inline float sum(const float (&x)[4]) { return sum<LANES>((x[0] + x[1]) + (x[2] + x[3])); }

// STEPS steps of a tensor, COUNT numbers of each, on their way to shared memory: `fetch` asks for them, and the wait
// for global memory passes behind the steps before. Row t lies at from + t * stride; a row that does not exist, and
// any row of a null pointer, reads as `fill`.
template <typename Real, int COUNT> struct Rows {
  static constexpr int QUADS = STEPS * COUNT / 4, EACH = (QUADS + THREADS - 1) / THREADS;
  Quad<Real> q[EACH];

  static __device__ bool mine(int i) { return QUADS % THREADS == 0 || threadIdx.x + i * THREADS < QUADS; }
  static __device__ int row(int i) { return (threadIdx.x + i * THREADS) / (COUNT / 4); }
  static __device__ int column(int i) { return (threadIdx.x + i * THREADS) % (COUNT / 4) * 4; }

  __device__ void fetch(const Real* from, int64_t stride, int64_t t0, int64_t T, float fill = 0) {
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      const int64_t t = t0 + row(i);
      q[i] = from && mine(i) && t >= 0 && t < T
                 ? *reinterpret_cast<const Quad<Real>*>(from + t * stride + column(i))
                 : pack<Real>({fill, fill, fill, fill});
    }
  }
  template <typename Of> __device__ void store(float* to, Of of) const {
#pragma unroll
    for (int i = 0; i < EACH; ++i)
      if (mine(i)) {
        const Quads x = unpack(q[i]);
        quad(to + row(i) * COUNT + column(i)) = {of(x.x[0]), of(x.x[1]), of(x.x[2]), of(x.x[3])};
      }
  }
  __device__ void store(float* to) const { store(to, same); }

  // The way back: rows of shared memory to the steps from t0 that exist. Each thread reads what it has `store`d.
  static __device__ void flush(const float* from, Real* to, int64_t stride, int64_t t0, int64_t T) {
#pragma unroll
    for (int i = 0; i < EACH; ++i)
      if (to && mine(i) && t0 + row(i) < T)
        *reinterpret_cast<Quad<Real>*>(to + (t0 + row(i)) * stride + column(i)) =
            pack<Real>(quad(from + row(i) * COUNT + column(i)));
  }
};

template <typename Real, typename Decay> struct Inputs {
  int64_t T, H, w_stride;          // from one step's w to the next one's; 0: one w [H,N] for all steps
  const Real *r, *k, *v, *a, *b;
  const Decay* w;
  const float* u;
};

// What a block works on: where its head's numbers and states begin, and the first of its SPAN rows or columns.
template <int SPAN> struct Part {
  int64_t head, h, base, stride, w;
  int first;
  template <typename In> __device__ explicit Part(const In& x)
      : head(blockIdx.x / (N / SPAN)), h(head % x.H), base((head / x.H * x.T * x.H + h) * N), stride(x.H * N),
        w(x.w_stride ? base : h * N), first(blockIdx.x % (N / SPAN) * SPAN) {}
};

}  // namespace rwkv_nb
