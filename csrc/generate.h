// What the implementations of the op `generate` share.
#pragma once

#include <tuple>

#include "layer.h"

namespace charrnn_fast {

// The arguments of the op `generate`: the caller's, for the length of its call.
struct GenerateCall {
  const at::Tensor& tokens;
  const Optional& state;
  const Optional& cell_state;
  at::TensorList params;
  const at::Tensor& head_weight;
  const Optional& head_bias;
  const at::Tensor& uniforms;
  std::string_view mode;
  bool has_biases;
  double temperature;
  int64_t top_k;
  double top_p;
};

// drawn, state, cell_state: the last is empty where the cell has none.
using Generated = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// The op, as its schema in generate.cpp declares it, by a function of a GenerateCall.
template <Generated (*function)(const GenerateCall&)>
Generated generate_impl(const at::Tensor& tokens, const Optional& state, const Optional& cell_state,
                        at::TensorList params, const at::Tensor& head_weight,
                        const Optional& head_bias, const at::Tensor& uniforms,
                        std::string_view mode, bool has_biases, double temperature, int64_t top_k,
                        double top_p) {
  return function({tokens, state, cell_state, params, head_weight, head_bias, uniforms, mode,
                   has_biases, temperature, top_k, top_p});
}

struct GenerateSizes {
  int64_t N, S, V, H, layers;
  Cell cell;
};

// Checks the arguments against each other, not the values of tensors, and returns the sizes.
// RuntimeError for shapes and devices, ValueError for dtypes and options, as rnn_layer.
GenerateSizes check_generate(const GenerateCall& call);

}  // namespace charrnn_fast
