// What `generate` asks of its arguments, on every device.
#include <limits>

#include "generate.h"

namespace charrnn_fast {

using at::Tensor;

GenerateSizes check_generate(const GenerateCall& call) {
  const auto& [tokens, state, cell_state, params, head_weight, head_bias, uniforms, mode,
               has_biases, temperature, top_k, top_p] = call;
  GenerateSizes sizes{};
  sizes.cell = parse_mode(mode);
  const CellSizes cell = sizes_of(sizes.cell);
  const size_t per_layer = weights_per_direction(has_biases);
  TORCH_CHECK(!params.empty() && params.size() % per_layer == 0, "generate: params must hold ",
              per_layer, " tensors for each layer (has_biases=", has_biases ? "True" : "False",
              "), got ", params.size());
  sizes.layers = static_cast<int64_t>(params.size() / per_layer);
  const Tensor& first = params[0];
  const auto same = [&](const Tensor& tensor, const char* name) {
    TORCH_CHECK_VALUE(tensor.scalar_type() == first.scalar_type(), "generate: ", name, " dtype (",
                      tensor.scalar_type(), ") does not match weight dtype (", first.scalar_type(),
                      ")");
    TORCH_CHECK(tensor.device() == first.device(), "generate: ", name, " is on ", tensor.device(),
                " but weight_ih is on ", first.device());
    TORCH_CHECK(tensor.layout() == at::kStrided, "generate: ", name, " must be a dense tensor");
  };
  const auto shape = [](const Tensor& tensor, const char* name, at::IntArrayRef expected) {
    TORCH_CHECK(tensor.sizes() == expected, "generate: Expected ", name, " of size ", expected,
                ", got ", tensor.sizes());
  };
  for (const size_t i : {0, 1}) {
    TORCH_CHECK(params[i].dim() == 2, "generate: ", kWeightNames[i],
                " must have 2 dimensions, got ", params[i].dim());
  }
  sizes.H = params[1].size(1);
  sizes.V = first.size(1);
  TORCH_CHECK(sizes.H > 0 && sizes.V > 0, "generate: weights must not be empty, got sizes ",
              first.sizes(), " and ", params[1].sizes());
  const int64_t rows = cell.gates * sizes.H;
  for (size_t i = 0; i < params.size(); ++i) {
    const size_t kind = i % per_layer;
    same(params[i], kWeightNames[kind]);
    if (kind >= 2) {
      shape(params[i], kWeightNames[kind], {rows});
    } else {
      shape(params[i], kWeightNames[kind], {rows, i == 0 ? sizes.V : sizes.H});
    }
  }
  same(head_weight, "head_weight");
  shape(head_weight, "head_weight", {sizes.V, sizes.H});
  if (head_bias.has_value()) {
    same(*head_bias, "head_bias");
    shape(*head_bias, "head_bias", {sizes.V});
  }
  TORCH_CHECK(uniforms.dim() == 2, "generate: uniforms must have 2 dimensions [N, S], got ",
              uniforms.dim());
  if (uniforms.scalar_type() != at::kFloat) same(uniforms, "uniforms");
  TORCH_CHECK(uniforms.device() == first.device(), "generate: uniforms are on ", uniforms.device(),
              " but weight_ih is on ", first.device());
  sizes.N = uniforms.size(0);
  sizes.S = uniforms.size(1);
  TORCH_CHECK_VALUE(tokens.scalar_type() == at::kLong, "generate: tokens must be int64, got ",
                    tokens.scalar_type());
  TORCH_CHECK(tokens.device() == first.device(), "generate: tokens are on ", tokens.device(),
              " but weight_ih is on ", first.device());
  shape(tokens, "tokens", {sizes.S});
  if (state.has_value()) {
    same(*state, "state");
    shape(*state, "state", {sizes.layers, sizes.S, sizes.H});
  }
  if (cell_state.has_value()) {
    TORCH_CHECK_VALUE(cell.has_state, "generate: cell_state must be None: ", std::string(mode),
                      " has none");
    same(*cell_state, "cell_state");
    shape(*cell_state, "cell_state", {sizes.layers, sizes.S, sizes.H});
  }
  TORCH_CHECK_VALUE(temperature >= 0 && temperature < std::numeric_limits<double>::infinity(),
                    "generate: temperature must be 0 or more, got ", temperature);
  TORCH_CHECK_VALUE(top_k >= 0, "generate: top_k must be 0 (all) or more, got ", top_k);
  TORCH_CHECK_VALUE(top_p > 0 && top_p <= 1, "generate: top_p must be in (0, 1], got ", top_p);
  return sizes;
}

}  // namespace charrnn_fast
