// The op `generate` on CUDA tensors. Nothing here waits for the device, so the values of tokens and
// uniforms are not checked: a token outside the vocabulary makes scores of NaN, as in a gather.
#include <ATen/core/grad_mode.h>

#include <vector>

#include "layer_cuda.h"

namespace charrnn_fast::cuda {

using at::Tensor;

Generated generate(const GenerateCall& call) {
  const at::NoGradGuard no_grad;  // what is drawn has no gradient
  const GenerateSizes sizes = check_generate(call);
  TORCH_CHECK_NOT_IMPLEMENTED(sizes_of(sizes.cell).gates == 1,
                              "generate: on CUDA there is no kernel for ", std::string(call.mode));
  const at::TensorList params = call.params;
  const bool has_biases = call.has_biases;
  const auto dtype = params[0].scalar_type();
  TORCH_CHECK_NOT_IMPLEMENTED(dtype == at::kFloat,
                              "generate: weights on CUDA must be float32, got ", dtype);
  Tensor state = call.state.has_value()
                     ? call.state->clone(at::MemoryFormat::Contiguous)
                     : at::zeros({sizes.layers, sizes.S, sizes.H}, params[0].options());
  Tensor drawn = at::empty({sizes.N, sizes.S}, call.tokens.options());
  const Tensor none = at::empty({0}, params[0].options());
  if (sizes.N == 0 || sizes.S == 0) return {drawn, state, none};

  // Weights of one kind side by side, so that any number of layers goes into the same few pointers.
  const size_t kinds = weights_per_direction(has_biases);
  const auto all = [&](size_t kind, int64_t first_layer) {
    std::vector<Tensor> tensors;
    for (size_t i = first_layer * kinds + kind; i < params.size(); i += kinds) {
      tensors.push_back(params[i]);
    }
    return tensors.empty() ? Tensor() : at::stack(tensors).contiguous();
  };
  const Tensor W_ih = all(0, 1), W_hh = all(1, 0);
  Tensor table = params[0].t(), bias;
  if (has_biases) {
    table = table + (params[2] + params[3]);
    if (sizes.layers > 1) bias = all(2, 1) + all(3, 1);
  }
  table = table.contiguous();
  const Tensor tokens = call.tokens.contiguous(), uniforms = call.uniforms.contiguous();
  const Tensor head_weight = call.head_weight.contiguous();
  const Tensor head_bias = call.head_bias.has_value() ? call.head_bias->contiguous() : Tensor();
  Tensor workspace =
      at::empty({sizes.S, 2 * sizes.layers * sizes.H + 2 * sizes.V}, params[0].options());

  const auto data = [](const Tensor& tensor) {
    return tensor.defined() ? tensor.const_data_ptr<float>() : nullptr;
  };
  const DrawArgs args = {
      .S = sizes.S,
      .N = sizes.N,
      .H = sizes.H,
      .V = sizes.V,
      .layers = static_cast<int32_t>(sizes.layers),
      .cell = sizes.cell,
      .table = data(table),
      .W_ih = data(W_ih),
      .bias = data(bias),
      .W_hh = data(W_hh),
      .W_out = data(head_weight),
      .b_out = data(head_bias),
      .temperature = static_cast<float>(call.temperature),
      .top_k = call.top_k,
      .top_p = static_cast<float>(call.top_p),
      .uniforms = data(uniforms),
      .tokens = tokens.const_data_ptr<int64_t>(),
      .state = state.mutable_data_ptr<float>(),
      .drawn = drawn.mutable_data_ptr<int64_t>(),
      .workspace = workspace.mutable_data_ptr<float>(),
  };
  const char* error = charrnn_fast_cuda_generate(&args, current_stream(drawn.device()));
  TORCH_CHECK(error == nullptr, "charrnn_fast CUDA kernel: ", error);
  return {drawn, state, none};
}

}  // namespace charrnn_fast::cuda
