// WKV-7, -6 and -5 on CPUs as torch operators. From forward for backward WKV-7 keeps q, a row a step; others nothing.
#include "wkv_cpu_backward.h"
#include <ATen/Functions.h>
#include <torch/library.h>
#include <string>
#include <tuple>

namespace rwkv_nb {
namespace {

template <bool DELTA>
std::tuple<Tensor, Tensor, Tensor> forward(const Inputs& in, const Tensor& r, bool save) {
  const auto fp32 = r.options().dtype(at::kFloat);
  Tensor y = at::empty(r.sizes(), r.options()), last = at::empty({in.B, in.H, in.N, in.N}, fp32);
  Tensor q = at::empty({in.B, DELTA && save ? in.T : 0, in.H, in.N}, fp32);
  const ForwardArgs args{in, Sequence(y), last, save ? std::optional(Sequence(q)) : std::nullopt};
  for_heads<Forward<DELTA>>(in.B * in.H, in.tiles, args);
  return {y, last, q};
}

std::tuple<Tensor, Tensor, Tensor> forward7(const Tensor& r, const Tensor& w, const Tensor& k, const Tensor& v,
                                            const Tensor& a, const Tensor& b, const OptTensor& state, bool save) {
  return forward<true>(Inputs(r, w, k, v, a, b, Tensor(), state), r, save);
}

std::tuple<Tensor, Tensor, Tensor> forward6(const Tensor& r, const Tensor& w, const Tensor& k, const Tensor& v,
                                            const Tensor& u, const OptTensor& state, bool save) {
  return forward<false>(Inputs(r, w, k, v, r, r, u.to(at::kFloat).contiguous(), state), r, save);
}

// The gradients that a version has are written to those of `grads`; returns dstate.
template <bool DELTA>
Tensor backward(const Inputs& in, const Tensor& q, const OptTensor& dy, const OptTensor& dlast, const Gradients& to) {
  Tensor dstate = at::empty({in.state ? in.B : 0, in.H, in.N, in.N}, q.options());
  const BackwardArgs args{in, Sequence(q), dy ? std::optional(Sequence(*dy)) : std::nullopt,
                          dlast ? OptTensor(dlast->contiguous()) : dlast, to, dstate};
  for_heads<Backward<DELTA>>(in.B * in.H, in.tiles, args);
  return dstate;
}

Tensor like(const Tensor& x) { return at::empty(x.sizes(), x.options()); }

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward7(
    const Tensor& r, const Tensor& w, const Tensor& k, const Tensor& v, const Tensor& a, const Tensor& b,
    const OptTensor& state, const Tensor& q, const OptTensor& dy, const OptTensor& dlast) {
  Tensor dr = like(r), dw = like(w), dk = like(k), dv = like(v), da = like(a), db = like(b);
  const Gradients to{Sequence(dr), Sequence(dw), Sequence(dk), Sequence(dv), Sequence(da), Sequence(db), {}, {}};
  const Tensor dstate = backward<true>(Inputs(r, w, k, v, a, b, Tensor(), state), q, dy, dlast, to);
  return {dr, dw, dk, dv, da, db, dstate};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward6(
    const Tensor& r, const Tensor& w, const Tensor& k, const Tensor& v, const Tensor& u, const OptTensor& state,
    const Tensor& saved, const OptTensor& dy, const OptTensor& dlast) {
  const Inputs in(r, w, k, v, r, r, u.to(at::kFloat).contiguous(), state);
  const bool each_step = w.dim() == 4;
  Tensor dr = like(r), dw = like(w), dk = like(k), dv = like(v);
  Tensor sum_w = at::empty({in.B, in.H, in.N}, saved.options()), sum_u = like(sum_w);
  const Gradients to{std::nullopt, each_step ? std::optional(Sequence(dw)) : std::nullopt, Sequence(dk), Sequence(dv),
                     Sequence(dr), std::nullopt, sum_w, sum_u};
  const Tensor dstate = backward<false>(in, saved, dy, dlast, to);
  return {dr, each_step ? dw : sum_w.sum(0).to(w.scalar_type()), dk, dv, sum_u.sum(0).to(u.scalar_type()), dstate};
}

TORCH_LIBRARY_FRAGMENT(rwkv_nb, m) {
  const auto define = [&](const std::string& name, const std::string& inputs, const std::string& grads) {
    const std::string results = ", Tensor? state, bool save) -> (Tensor y, Tensor state, Tensor saved)";
    const std::string more = ", Tensor? state, Tensor saved, Tensor? dy, Tensor? dstate) -> (";
    m.def(torch::schema((name + "(" + inputs + results).c_str()));
    m.def(torch::schema((name + "_backward(" + inputs + more + grads + ")").c_str()));
  };
  define("wkv7", "Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor b",
         "Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor");
  for (const auto* name : {"wkv6", "wkv5"})
    define(name, "Tensor r, Tensor w, Tensor k, Tensor v, Tensor u", "Tensor, Tensor, Tensor, Tensor, Tensor, Tensor");
  // A GPU's alone (pointwise_cuda.cpp, loss_cuda.cpp), known here too so that the memory of its steps can be told.
  m.def("shift(Tensor x, Tensor before, Tensor[] mixes) -> Tensor[]");
  m.def("shift_backward(Tensor x, Tensor before, Tensor[] mixes, Tensor[] dy) -> Tensor[]");
  m.def("prepare(Tensor[] inputs, Tensor? mix, Tensor? v_first) -> Tensor[]");
  m.def("prepare_backward(Tensor[] inputs, Tensor? mix, Tensor? v_first, Tensor[] grads) -> Tensor[]");
  m.def("finish(Tensor[] inputs, Tensor[] rkv, float eps) -> Tensor");
  m.def("finish_backward(Tensor[] inputs, Tensor[] rkv, float eps, Tensor d_out) -> Tensor[]");
  m.def("loss(Tensor(a!) logits, Tensor targets, float max_logit, bool gradient) -> Tensor");
}

TORCH_LIBRARY_IMPL(rwkv_nb, CPU, m) {
  m.impl("wkv7", forward7);
  m.impl("wkv7_backward", backward7);
  for (const std::string name : {"wkv6", "wkv5"}) {
    m.impl(name.c_str(), forward6);
    m.impl((name + "_backward").c_str(), backward6);
  }
}

}  // namespace
}  // namespace rwkv_nb
