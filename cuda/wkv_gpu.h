// What the GPU kernels (wkv_gpu.cu) are given, by whoever registers them (wkv_cuda.cpp). Neither torch nor CUDA here.
#pragma once
#include <cstdint>

namespace rwkv_nb {

constexpr int STEPS = 16;     // distance of two saved states, and steps between two barriers
constexpr int REFUSED = -1;   // what is returned for a size or number type that has no kernel

// All tensors are contiguous and start at a multiple of 16 bytes. "Numbers" are of the one `type`.
struct Wkv {
  int type;                                // of the numbers: 0 float, 1 bfloat16, 2 half
  int64_t B, T, H, N;
  bool once;                               // WKV-5: w is float [H,N]
  const void *r, *w, *k, *v, *a, *b;       // numbers [B,T,H,N]; a and b are null but for WKV-7
  const float* u;                          // [H,N], null for WKV-7
  float *sa, *save;                        // for backward, or null: [B,T,H,N] of WKV-7, [B,H,ceil(T/STEPS),N,N]
  // forward
  const float* state;                      // [B,H,N,N] or null
  void* y;
  float* last;
  // backward; dy, dlast and dstate may be null
  const void* dy;
  const float* dlast;
  void *dr, *dw, *dk, *dv, *da, *db;       // numbers; of WKV-5, dw is float [B,H,N]
  float *du, *dstate, *gb;                 // [B,H,N]; [B,H,N,N]; room of [B,T,H,N] for WKV-7
};

}  // namespace rwkv_nb

// Returns 0, REFUSED or a cudaError_t.
extern "C" int rwkv_nb_wkv_forward(const rwkv_nb::Wkv* x, void* stream);
extern "C" int rwkv_nb_wkv_backward(const rwkv_nb::Wkv* x, void* stream);
