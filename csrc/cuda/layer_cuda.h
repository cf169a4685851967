// The ops on CUDA tensors, and what they need of a device.
#pragma once

#include <vector>

#include "generate.h"
#include "layer.h"
#include "rnn_cuda.h"

namespace charrnn_fast::cuda {

// How a device is to run the recurrence of a layer; an Error when the device cannot be asked.
LaunchPlan plan_layer(const Layer& layer, Dtype dtype, const at::Device& device);
// The stream that torch runs this device's work on now.
void* current_stream(const at::Device& device);

// Null when the kernels serve this call, else why they do not.
const char* why_composite(const Call& call);

LayerResult layer(const Call& call);
std::vector<at::Tensor> layer_backward(const Grads& grads, const Call& call, const at::Tensor& y,
                                       const Optional& saved, const c10::List<bool>& needs);
Generated generate(const GenerateCall& call);

}  // namespace charrnn_fast::cuda
