// The loss of rows of logits and its gradient in their place, on GPUs: a block for a row, which it reads twice and
// writes once. No copy in float is made.
#include "loss_gpu.h"
#include "wkv_gpu.cuh"

namespace rwkv_nb {
namespace {

constexpr int THREADS = 512, WARPS = THREADS / 32;

// Of some logits: the largest, its place, and Σ exp(z - largest).
struct Part {
  float top, sum;
  int where;
  __device__ void add(const Part& other) {  // of two equally large ones the first is taken
    const bool theirs = other.top > top || (other.top == top && other.where < where);
    const Part high = theirs ? other : *this, low = theirs ? *this : other;
    *this = {high.top, high.sum + (low.sum ? low.sum * expf(low.top - high.top) : 0), high.where};
  }
};

template <typename Real> __global__ void __launch_bounds__(THREADS) loss(Loss x) {
  Quad<Real>* const row = static_cast<Quad<Real>*>(x.logits) + blockIdx.x * (x.V / 4);
  const int quads = x.V / 4;
  __shared__ Part parts[WARPS];

  Part mine{-INFINITY, 0, 0};
  for (int i = threadIdx.x; i < quads; i += THREADS) {
    const Quads z = unpack(row[i]);
    for (int f = 0; f < 4; ++f) {
      if (z.x[f] > mine.top) mine = {z.x[f], mine.sum * expf(mine.top - z.x[f]) + 1, i * 4 + f};
      else mine.sum += expf(z.x[f] - mine.top);  // a NaN stays one
    }
  }
  for (int far = 1; far < 32; far *= 2)
    mine.add({__shfl_xor_sync(0xffffffffu, mine.top, far), __shfl_xor_sync(0xffffffffu, mine.sum, far),
              static_cast<int>(__shfl_xor_sync(0xffffffffu, mine.where, far))});
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = mine;
  __syncthreads();
  Part all = parts[0];
  for (int i = 1; i < WARPS; ++i) all.add(parts[i]);

  const int64_t target = x.targets[blockIdx.x];
  if (threadIdx.x == 0) {
    const float z = to_float(static_cast<const Real*>(x.logits)[blockIdx.x * x.V + target]);
    x.sums[blockIdx.x * 2] = all.top - z + logf(all.sum);
    x.sums[blockIdx.x * 2 + 1] = all.top * all.top;
  }
  if (!x.gradient) return;
  __syncthreads();  // the target's logit has been read
  for (int i = threadIdx.x; i < quads; i += THREADS) {
    const Quads z = unpack(row[i]);
    Quads d;
    for (int f = 0; f < 4; ++f)
      d.x[f] = expf(z.x[f] - all.top) / all.sum - (i * 4 + f == target ? 1 : 0) +
               (i * 4 + f == all.where ? x.max_logit * all.top : 0);
    row[i] = pack<Real>(d);
  }
}

}  // namespace
}  // namespace rwkv_nb

extern "C" int rwkv_nb_loss(const rwkv_nb::Loss* given, void* stream) {
  using namespace rwkv_nb;
  const Loss x = *given;
  if (x.M == 0) return 0;
  if (x.type == 0) LAUNCH(x.M, THREADS, stream, loss<float>, x);
  else if (x.type == 1) LAUNCH(x.M, THREADS, stream, loss<__nv_bfloat16>, x);
  else if (x.type == 2) LAUNCH(x.M, THREADS, stream, loss<__half>, x);
  else return REFUSED;
  return static_cast<int>(cudaGetLastError());
}
