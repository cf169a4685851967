// The ops: their schemas, the stack of layers, and what autocast and vmap make of a layer.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "layer.h"

namespace charrnn_fast {
namespace {

using at::Tensor;

std::vector<Tensor> composite_backward(const Optional& dy, const Optional& dh_n,
                                       const Tensor& input, const Optional& hx,
                                       at::TensorList weights, const Tensor& y,
                                       const Optional& batch_sizes, const Optional& lengths,
                                       std::string_view mode, bool has_biases,
                                       c10::List<bool> needs) {
  return composite::backward(dy, dh_n, input, hx, weights, y, batch_sizes, lengths, mode,
                             has_biases, needs);
}

// nn.RNN under autocast runs its matrix products, and so all of itself, in the lower precision.
template <c10::DispatchKey key, c10::DeviceType device>
Pair autocast_layer(const Tensor& input, const Optional& hx, at::TensorList weights,
                    const Optional& batch_sizes, const Optional& lengths, std::string_view mode,
                    bool has_biases) {
  c10::impl::ExcludeDispatchKeyGuard guard(key);
  const auto dtype = at::autocast::get_autocast_dtype(device);
  std::vector<Tensor> cast;
  cast.reserve(weights.size());
  for (const Tensor& weight : weights) {
    cast.push_back(at::autocast::cached_cast(dtype, weight, device));
  }
  return call_layer(at::autocast::cached_cast(dtype, input, device),
                    at::autocast::cached_cast(dtype, hx, device), cast, batch_sizes, lengths, mode,
                    has_biases);
}

}  // namespace

Pair rnn(const Tensor& input, const Optional& hx, at::TensorList params,
         const Optional& batch_sizes, const Optional& lengths, std::string_view mode,
         bool has_biases, int64_t num_layers, double dropout, bool train, bool bidirectional) {
  const size_t per_layer = (bidirectional ? 2 : 1) * (has_biases ? 4 : 2);
  TORCH_CHECK(num_layers > 0, "num_layers must be greater than zero, got ", num_layers);
  TORCH_CHECK(params.size() == num_layers * per_layer, "params must hold ", num_layers * per_layer,
              " tensors (num_layers=", num_layers, ", ", per_layer, " each), got ", params.size());
  if (num_layers == 1) {
    return call_layer(input, hx, params, batch_sizes, lengths, mode, has_biases);
  }

  const int64_t D = bidirectional ? 2 : 1;
  if (hx.has_value()) {
    TORCH_CHECK(hx->dim() == 3 && hx->sym_size(0) == num_layers * D, "Expected hidden of ",
                num_layers * D, " layers times directions, got size ", hx->sym_sizes());
  }
  Tensor y = input;
  std::vector<Tensor> h_n(num_layers);
  for (int64_t layer = 0; layer < num_layers; ++layer) {
    // Between layers, and in one call, as nn.RNN draws it: the same seed gives the same mask.
    if (layer > 0 && dropout != 0 && train) y = at::dropout(y, dropout, train);
    Optional h0 = hx.has_value() ? Optional(hx->narrow(0, layer * D, D)) : std::nullopt;
    if (layer > 0 && batch_sizes.has_value() && !h0.has_value() &&
        !h_n[0].sym_size(1).maybe_as_int().has_value()) {
      // Traced: the first layer made a symbol of B, and the others would each make another.
      h0 = at::zeros_like(h_n[0]);
    }
    std::tie(y, h_n[layer]) = call_layer(y, h0, params.slice(layer * per_layer, per_layer),
                                         batch_sizes, lengths, mode, has_biases);
  }
  return {y, at::cat(h_n)};
}

TORCH_LIBRARY(charrnn_fast, m) {
  m.def(
      "rnn(Tensor input, Tensor? hx, Tensor[] params, Tensor? batch_sizes, Tensor? lengths, "
      "str mode, bool has_biases, int num_layers, float dropout, bool train, bool bidirectional) "
      "-> (Tensor output, Tensor h_n)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "rnn_layer(Tensor input, Tensor? hx, Tensor[] weights, Tensor? batch_sizes, "
      "Tensor? lengths, str mode, bool has_biases) -> (Tensor y, Tensor h_n)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "rnn_layer_backward(Tensor? dy, Tensor? dh_n, Tensor input, Tensor? hx, Tensor[] weights, "
      "Tensor y, Tensor? batch_sizes, Tensor? lengths, str mode, bool has_biases, bool[] needs) "
      "-> Tensor[]",
      {at::Tag::pt2_compliant_tag});
  m.def("linear(Tensor input, Tensor weight, Tensor bias) -> Tensor", {at::Tag::pt2_compliant_tag});
  m.def("linear_backward(Tensor dy, Tensor input, Tensor weight) -> Tensor[]",
        {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(charrnn_fast, CompositeImplicitAutograd, m) { m.impl("rnn", TORCH_FN(rnn)); }

// Devices without kernels of their own.
TORCH_LIBRARY_IMPL(charrnn_fast, CompositeExplicitAutograd, m) {
  m.impl("rnn_layer", TORCH_FN(composite::forward));
  m.impl("rnn_layer_backward", TORCH_FN(composite_backward));
}

// torch.vmap, and the older one behind torch.autograd.grad(is_grads_batched=True). Their fallbacks
// come before the implicit composite, so `rnn` is named, too.
TORCH_LIBRARY_IMPL(charrnn_fast, FuncTorchBatched, m) {
  m.impl("rnn", TORCH_FN(rnn));
  m.impl("rnn_layer", TORCH_FN(composite::forward));
  m.impl("rnn_layer_backward", TORCH_FN(composite_backward));
}

TORCH_LIBRARY_IMPL(charrnn_fast, Batched, m) {
  m.impl("rnn", TORCH_FN(rnn));
  m.impl("rnn_layer", TORCH_FN(composite::forward));
  m.impl("rnn_layer_backward", TORCH_FN(composite_backward));
}

TORCH_LIBRARY_IMPL(charrnn_fast, AutocastCPU, m) {
  m.impl("rnn_layer", TORCH_FN((autocast_layer<c10::DispatchKey::AutocastCPU, at::kCPU>)));
}

TORCH_LIBRARY_IMPL(charrnn_fast, AutocastCUDA, m) {
  m.impl("rnn_layer", TORCH_FN((autocast_layer<c10::DispatchKey::AutocastCUDA, at::kCUDA>)));
}

}  // namespace charrnn_fast
