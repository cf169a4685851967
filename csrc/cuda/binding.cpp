// Registers the ops for CUDA tensors. It needs of torch only what a build without CUDA has too.
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/library.h>

#include <array>
#include <mutex>

#include "layer_cuda.h"

namespace charrnn_fast::cuda {

LaunchPlan plan_layer(const Layer& layer, Dtype dtype, const at::Device& device) {
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

LayerResult guarded_layer(const Call& call) {
  const c10::DeviceGuard guard(call.input.device());
  return layer(call);
}

std::vector<at::Tensor> guarded_layer_backward(const Grads& grads, const Call& call,
                                               const at::Tensor& y, const Optional& saved,
                                               const c10::List<bool>& needs) {
  const c10::DeviceGuard guard(call.input.device());
  return layer_backward(grads, call, y, saved, needs);
}

Generated guarded_generate(const GenerateCall& call) {
  const c10::DeviceGuard guard(call.head_weight.device());
  return generate(call);
}

}  // namespace

TORCH_LIBRARY_IMPL(charrnn_fast, CUDA, m) {
  m.impl("rnn_layer", TORCH_FN(LayerImpl<guarded_layer>::call));
  m.impl("rnn_layer_backward", TORCH_FN(LayerBackwardImpl<guarded_layer_backward>::call));
  m.impl("generate", TORCH_FN(generate_impl<guarded_generate>));
}

}  // namespace charrnn_fast::cuda
