// The GPU's kernel of the loss as a torch operator; rwkv_nb/loss.py computes the same where it is not there.
#include "gpu_call.h"
#include "loss_gpu.h"

namespace rwkv_nb {
namespace {

// logits [M,V] become the gradient, in place, if `gradient`; targets int64 [M]. Returns fp32 [M,2]: ce and max².
Tensor loss(Tensor logits, const Tensor& targets, double max_logit, bool gradient) {
  GpuCall call(logits);
  TORCH_CHECK(logits.is_contiguous() && logits.dim() == 2 && logits.size(1) % 4 == 0, "loss: logits [M,V], V a 4 n");
  Loss x{call.type(), logits.size(0), logits.size(1), static_cast<float>(max_logit), logits.data_ptr()};
  x.targets = static_cast<const int64_t*>(call.read(targets, at::kLong)), x.gradient = gradient;
  Tensor sums = call.room(x.sums, {x.M, 2});
  call.run(rwkv_nb_loss, static_cast<const Loss*>(&x));
  return sums;
}

TORCH_LIBRARY_IMPL(rwkv_nb, DISPATCH_KEY, m) { m.impl("loss", loss); }

}  // namespace
}  // namespace rwkv_nb
