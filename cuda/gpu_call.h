// One call of a GPU kernel from torch: its device, its stream, and the tensors it reads and writes, which are held
// meanwhile. No header of CUDA is needed. WKV_ON_HOST: the tests run the kernels on a CPU.
#pragma once
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>
#include <deque>
#include <optional>

namespace rwkv_nb {

using at::Tensor;
using OptTensor = std::optional<Tensor>;

#ifdef WKV_ON_HOST
#define DISPATCH_KEY CPU
inline void* current_stream(int) { return nullptr; }
#else
#define DISPATCH_KEY CUDA
// Torch's own, of its stable ABI; weak, for a torch without CUDA has none, and tests load this library there too.
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
inline void* current_stream(int device) {
  void* stream = nullptr;
  TORCH_CHECK(aoti_torch_get_current_cuda_stream && aoti_torch_get_current_cuda_stream(device, &stream) == 0,
              "this torch has no CUDA stream");
  return stream;
}
#endif

struct GpuCall {
  c10::DeviceGuard guard;
  at::TensorOptions on;
  at::ScalarType numbers;  // what most tensors are read as, and new ones made of
  std::deque<Tensor> held;

  explicit GpuCall(const Tensor& x) : guard(x.device()), on(x.options()), numbers(x.scalar_type()) {}

  // The kernels' number for `numbers`.
  int type() const {
    TORCH_CHECK(numbers == at::kFloat || numbers == at::kBFloat16 || numbers == at::kHalf,
                "the GPU kernels take float32, bfloat16 and float16, not ", numbers);
    return numbers == at::kFloat ? 0 : numbers == at::kBFloat16 ? 1 : 2;
  }
  // Whole, and where four numbers can be read at once. Null for a tensor that is not there.
  const void* read(const OptTensor& x, at::ScalarType as) {
    if (!x) return nullptr;
    TORCH_CHECK(x->device() == on.device(), "a tensor is on ", x->device(), ", another on ", on.device());
    const Tensor y = x->to(as).contiguous();
    held.push_back(reinterpret_cast<uintptr_t>(y.const_data_ptr()) % 16 ? y.clone() : y);
    return held.back().const_data_ptr();
  }
  const void* read(const OptTensor& x) { return read(x, numbers); }
  const float* floats(const OptTensor& x) { return static_cast<const float*>(read(x, at::kFloat)); }
  // New tensors; `to` is set to where they begin.
  Tensor room(void*& to, at::IntArrayRef size) {
    const Tensor x = at::empty(size, on.dtype(numbers));
    to = x.data_ptr();
    return x;
  }
  Tensor room(float*& to, at::IntArrayRef size) {
    const Tensor x = at::empty(size, on.dtype(at::kFloat));
    to = x.numel() ? static_cast<float*>(x.data_ptr()) : nullptr;
    return x;
  }
  template <typename Kernel, typename... Args> void run(Kernel kernel, Args... args) const {
    const int error = kernel(args..., current_stream(guard.current_device().index()));
    TORCH_CHECK(error == 0, "a kernel on the GPU failed: ", error < 0 ? "it takes heads of 64 channels" : "CUDA error ",
                error < 0 ? "" : std::to_string(error));
  }
};

}  // namespace rwkv_nb
