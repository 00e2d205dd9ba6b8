// What the GPU's kernel of the loss (loss_gpu.cu) is given, by whoever registers it (loss_cuda.cpp). Neither torch nor
// CUDA here.
#pragma once
#include <cstdint>

namespace rwkv_nb {

// Each row of logits becomes the gradient of its loss, ce + ½ max_logit max². Contiguous, from a multiple of 16 bytes on.
struct Loss {
  int type;                 // of the logits: 0 float, 1 bfloat16, 2 half
  int64_t M, V;             // V is a multiple of 4
  float max_logit;
  void* logits;             // [M,V]
  const int64_t* targets;   // [M]
  float* sums;              // [M,2]: ce and max² of each row
  bool gradient;            // else the logits stay as they are
};

}  // namespace rwkv_nb

// Returns 0, -1 for a type that has no kernel, or a cudaError_t.
extern "C" int rwkv_nb_loss(const rwkv_nb::Loss* x, void* stream);
