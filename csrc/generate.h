// What the implementations of the op `generate` share.
#pragma once

#include "layer.h"

namespace charrnn_fast {

// The op, as its schema in generate.cpp declares it.
using GenerateOp = Pair(const at::Tensor& tokens, const Optional& state, at::TensorList params,
                        const at::Tensor& head_weight, const Optional& head_bias,
                        const at::Tensor& uniforms, std::string_view mode, bool has_biases,
                        double temperature, int64_t top_k, double top_p);

struct GenerateSizes {
  int64_t N, S, V, H, layers;
  Cell cell;
};

// Checks the arguments against each other, not the values of tensors, and returns the sizes.
// RuntimeError for shapes and devices, ValueError for dtypes and options, as rnn_layer.
GenerateSizes check_generate(const at::Tensor& tokens, const Optional& state, at::TensorList params,
                             const at::Tensor& head_weight, const Optional& head_bias,
                             const at::Tensor& uniforms, std::string_view mode, bool has_biases,
                             double temperature, int64_t top_k, double top_p);

}  // namespace charrnn_fast
