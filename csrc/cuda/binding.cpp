// Registers the ops for CUDA tensors. It needs of torch only what a build without CUDA has too.
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/library.h>

#include <array>
#include <mutex>

#include "layer_cuda.h"

namespace charrnn_fast::cuda {

Plan plan_layer(const Layer& layer, Dtype dtype, const at::Device& device) {
  constexpr int kMaxDevices = 64;
  static std::array<DeviceLimits, kMaxDevices> limits;
  static std::array<const char*, kMaxDevices> errors;
  static std::array<std::once_flag, kMaxDevices> once;
  const int i = device.index();
  TORCH_CHECK(i >= 0 && i < kMaxDevices, "charrnn_fast: no such device: ", device);
  std::call_once(once[i], [&] { errors[i] = charrnn_fast_cuda_limits(i, &limits[i]); });
  TORCH_CHECK(errors[i] == nullptr, "charrnn_fast: ", device, " cannot be asked: ", errors[i]);
  return plan_recurrence(layer.H, layer.B, layer.D, dtype, limits[i]);
}

void* current_stream(const at::Device& device) {
  return c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle();
}

namespace {

Pair guarded_layer(const at::Tensor& input, const Optional& hx, at::TensorList weights,
                   const Optional& batch_sizes, const Optional& lengths, std::string_view mode,
                   bool has_biases) {
  const c10::DeviceGuard guard(input.device());
  return layer(input, hx, weights, batch_sizes, lengths, mode, has_biases);
}

std::vector<at::Tensor> guarded_layer_backward(const Optional& dy, const Optional& dh_n,
                                               const at::Tensor& input, const Optional& hx,
                                               at::TensorList weights, const at::Tensor& y,
                                               const Optional& batch_sizes, const Optional& lengths,
                                               std::string_view mode, bool has_biases,
                                               c10::List<bool> needs) {
  const c10::DeviceGuard guard(input.device());
  return layer_backward(dy, dh_n, input, hx, weights, y, batch_sizes, lengths, mode, has_biases,
                        needs);
}

Pair guarded_generate(const at::Tensor& tokens, const Optional& state, at::TensorList params,
                      const at::Tensor& head_weight, const Optional& head_bias,
                      const at::Tensor& uniforms, std::string_view mode, bool has_biases,
                      double temperature, int64_t top_k, double top_p) {
  const c10::DeviceGuard guard(head_weight.device());
  return generate(tokens, state, params, head_weight, head_bias, uniforms, mode, has_biases,
                  temperature, top_k, top_p);
}

}  // namespace

TORCH_LIBRARY_IMPL(charrnn_fast, CUDA, m) {
  m.impl("rnn_layer", TORCH_FN(guarded_layer));
  m.impl("rnn_layer_backward", TORCH_FN(guarded_layer_backward));
  m.impl("generate", TORCH_FN(guarded_generate));
}

}  // namespace charrnn_fast::cuda
