// What the GPU kernels (wkv_gpu.cu) are given, by whoever registers them (wkv_cuda.cpp). Neither torch nor CUDA here.
#pragma once
#include <cstdint>

namespace rwkv_nb {

constexpr int STEPS = 16;     // distance of two saved states, and steps between two barriers
constexpr int REFUSED = -1;   // what is returned for a size or number type that has no kernel
constexpr int64_t BUSY = 512; // heads times pieces of time that keep a GPU busy

// Backward's keys need no step before theirs, given states and their gradients now and then: so where there are few
// heads, time is cut into pieces of `piece_of` chunks, worked on side by side.
inline int64_t chunks_of(int64_t T) { return (T + STEPS - 1) / STEPS; }
inline int64_t piece_of(int64_t heads, int64_t T) {
  const int64_t wanted = heads ? (BUSY + heads - 1) / heads : 1;
  return wanted < chunks_of(T) ? (chunks_of(T) + wanted - 1) / wanted : 1;
}
inline int64_t pieces_of(int64_t heads, int64_t T) {
  const int64_t piece = piece_of(heads, T);
  return (chunks_of(T) + piece - 1) / piece;
}

// Room for the states of rows of T steps that are `texts` texts, wherever these begin: text i's are numbered on from
// its first step's number / STEPS + i.
inline int64_t states_of(int64_t B, int64_t T, int64_t texts) { return B * T / STEPS + texts; }

// All tensors are contiguous and start at a multiple of 16 bytes. "Numbers" are of the one `type`.
struct Wkv {
  int type;                                // of the numbers: 0 float, 1 bfloat16, 2 half
  int64_t B, T, H, N;                      // B: rows, or texts where `begins` is there; T: of the longest, at the most
  const int64_t* begins;                   // null, or of texts one behind the other: where each begins, and all end
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
  void *dr, *dw, *dk, *dv, *da, *db;       // numbers; of WKV-5, dw is float [B,H,pieces,N]
  float *du, *dstate;                      // [B,H,pieces,N]; [B,H,N,N]
  float *gb, *gs;                          // room: [B,T,H,N] for WKV-7; [B,H,pieces,N,N]
};

}  // namespace rwkv_nb

// Returns 0, REFUSED or a cudaError_t.
extern "C" int rwkv_nb_wkv_forward(const rwkv_nb::Wkv* x, void* stream);
extern "C" int rwkv_nb_wkv_backward(const rwkv_nb::Wkv* x, void* stream);
