// The GPU kernels as torch operators: the same schemas as the CPU's, so that one registration of shapes and gradients
// (rwkv_nb/wkv/kernels.py) serves both. No header of CUDA is needed. WKV_ON_HOST: the tests run the kernels on a CPU.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>
#include <optional>
#include <tuple>
#include <string>

#ifdef WKV_ON_HOST
#define DISPATCH_KEY CPU
static void* current_stream(int) { return nullptr; }
#else
#define DISPATCH_KEY CUDA
// Torch's own, of its stable ABI; weak, for a torch without CUDA has none, and tests load this library there too.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
static void* current_stream(int device) {
  void* stream = nullptr;
  TORCH_CHECK(aoti_torch_get_current_cuda_stream && aoti_torch_get_current_cuda_stream(device, &stream) == 0,
              "this torch has no CUDA stream");
  return stream;
}
#endif

extern "C" {
int rwkv_nb_wkv7_forward(int, int64_t, int64_t, int64_t, int64_t, const void* const*, const float*, void*, float*,
                         float*, float*, void*);
int rwkv_nb_wkv7_backward(int, int64_t, int64_t, int64_t, int64_t, const void* const*, const float*, const float*,
                          const void*, const float*, float*, void* const*, float*, void*);
int rwkv_nb_wkv6_forward(int, int64_t, int64_t, int64_t, int64_t, const void* const*, const float*, const float*,
                         const float*, void*, float*, float*, void*);
int rwkv_nb_wkv6_backward(int, int64_t, int64_t, int64_t, int64_t, const void* const*, const float*, const float*,
                          const float*, const void*, const float*, void* const*, float*, float*, float*, void*);
}

namespace rwkv_nb {
namespace {

using at::Tensor;
using OptTensor = std::optional<Tensor>;
constexpr int64_t SAVE = 16;  // as in wkv_gpu.cuh

// One call's device, stream, size and number type; every tensor that a kernel sees goes through it.
struct Call {
  c10::DeviceGuard guard;
  at::ScalarType type;
  int64_t B, T, H, N;
  at::TensorOptions numbers, fp32;
  void* stream;

  Call(const Tensor& r, std::initializer_list<const Tensor*> others)
      : guard(r.device()), type(r.scalar_type()), B(r.size(0)), T(r.size(1)), H(r.size(2)), N(r.size(3)),
        stream(current_stream(guard.current_device().index())) {
    for (const Tensor* x : others)
      if (x->scalar_type() != type) type = at::kFloat;  // mixed: nothing is rounded on the way in
    TORCH_CHECK(type == at::kFloat || type == at::kBFloat16 || type == at::kHalf, "WKV on the GPU takes float32, ",
                "bfloat16 and float16, not ", type);
    numbers = r.options().dtype(type), fp32 = r.options().dtype(at::kFloat);
  }
  int code() const { return type == at::kFloat ? 0 : type == at::kBFloat16 ? 1 : 2; }
  // Whole, and where four numbers can be read at once.
  Tensor ready(const Tensor& x, at::ScalarType as) const {
    const Tensor y = x.to(as).contiguous();
    return reinterpret_cast<uintptr_t>(y.const_data_ptr()) % 16 ? y.clone() : y;
  }
  Tensor ready(const Tensor& x) const { return ready(x, type); }
  OptTensor ready(const OptTensor& x, at::ScalarType as) const { return x ? OptTensor(ready(*x, as)) : x; }
  Tensor like_r() const { return at::empty({B, T, H, N}, numbers); }
  Tensor rows() const { return at::empty({B, T, H, N}, fp32); }
  Tensor states(int64_t b) const { return at::empty({b, H, N, N}, fp32); }
  int64_t states_saved() const { return B * H * ((T + SAVE - 1) / SAVE) * N * N; }
  void check(int error) const {
    TORCH_CHECK(error == 0, "WKV on the GPU failed: ", error < 0 ? "it takes heads of 64 channels, not " :
                "CUDA error ", error < 0 ? N : error);
  }
};

const void* read(const OptTensor& x) { return x ? x->const_data_ptr() : nullptr; }
const float* floats(const OptTensor& x) { return static_cast<const float*>(read(x)); }
float* room(const Tensor& x) { return x.numel() ? static_cast<float*>(x.data_ptr()) : nullptr; }

std::tuple<Tensor, Tensor, Tensor> wkv7(const Tensor& r, const Tensor& w, const Tensor& k, const Tensor& v,
                                        const Tensor& a, const Tensor& b, const OptTensor& state, bool save) {
  const Call call(r, {&w, &k, &v, &a, &b});
  const Tensor in[] = {call.ready(r), call.ready(w), call.ready(k), call.ready(v), call.ready(a), call.ready(b)};
  const void* x[6];
  for (int i = 0; i < 6; ++i) x[i] = in[i].const_data_ptr();
  const OptTensor from = call.ready(state, at::kFloat);
  Tensor y = call.like_r(), last = call.states(call.B);
  Tensor kept = at::empty({save ? r.numel() + call.states_saved() : 0}, call.fp32);  // sa, then a state every SAVE steps
  float* const sa = room(kept);
  call.check(rwkv_nb_wkv7_forward(call.code(), call.B, call.T, call.H, call.N, x, floats(from), y.data_ptr(), room(last),
                                  sa, sa ? sa + r.numel() : nullptr, call.stream));
  return {y.to(r.scalar_type()), last, kept};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> wkv7_backward(
    const Tensor& r, const Tensor& w, const Tensor& k, const Tensor& v, const Tensor& a, const Tensor& b,
    const OptTensor& state, const Tensor& kept, const OptTensor& dy, const OptTensor& dlast) {
  const Call call(r, {&w, &k, &v, &a, &b});
  const Tensor in[] = {call.ready(r), call.ready(w), call.ready(k), call.ready(v), call.ready(a), call.ready(b)};
  const Tensor out[] = {call.like_r(), call.like_r(), call.like_r(), call.like_r(), call.like_r(), call.like_r()};
  const void* x[6];
  void* dx[6];
  for (int i = 0; i < 6; ++i) x[i] = in[i].const_data_ptr(), dx[i] = out[i].data_ptr();
  const OptTensor dy_ = call.ready(dy, call.type), dlast_ = call.ready(dlast, at::kFloat);
  Tensor gb = call.rows(), dstate = call.states(state ? call.B : 0);
  const float* const sa = floats(kept);
  call.check(rwkv_nb_wkv7_backward(call.code(), call.B, call.T, call.H, call.N, x, sa, sa + r.numel(), read(dy_),
                                   floats(dlast_), room(gb), dx, room(dstate), call.stream));
  return {out[0].to(r.scalar_type()), out[1].to(w.scalar_type()), out[2].to(k.scalar_type()),
          out[3].to(v.scalar_type()), out[4].to(a.scalar_type()), out[5].to(b.scalar_type()), dstate};
}

// WKV-5 has one w [H,N] for all steps; it and u are read as float32.
struct Call6 : Call {
  Tensor r, k, v, u;
  OptTensor w, once;
  const void* x[4];

  Call6(const Tensor& r, const Tensor& w, const Tensor& k, const Tensor& v, const Tensor& u)
      : Call(r, {w.dim() == 4 ? &w : &r, &k, &v}), r(ready(r)), k(ready(k)), v(ready(v)), u(ready(u, at::kFloat)) {
    (w.dim() == 4 ? this->w : once) = ready(w, w.dim() == 4 ? type : at::kFloat);
    x[0] = read(this->r), x[1] = read(this->w), x[2] = read(this->k), x[3] = read(this->v);
  }
};

std::tuple<Tensor, Tensor, Tensor> wkv6(const Tensor& r, const Tensor& w, const Tensor& k, const Tensor& v,
                                        const Tensor& u, const OptTensor& state, bool save) {
  const Call6 call(r, w, k, v, u);
  const OptTensor from = call.ready(state, at::kFloat);
  Tensor y = call.like_r(), last = call.states(call.B), kept = at::empty({save ? call.states_saved() : 0}, call.fp32);
  call.check(rwkv_nb_wkv6_forward(call.code(), call.B, call.T, call.H, call.N, call.x, floats(call.once), floats(call.u),
                                  floats(from), y.data_ptr(), room(last), room(kept), call.stream));
  return {y.to(r.scalar_type()), last, kept};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> wkv6_backward(
    const Tensor& r, const Tensor& w, const Tensor& k, const Tensor& v, const Tensor& u, const OptTensor& state,
    const Tensor& kept, const OptTensor& dy, const OptTensor& dlast) {
  const Call6 call(r, w, k, v, u);
  const OptTensor dy_ = call.ready(dy, call.type), dlast_ = call.ready(dlast, at::kFloat);
  Tensor dr = call.like_r(), dk = call.like_r(), dv = call.like_r(), dstate = call.states(state ? call.B : 0);
  Tensor du = at::empty({call.B, call.H, call.N}, call.fp32), dw = call.w ? call.like_r() : at::empty_like(du);
  void* dx[] = {dr.data_ptr(), call.w ? dw.data_ptr() : nullptr, dk.data_ptr(), dv.data_ptr()};
  call.check(rwkv_nb_wkv6_backward(call.code(), call.B, call.T, call.H, call.N, call.x, floats(call.once),
                                   floats(call.u), floats(kept), read(dy_), floats(dlast_), dx,
                                   call.w ? nullptr : room(dw), room(du), room(dstate), call.stream));
  if (!call.w) dw = dw.sum(0);
  return {dr.to(r.scalar_type()), dw.to(w.scalar_type()), dk.to(k.scalar_type()), dv.to(v.scalar_type()),
          du.sum(0).to(u.scalar_type()), dstate};
}

TORCH_LIBRARY_IMPL(rwkv_nb, DISPATCH_KEY, m) {
  m.impl("wkv7", wkv7);
  m.impl("wkv7_backward", wkv7_backward);
  for (const char* name : {"wkv6", "wkv5"}) {
    m.impl(name, wkv6);
    m.impl((std::string(name) + "_backward").c_str(), wkv6_backward);
  }
}

}  // namespace
}  // namespace rwkv_nb
