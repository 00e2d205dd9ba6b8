// WKV-7, -6 and -5 on GPUs. Per head, with the state S [V,K] (value, key):
//   WKV-7  sa_t = S_{t-1} a_t;  S_t = S_{t-1} diag(d_t) + v_t k_tᵀ + sa_t b_tᵀ;  y_t = S_t r_t
//   WKV-6  y_t = (S_{t-1} + v_t (u k_t)ᵀ) r_t;  S_t = S_{t-1} diag(d_t) + v_t k_tᵀ;  WKV-5: one d for all steps
//
// Backward, with G_t the gradient at S_t, gb_t = G_t b_t and q_t = v_t · dy_t:
//   values, over rows of G, back in time: forward with the roles exchanged
//     WKV-7  G_t = dy_t r_tᵀ + G_{t+1} diag(d_{t+1}) + gb_{t+1} a_{t+1}ᵀ;  dv = G k
//     WKV-6  G_{t-1} = G_t diag(d_t) + dy_t r_tᵀ;  dv = (G + dy (u r)ᵀ) k
//   keys, over columns of S and G, a chunk of steps at a time: forward in S from the state saved before the chunk
//     WKV-7  dr = S_tᵀ dy, da = S_{t-1}ᵀ gb        WKV-6  dr = S_{t-1}ᵀ dy + u k q
//   then back in G
//     WKV-7  dk = Gᵀ v, db = Gᵀ sa                 WKV-6  dk = Gᵀ v + u r q, du = Σ_t r k q
//   The decay's gradient needs no S beside G: of φ_t = Σ_v G_t ⊙ S_t, each step's part x_t = Σ_v G_t ⊙ S_{t-1} d_t is
//   what remains when the step's other parts (k dk and its like) are taken off, and φ is summed anew for each chunk.
// Nothing is divided by a decay, which may be 0.
//
// Rows of S and G are independent, and so are columns once sa and gb are there. Shared memory, which hands each number
// to the threads that need it, is the bottleneck; so a thread works on four rows (columns) with each number that it
// reads. Where there are few heads, waiting is: then a head's rows are split over four blocks, and time, in the pass
// over columns, into pieces.
#include "wkv_keys.cuh"
#include "wkv_values.cuh"

namespace rwkv_nb {
namespace {

constexpr int64_t FEW = 128;  // heads, about as many as there are multiprocessors: below, a head has four blocks

template <bool DELTA, bool BACK, typename Real, typename Decay, typename... Args>
void pass_values(const Wkv& x, void* stream, Inputs<Real, Decay> in, Args... args) {
  const int64_t heads = x.B * x.H, pieces = pieces_of(heads, x.T), piece = piece_of(heads, x.T);
  if (heads < FEW) LAUNCH(heads * 4, 128, stream, (values<Real, Decay, 128, 8, 1, DELTA, BACK>), in, args..., pieces, piece);
  else LAUNCH(heads, 128, stream, (values<Real, Decay, 128, 8, 4, DELTA, BACK>), in, args..., pieces, piece);
}

template <bool DELTA, typename Real, typename Decay, typename... Args>
void pass_keys(const Wkv& x, void* stream, Inputs<Real, Decay> in, Args... args) {
  const int64_t heads = x.B * x.H, pieces = pieces_of(heads, x.T), piece = piece_of(heads, x.T);
  constexpr int THREADS = sizeof(Real) == 2 ? 64 : 128, EACH = 256 / THREADS;  // four of float's would spill
  LAUNCH(heads * 2 * pieces, THREADS, stream, (keys<Real, Decay, THREADS, 8, EACH, DELTA>), in, args..., pieces, piece);
}

template <bool DELTA, typename Real, typename Decay> void run(const Wkv& x, void* stream, bool back) {
  const auto real = [](const void* p) { return static_cast<const Real*>(p); };
  const auto room = [](void* p) { return static_cast<Real*>(p); };
  Inputs<Real, Decay> in{x.T, x.H, x.once ? 0 : x.H * N, x.begins, real(x.r), real(x.k), real(x.v), real(x.a), real(x.b),
                         static_cast<const Decay*>(x.w), x.u};
  float* const none = nullptr;
  if (!back) return pass_values<DELTA, false>(x, stream, in, in.v, x.state, room(x.y), x.sa, x.last, x.save);
  auto exchanged = in;
  if (!DELTA) exchanged.r = in.k, exchanged.k = in.r;
  pass_values<DELTA, true>(x, stream, exchanged, real(x.dy), x.dlast, room(x.dv), x.gb, x.dstate, x.gs);
  pass_keys<DELTA>(x, stream, in, x.sa, x.gb, x.save, x.gs, real(x.dy), room(x.dr), x.once ? nullptr : room(x.dw),
                   x.once ? static_cast<float*>(x.dw) : none, room(x.dk), room(x.da), room(x.db), x.du);
}

template <typename Real> void run(const Wkv& x, void* stream, bool back) {
  if (x.a) run<true, Real, Real>(x, stream, back);
  else if (x.once) run<false, Real, float>(x, stream, back);
  else run<false, Real, Real>(x, stream, back);
}

int run(const Wkv& x, void* stream, bool back) {
  if (x.N != N || x.type < 0 || x.type > 2) return REFUSED;
  if (x.B * x.H == 0) return 0;
  if (x.type == 0) run<float>(x, stream, back);
  else if (x.type == 1) run<__nv_bfloat16>(x, stream, back);
  else run<__half>(x, stream, back);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace
}  // namespace rwkv_nb

extern "C" int rwkv_nb_wkv_forward(const rwkv_nb::Wkv* x, void* stream) { return rwkv_nb::run(*x, stream, false); }
extern "C" int rwkv_nb_wkv_backward(const rwkv_nb::Wkv* x, void* stream) { return rwkv_nb::run(*x, stream, true); }
