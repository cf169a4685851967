// What `generate` asks of its arguments, on every device.
#include <limits>

#include "generate.h"

namespace charrnn_fast {

using at::Tensor;

GenerateSizes check_generate(const Tensor& tokens, const Optional& state, at::TensorList params,
                             const Tensor& head_weight, const Optional& head_bias,
                             const Tensor& uniforms, std::string_view mode, bool has_biases,
                             double temperature, int64_t top_k, double top_p) {
  GenerateSizes sizes{};
  sizes.cell = parse_mode(mode);
  const size_t per_layer = has_biases ? 4 : 2;
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
  TORCH_CHECK(first.dim() == 2, "generate: weight_ih must have 2 dimensions, got ", first.dim());
  sizes.H = first.size(0);
  sizes.V = first.size(1);
  TORCH_CHECK(sizes.H > 0 && sizes.V > 0, "generate: weight_ih must not be empty, got size ",
              first.sizes());
  for (size_t i = 0; i < params.size(); ++i) {
    static constexpr const char* kNames[] = {"weight_ih", "weight_hh", "bias_ih", "bias_hh"};
    const size_t kind = i % per_layer;
    same(params[i], kNames[kind]);
    if (kind >= 2) {
      shape(params[i], kNames[kind], {sizes.H});
    } else {
      shape(params[i], kNames[kind], {sizes.H, i == 0 ? sizes.V : sizes.H});
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
  TORCH_CHECK_VALUE(temperature >= 0 && temperature < std::numeric_limits<double>::infinity(),
                    "generate: temperature must be 0 or more, got ", temperature);
  TORCH_CHECK_VALUE(top_k >= 0, "generate: top_k must be 0 (all) or more, got ", top_k);
  TORCH_CHECK_VALUE(top_p > 0 && top_p <= 1, "generate: top_p must be in (0, 1], got ", top_p);
  return sizes;
}

}  // namespace charrnn_fast
