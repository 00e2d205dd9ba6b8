// The GPU's pointwise kernels as torch operators. Gradients and shapes are in rwkv_nb/model/pointwise.py, which computes
// the same with PyTorch's own operations where these are not there. Formulas: pointwise_gpu.h.
#include <ATen/ops/empty_like.h>
#include <vector>
#include "gpu_call.h"
#include "pointwise_gpu.h"

namespace rwkv_nb {
namespace {

using Tensors = std::vector<Tensor>;

// -- token shift -------------------------------------------------------------------------------------------------------

// before: [B,C], or bool [B,T].
struct ShiftCall : Shift, GpuCall {
  ShiftCall(const Tensor& x, const Tensor& before, const Tensors& its) : Shift{}, GpuCall(x) {
    Shift::type = GpuCall::type(), mixes = static_cast<int>(its.size());
    B = x.size(0), T = x.size(1), C = x.size(2), each = its[0].numel() > C;
    TORCH_CHECK(mixes <= MOST_MIXES && C % 4 == 0, "token shift: ", mixes, " mixes of ", C, " channels");
    this->x = read(x);
    if (before.scalar_type() == at::kBool) starts = static_cast<const bool*>(read(before, at::kBool));
    else last = read(before);
    for (int i = 0; i < mixes; ++i) mix[i] = read(its[i]);
  }
};

Tensors shift(const Tensor& x, const Tensor& before, const Tensors& mixes) {
  ShiftCall call(x, before, mixes);
  Tensors out;
  for (int i = 0; i < call.mixes; ++i) out.push_back(call.room(call.y[i], x.sizes()));
  call.run(rwkv_nb_shift, static_cast<const Shift*>(&call), false);
  return out;
}

// The gradients of x, of `before` where it is [B,C], and of mixes that are [B,T,C].
Tensors shift_backward(const Tensor& x, const Tensor& before, const Tensors& mixes, const Tensors& dy) {
  ShiftCall call(x, before, mixes);
  Tensors out{call.room(call.dx, x.sizes())};
  if (call.last) out.push_back(call.room(call.dlast, {call.B, call.C}));
  for (int i = 0; i < call.mixes; ++i) {
    call.dy[i] = call.read(dy[i]);
    if (call.each) out.push_back(call.room(call.dmix[i], x.sizes()));
  }
  call.run(rwkv_nb_shift, static_cast<const Shift*>(&call), true);
  return out;
}

// -- before WKV-7 ------------------------------------------------------------------------------------------------------

struct PrepareCall : Prepare, GpuCall {
  PrepareCall(const Tensors& in, const OptTensor& mix, const OptTensor& v_first) : Prepare{}, GpuCall(in[2]) {
    Prepare::type = GpuCall::type();
    H = in[4].numel() / 64, M = H ? in[2].numel() / 64 / H : 0;
    decay = read(in[0]), rate = read(in[1]), k = read(in[2]), v = read(in[3]), k_k = read(in[4]), k_a = read(in[5]);
    this->mix = read(mix), this->v_first = read(v_first);
  }
};

// in: decay, rate, k, v [B,T,C], k_k, k_a [C]. Returns w, key, value, kk, minus.
Tensors prepare(const Tensors& in, const OptTensor& mix, const OptTensor& v_first) {
  PrepareCall call(in, mix, v_first);
  Tensors out;
  for (void** to : {&call.w, &call.key, &call.value, &call.kk, &call.minus}) out.push_back(call.room(*to, in[2].sizes()));
  call.run(rwkv_nb_prepare, static_cast<const Prepare*>(&call), false);
  return out;
}

// The gradients of decay, rate, k, v and, where they are there, mix and v_first. grads: at prepare's results, in order.
Tensors prepare_backward(const Tensors& in, const OptTensor& mix, const OptTensor& v_first, const Tensors& grads) {
  PrepareCall call(in, mix, v_first);
  call.d_w = call.read(grads[0]), call.d_key = call.read(grads[1]), call.d_value = call.read(grads[2]);
  call.d_kk = call.read(grads[3]), call.d_minus = call.read(grads[4]);
  std::vector<void**> wanted{&call.d_decay, &call.d_rate, &call.d_k, &call.d_v};
  if (mix) wanted.insert(wanted.end(), {&call.d_mix, &call.d_v_first});
  Tensors out;
  for (void** to : wanted) out.push_back(call.room(*to, in[2].sizes()));
  call.run(rwkv_nb_prepare, static_cast<const Prepare*>(&call), true);
  return out;
}

// -- behind WKV --------------------------------------------------------------------------------------------------------

struct FinishCall : Finish, GpuCall {
  FinishCall(const Tensors& in, const Tensors& rkv, double eps) : Finish{}, GpuCall(in[0]) {
    Finish::type = GpuCall::type(), this->eps = static_cast<float>(eps);
    H = in[2].numel() / 64, M = H ? in[0].numel() / 64 / H : 0;
    y = read(in[0]), gate = read(in[1]), weight = read(in[2]), bias = read(in[3]);
    if (!rkv.empty()) r = read(rkv[0]), k = read(rkv[1]), v = read(rkv[2]), r_k = read(rkv[3]);
  }
};

// in: y, gate [B,T,C], weight, bias [C]; rkv: none, or r, k, v [B,T,C] and r_k [C].
Tensor finish(const Tensors& in, const Tensors& rkv, double eps) {
  FinishCall call(in, rkv, eps);
  Tensor out = call.room(call.out, in[1].sizes());
  call.run(rwkv_nb_finish, static_cast<const Finish*>(&call), false);
  return out;
}

// The gradients of y, gate and, where they are there, r, k and v.
Tensors finish_backward(const Tensors& in, const Tensors& rkv, double eps, const Tensor& d_out) {
  FinishCall call(in, rkv, eps);
  call.d_out = call.read(d_out);
  Tensors out{call.room(call.d_y, in[0].sizes()), call.room(call.d_gate, in[1].sizes())};
  if (!rkv.empty())
    for (void** to : {&call.d_r, &call.d_k, &call.d_v}) out.push_back(call.room(*to, rkv[0].sizes()));
  call.run(rwkv_nb_finish, static_cast<const Finish*>(&call), true);
  return out;
}

TORCH_LIBRARY_IMPL(rwkv_nb, DISPATCH_KEY, m) {
  m.impl("shift", shift);
  m.impl("shift_backward", shift_backward);
  m.impl("prepare", prepare);
  m.impl("prepare_backward", prepare_backward);
  m.impl("finish", finish);
  m.impl("finish_backward", finish_backward);
}

}  // namespace
}  // namespace rwkv_nb
