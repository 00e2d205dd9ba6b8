// The GPU kernels as torch operators: the same schemas as the CPU's, so that one registration of shapes and gradients
// (rwkv_nb/wkv/kernels.py) serves both. No header of CUDA is needed. WKV_ON_HOST: the tests run the kernels on a CPU.
#include <ATen/ops/sum.h>
#include <string>
#include <tuple>
#include <vector>
#include "gpu_call.h"
#include "wkv_gpu.h"

namespace rwkv_nb {
namespace {

// One call: device, stream, size and number type; every tensor that a kernel sees goes through it, and is held.
struct Call : Wkv, GpuCall {
  std::vector<int64_t> sizes;  // of r and its like

  // w: [H,N] for WKV-5. more: a and b of WKV-7, or u. before: the first state, [B,H,N,N]; or int64 [texts + 1], where
  // each text begins and all end in the B·T steps, one row behind the other, for texts that know no state before.
  Call(const Tensor& r, const Tensor& w, const Tensor& k, const Tensor& v, std::initializer_list<const Tensor*> more,
       const OptTensor& before)
      : Wkv{}, GpuCall(r), sizes(r.sizes().vec()) {
    B = sizes[0], T = sizes[1], H = sizes[2], N = sizes[3], once = w.dim() == 2;
    if (before && !before->is_floating_point())
      begins = static_cast<const int64_t*>(read(before, at::kLong)), B = before->numel() - 1;
    else
      state = floats(before);
    const bool delta = more.size() == 2;
    const Tensor *const *const other = more.begin();
    for (const Tensor* x : {once ? &r : &w, &k, &v, delta ? other[0] : &r, delta ? other[1] : &r})
      if (x->scalar_type() != numbers) numbers = at::kFloat;  // mixed: nothing is rounded on the way in
    Wkv::type = GpuCall::type();
    this->r = read(r), this->k = read(k), this->v = read(v), this->w = read(w, once ? at::kFloat : numbers);
    if (delta) a = read(*other[0]), b = read(*other[1]);
    else u = floats(*other[0]);
  }
  Tensor like_r(void*& to) { return room(to, sizes); }
  int64_t pieces() const { return pieces_of(B * H, T); }
  void run(int (*pass)(const Wkv*, void*)) const { GpuCall::run(pass, static_cast<const Wkv*>(this)); }
};

// What is kept for backward: sa of WKV-7, then a state every STEPS steps.
int64_t sa_size(const Call& call, const Tensor& r) { return call.a ? r.numel() : 0; }

std::tuple<Tensor, Tensor, Tensor> forward(Call call, const Tensor& r, bool save) {
  const int64_t states = call.begins ? states_of(r.size(0), call.T, call.B) : call.B * chunks_of(call.T);
  const int64_t sa = sa_size(call, r);
  Tensor y = call.like_r(call.y), last = call.room(call.last, {call.begins ? 0 : call.B, call.H, call.N, call.N});
  Tensor kept = call.room(call.sa, {save ? sa + states * call.H * call.N * call.N : 0});
  call.save = call.sa ? call.sa + sa : nullptr;
  if (!sa) call.sa = nullptr;
  call.run(rwkv_nb_wkv_forward);
  return {y.to(r.scalar_type()), last, kept};
}

void backward(Call& call, const Tensor& r, const Tensor& kept, const OptTensor& dy, const OptTensor& dlast) {
  const Tensor gs = call.room(call.gs, {call.B, call.H, call.pieces(), call.N, call.N});
  call.sa = static_cast<float*>(kept.data_ptr());
  call.save = call.sa + sa_size(call, r);
  call.dy = call.read(dy), call.dlast = call.begins ? nullptr : call.floats(dlast);
  call.run(rwkv_nb_wkv_backward);
}

// A sum over [B,H,pieces,N] that leaves [H,N].
Tensor over_texts(const Tensor& x) { return x.sum(at::IntArrayRef{0, 2}); }

std::tuple<Tensor, Tensor, Tensor> wkv7(const Tensor& r, const Tensor& w, const Tensor& k, const Tensor& v,
                                        const Tensor& a, const Tensor& b, const OptTensor& before, bool save) {
  return forward(Call(r, w, k, v, {&a, &b}, before), r, save);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> wkv7_backward(
    const Tensor& r, const Tensor& w, const Tensor& k, const Tensor& v, const Tensor& a, const Tensor& b,
    const OptTensor& before, const Tensor& kept, const OptTensor& dy, const OptTensor& dlast) {
  Call call(r, w, k, v, {&a, &b}, before);
  Tensor dr = call.like_r(call.dr), dw = call.like_r(call.dw), dk = call.like_r(call.dk), dv = call.like_r(call.dv);
  Tensor da = call.like_r(call.da), db = call.like_r(call.db), gb = call.room(call.gb, r.sizes());
  Tensor dstate = call.room(call.dstate, {call.state ? call.B : 0, call.H, call.N, call.N});
  backward(call, r, kept, dy, dlast);
  return {dr.to(r.scalar_type()), dw.to(w.scalar_type()), dk.to(k.scalar_type()), dv.to(v.scalar_type()),
          da.to(a.scalar_type()), db.to(b.scalar_type()), dstate};
}

std::tuple<Tensor, Tensor, Tensor> wkv6(const Tensor& r, const Tensor& w, const Tensor& k, const Tensor& v,
                                        const Tensor& u, const OptTensor& before, bool save) {
  return forward(Call(r, w, k, v, {&u}, before), r, save);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> wkv6_backward(
    const Tensor& r, const Tensor& w, const Tensor& k, const Tensor& v, const Tensor& u, const OptTensor& before,
    const Tensor& kept, const OptTensor& dy, const OptTensor& dlast) {
  Call call(r, w, k, v, {&u}, before);
  const std::vector<int64_t> pieces{call.B, call.H, call.pieces(), call.N};
  float* dw_once = nullptr;
  Tensor dr = call.like_r(call.dr), dk = call.like_r(call.dk), dv = call.like_r(call.dv);
  Tensor dw = call.once ? call.room(dw_once, pieces) : call.like_r(call.dw), du = call.room(call.du, pieces);
  if (call.once) call.dw = dw_once;
  Tensor dstate = call.room(call.dstate, {call.state ? call.B : 0, call.H, call.N, call.N});
  backward(call, r, kept, dy, dlast);
  return {dr.to(r.scalar_type()), (call.once ? over_texts(dw) : dw).to(w.scalar_type()), dk.to(k.scalar_type()),
          dv.to(v.scalar_type()), over_texts(du).to(u.scalar_type()), dstate};
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
