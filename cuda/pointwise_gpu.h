// What the GPU's pointwise kernels (pointwise_gpu.cu) are given, by whoever registers them (pointwise_cuda.cpp).
// Neither torch nor CUDA here.
#pragma once
#include <cstdint>

namespace rwkv_nb {

constexpr int MOST_MIXES = 6;

// All tensors are contiguous, start at a multiple of 16 bytes and hold numbers of the one `type`: 0 float, 1 bfloat16,
// 2 half. C is a multiple of 4. Null: not there.

// y[i] = x + (x' - x) ⊙ mix[i], where x' is each token's predecessor: `last` before the first, or zeros where `starts`.
struct Shift {
  int type, mixes;
  int64_t B, T, C;
  bool each;                        // a mix is [B,T,C], else [C]
  const void *x, *last;             // [B,T,C], [B,C]
  const bool* starts;               // [B,T]: where a text begins; then there is no `last`
  const void* mix[MOST_MIXES];
  void* y[MOST_MIXES];              // [B,T,C]
  const void* dy[MOST_MIXES];       // backward
  void *dx, *dlast, *dmix[MOST_MIXES];  // dmix: where `each`
};

// RWKV-7's inputs of WKV, head by head of 64 channels, [M,H,64] all but k_k and k_a [H,64]:
//   w = log σ(decay) - ½    a = σ(rate)    value = v + (v_first - v) ⊙ σ(mix)    kk = k ⊙ k_k, of length 1 in a head
//   key = k ⊙ (1 + (a - 1) ⊙ k_a)    minus = -kk ⊙ a
struct Prepare {
  int type;
  int64_t M, H;
  const void *decay, *rate, *k, *v, *mix, *v_first, *k_k, *k_a;         // mix and v_first: null in block 0
  void *w, *key, *value, *kk, *minus;
  const void *d_w, *d_key, *d_value, *d_kk, *d_minus;                   // backward
  void *d_decay, *d_rate, *d_k, *d_v, *d_mix, *d_v_first;
};

// What follows WKV, head by head of 64 channels: out = (norm(y) ⊙ weight + bias + (Σ r ⊙ k ⊙ r_k) v) ⊙ gate.
// RWKV-6 and -5: without r, k, v and r_k, and the gate goes through SiLU.
struct Finish {
  int type;
  float eps;
  int64_t M, H;
  const void *y, *r, *k, *v, *gate, *r_k, *weight, *bias;
  void* out;
  const void* d_out;                                                    // backward
  void *d_y, *d_r, *d_k, *d_v, *d_gate;
};

}  // namespace rwkv_nb

// Each returns 0, -1 for a type that has no kernel, or a cudaError_t.
extern "C" int rwkv_nb_shift(const rwkv_nb::Shift* x, bool back, void* stream);
extern "C" int rwkv_nb_prepare(const rwkv_nb::Prepare* x, bool back, void* stream);
extern "C" int rwkv_nb_finish(const rwkv_nb::Finish* x, bool back, void* stream);
