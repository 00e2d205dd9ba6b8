// What the passes of wkv_gpu.cu have in common. No torch headers: a host compiler can run the same source on a CPU
// (tests/wkv/host.h), which is how the arithmetic is tested where there is no GPU.
#pragma once
#include "wkv_gpu.h"
#include <cstring>
#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define LAUNCH(blocks, threads, stream, kernel, ...) \
  kernel<<<static_cast<unsigned>(blocks), threads, 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#else
#include "host.h"
#endif

namespace rwkv_nb {

constexpr int N = 64;   // channels of a head

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

__device__ inline float total(const float (&x)[2]) { return x[0] + x[1]; }
__device__ inline float total(const float (&x)[4]) { return (x[0] + x[1]) + (x[2] + x[3]); }

// A thread's place in its block, and its lane. The LANES threads of one place share EACH rows (or columns) of the state:
// each holds every LANES-th quad of all of them. Threads that differ in bit 0 have one lane, those that differ in bit 1
// one place: so the 16 bytes that each lane reads of shared memory, and those of each place, come in the fewest turns.
template <int LANES, int EACH> struct Spot {
  static constexpr int WIDE = LANES == 8 ? 5 : 4;   // bits 1, 3 (and 4) are the lane's
  const int t = threadIdx.x, lane = (t >> 1 & 1) | (t >> 3 & (LANES / 2 - 1)) << 1,
            place = (t & 1) | (t >> 2 & 1) << 1 | t >> WIDE << 2, first = place * EACH;
  // Of a place's EACH sums (`share`), the one that this lane gets, and whether it is the first lane that does.
  const int own = first + (EACH == 4 ? (lane & 1) << 1 | (lane >> 1 & 1) : EACH == 2 ? lane & 1 : 0);
  const bool tells = lane < EACH;

  __device__ int at(int i) const { return (i / 4 * LANES + lane) * 4 + i % 4; }  // channel of the i-th number held

  // The EACH numbers of this place.
  __device__ void read(float (&to)[EACH], const float* from) const {
    if constexpr (EACH == 4) {
      const Quads x = quad(from + first);
      for (int e = 0; e < 4; ++e) to[e] = x.x[e];
    } else {
      for (int e = 0; e < EACH; ++e) to[e] = from[first + e];
    }
  }

  // The bit of the thread in which the i-th bit of the lane lies, and that far neighbour's number.
  static __device__ constexpr int bit(int i) { return i == 0 ? 2 : i == 1 ? 8 : 16; }
  static __device__ float far(float x, int i) { return __shfl_xor_sync(0xffffffffu, x, bit(i)); }

  // The sum over all lanes of x[own - first]: at each exchange two lanes halve between them what is left to add up.
  __device__ float share(float (&x)[EACH]) const {
    int i = 0;
#pragma unroll
    for (int half = EACH / 2; half; half /= 2, ++i) {
      const bool upper = t & bit(i);
      for (int e = 0; e < half; ++e) {
        const float given = upper ? x[e] : x[e + half], kept = upper ? x[e + half] : x[e];
        x[e] = kept + far(given, i);
      }
    }
#pragma unroll
    for (; 1 << i < LANES; ++i) x[0] += far(x[0], i);
    return x[0];
  }
  // The way back: what every lane has of `share`, in all of them.
  __device__ void spread(float mine, float (&x)[EACH]) const {
    int i = EACH == 4 ? 1 : 0;
    x[0] = mine;
#pragma unroll
    for (int half = 1; half < EACH; half *= 2, --i) {
      const bool upper = t & bit(i);
      for (int e = 0; e < half; ++e) {
        const float other = far(x[e], i), held = x[e];
        x[e] = upper ? other : held, x[e + half] = upper ? held : other;
      }
    }
  }
};

// STEPS steps of a tensor, COUNT numbers of each, on their way to shared memory: `fetch` asks for them, and the wait
// for global memory passes behind the steps before. The first row lies at `from`, and `stride` numbers lie from one to
// the next; rows from `left` on do not exist and read as `fill`, as do all of a null pointer.
template <typename Real, int COUNT, int THREADS> struct Rows {
  static constexpr int QUADS = STEPS * COUNT / 4, EACH = QUADS < THREADS ? 1 : QUADS / THREADS, STEP = STEPS / EACH;
  Quad<Real> q[EACH];

  static __device__ int row() { return threadIdx.x / (COUNT / 4); }  // of the first quad; the others' are STEP apart
  static __device__ int column() { return threadIdx.x % (COUNT / 4) * 4; }

  __device__ void fetch(const Real* from, int64_t stride, int left, float fill = 0) {
    if (from) from += row() * stride + column();
#pragma unroll
    for (int i = 0; i < EACH; ++i)
      q[i] = from && row() + i * STEP < left ? *reinterpret_cast<const Quad<Real>*>(from + i * STEP * stride)
                                             : pack<Real>({fill, fill, fill, fill});
  }
  template <typename Of> __device__ void store(float* to, Of of) const {
    if (row() >= STEPS) return;  // more threads than quads
    to += row() * COUNT + column();
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
      const Quads x = unpack(q[i]);
      quad(to + i * STEP * COUNT) = {of(x.x[0]), of(x.x[1]), of(x.x[2]), of(x.x[3])};
    }
  }
  __device__ void store(float* to) const { store(to, same); }

  // The way back: rows of shared memory to those that exist. Each thread reads what it has `store`d.
  static __device__ void flush(const float* from, Real* to, int64_t stride, int left) {
    if (!to) return;
    from += row() * COUNT + column(), to += row() * stride + column();
#pragma unroll
    for (int i = 0; i < EACH; ++i)
      if (row() + i * STEP < left)
        *reinterpret_cast<Quad<Real>*>(to + i * STEP * stride) = pack<Real>(quad(from + i * STEP * COUNT));
  }
};

template <typename Real, typename Decay> struct Inputs {
  int64_t T, H, w_stride;          // from one step's w to the next one's; 0: one w [H,N] for all steps
  const int64_t* begins;
  const Real *r, *k, *v, *a, *b;
  const Decay* w;
  const float* u;
};

// What a block works on: one head of one text, where its numbers and its saved states begin, and the first of its SPAN
// rows or columns.
template <int SPAN> struct Part {
  int64_t head, h, chunks, base, stride, w, w_stride, states;
  int T, first;
  template <typename In> __device__ Part(const In& x, int64_t block)
      : head(block / (N / SPAN)), h(head % x.H), stride(x.H * N), w_stride(x.w_stride), first(block % (N / SPAN) * SPAN) {
    const int64_t text = head / x.H, at = x.begins ? x.begins[text] : text * x.T;
    T = x.begins ? x.begins[text + 1] - at : x.T;
    chunks = (T + STEPS - 1) / STEPS;
    base = (at * x.H + h) * N;
    w = w_stride ? base : h * N;
    states = x.begins ? (at / STEPS + text) * x.H + h * chunks : head * chunks;
  }
  __device__ int64_t row(int64_t t0) const { return base + t0 * stride; }     // where a step's numbers begin
  __device__ int left(int64_t t0) const { return T - t0 < STEPS ? T - t0 : STEPS; }
};

}  // namespace rwkv_nb
