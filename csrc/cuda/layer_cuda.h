// The ops on CUDA tensors, and what they need of a device.
#pragma once

#include "generate.h"
#include "layer.h"
#include "rnn_cuda.h"

namespace charrnn_fast::cuda {

// How a device is to run the recurrence of a layer; an Error when the device cannot be asked.
Plan plan_layer(const Layer& layer, Dtype dtype, const at::Device& device);
// The stream that torch runs this device's work on now.
void* current_stream(const at::Device& device);

// Null when the kernels serve these tensors, else why they do not.
const char* why_composite(const at::Tensor& input, const Optional& hx, at::TensorList weights);

LayerOp layer;
LayerBackwardOp layer_backward;
GenerateOp generate;

}  // namespace charrnn_fast::cuda
