// The ops: their schemas, the stack of layers, and what autocast and vmap make of a layer.
#include <ATen/autocast_mode.h>
#include <torch/library.h>

#include "layer.h"

namespace charrnn_fast {
namespace {

using at::Tensor;

// nn.RNN under autocast runs its matrix products, and so all of itself, in the lower precision.
template <c10::DispatchKey key, c10::DeviceType device>
LayerResult autocast_layer(const Call& call) {
  c10::impl::ExcludeDispatchKeyGuard guard(key);
  const auto dtype = at::autocast::get_autocast_dtype(device);
  std::vector<Tensor> weights;
  weights.reserve(call.weights.size());
  for (const Tensor& weight : call.weights) {
    weights.push_back(at::autocast::cached_cast(dtype, weight, device));
  }
  const Tensor input = at::autocast::cached_cast(dtype, call.input, device);
  const Optional hx = at::autocast::cached_cast(dtype, call.hx, device);
  const Optional cx = at::autocast::cached_cast(dtype, call.cx, device);
  return call_layer({input, hx, cx, weights, call.batch_sizes, call.lengths, call.resets, call.mode,
                     call.has_biases, call.cells, call.keep});
}

StackResult rnn_op(const Tensor& input, const Optional& hx, const Optional& cx,
                   at::TensorList params, const Optional& batch_sizes, const Optional& lengths,
                   const Optional& resets, std::string_view mode, bool has_biases,
                   int64_t num_layers, double dropout, bool train, bool bidirectional, bool cells) {
  StackResult result =
      rnn({input, hx, cx, params, batch_sizes, lengths, resets, mode, has_biases, cells},
          num_layers, dropout, train, bidirectional);
  // TorchScript unpacks no list of a length that depends on the mode.
  for (Tensor* each : {&std::get<2>(result), &std::get<3>(result)}) {
    if (!each->defined()) *each = at::empty({0}, params[0].options());
  }
  return result;
}

}  // namespace

StackResult rnn(const Call& call, int64_t num_layers, double dropout, bool train,
                bool bidirectional) {
  const int64_t D = bidirectional ? 2 : 1;
  const int64_t per_layer = D * weights_per_direction(call.has_biases);
  TORCH_CHECK(num_layers > 0, "num_layers must be greater than zero, got ", num_layers);
  TORCH_CHECK(static_cast<int64_t>(call.weights.size()) == num_layers * per_layer,
              "params must hold ", num_layers * per_layer, " tensors (num_layers=", num_layers,
              ", ", per_layer, " each), got ", call.weights.size());
  if (num_layers == 1) {
    auto [y, h_n, c_n, cells, saved] = call_layer(call);
    return {std::move(y), std::move(h_n), std::move(c_n), std::move(cells)};
  }

  const auto check = [&](const Optional& state, const char* name) {
    TORCH_CHECK(!state.has_value() || (state->dim() == 3 && state->sym_size(0) == num_layers * D),
                "Expected ", name, " of ", num_layers * D, " layers times directions, got size ",
                state->sym_sizes());
  };
  check(call.hx, "hidden");
  check(call.cx, "cell state");
  Tensor y = call.input, cells;
  std::vector<Tensor> h_n(num_layers), c_n(num_layers);
  for (int64_t layer = 0; layer < num_layers; ++layer) {
    // Between layers, and in one call, as nn.RNN draws it: the same seed gives the same mask.
    if (layer > 0 && dropout != 0 && train) y = at::dropout(y, dropout, train);
    const auto own = [&](const Optional& states) {
      return states.has_value() ? Optional(states->narrow(0, layer * D, D)) : std::nullopt;
    };
    Optional hx = own(call.hx);
    const Optional cx = own(call.cx);
    if (layer > 0 && call.batch_sizes.has_value() && !hx.has_value() &&
        !h_n[0].sym_size(1).maybe_as_int().has_value()) {
      // Traced: the first layer made a symbol of B, and the others would each make another.
      hx = at::zeros_like(h_n[0]);
    }
    const Tensor input = y;
    const bool last = layer == num_layers - 1;
    std::tie(y, h_n[layer], c_n[layer], cells, std::ignore) = call_layer(
        {input, hx, cx, call.weights.slice(layer * per_layer, per_layer), call.batch_sizes,
         call.lengths, call.resets, call.mode, call.has_biases, call.cells && last});
  }
  const bool has_state = sizes_of(parse_mode(call.mode)).has_state;
  return {y, at::cat(h_n), has_state ? at::cat(c_n) : c_n[0], cells};
}

TORCH_LIBRARY(charrnn_fast, m) {
  m.def(
      "rnn(Tensor input, Tensor? hx, Tensor? cx, Tensor[] params, Tensor? batch_sizes, "
      "Tensor? lengths, Tensor? resets, str mode, bool has_biases, int num_layers, float dropout, "
      "bool train, bool bidirectional, bool cells) "
      "-> (Tensor output, Tensor h_n, Tensor c_n, Tensor cells)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "rnn_layer(Tensor input, Tensor? hx, Tensor? cx, Tensor[] weights, Tensor? batch_sizes, "
      "Tensor? lengths, Tensor? resets, str mode, bool has_biases, bool cells, bool keep) "
      "-> Tensor[]",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "rnn_layer_backward(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dcells, Tensor input, "
      "Tensor? hx, Tensor? cx, Tensor[] weights, Tensor y, Tensor? saved, Tensor? batch_sizes, "
      "Tensor? lengths, Tensor? resets, str mode, bool has_biases, bool[] needs) -> Tensor[]",
      {at::Tag::pt2_compliant_tag});
  m.def("linear(Tensor input, Tensor weight, Tensor bias) -> Tensor", {at::Tag::pt2_compliant_tag});
  m.def("linear_backward(Tensor dy, Tensor input, Tensor weight) -> Tensor[]",
        {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(charrnn_fast, CompositeImplicitAutograd, m) { m.impl("rnn", TORCH_FN(rnn_op)); }

// Devices without kernels of their own.
TORCH_LIBRARY_IMPL(charrnn_fast, CompositeExplicitAutograd, m) {
  m.impl("rnn_layer", TORCH_FN(LayerImpl<composite::forward>::call));
  m.impl("rnn_layer_backward", TORCH_FN(LayerBackwardImpl<composite::backward>::call));
}

// torch.vmap, and the older one behind torch.autograd.grad(is_grads_batched=True). Their fallbacks
// come before the implicit composite, so `rnn` is named, too.
TORCH_LIBRARY_IMPL(charrnn_fast, FuncTorchBatched, m) {
  m.impl("rnn", TORCH_FN(rnn_op));
  m.impl("rnn_layer", TORCH_FN(LayerImpl<composite::forward>::call));
  m.impl("rnn_layer_backward", TORCH_FN(LayerBackwardImpl<composite::backward>::call));
}

TORCH_LIBRARY_IMPL(charrnn_fast, Batched, m) {
  m.impl("rnn", TORCH_FN(rnn_op));
  m.impl("rnn_layer", TORCH_FN(LayerImpl<composite::forward>::call));
  m.impl("rnn_layer_backward", TORCH_FN(LayerBackwardImpl<composite::backward>::call));
}

TORCH_LIBRARY_IMPL(charrnn_fast, AutocastCPU, m) {
  m.impl("rnn_layer",
         TORCH_FN((LayerImpl<autocast_layer<c10::DispatchKey::AutocastCPU, at::kCPU>>::call)));
}

TORCH_LIBRARY_IMPL(charrnn_fast, AutocastCUDA, m) {
  m.impl("rnn_layer",
         TORCH_FN((LayerImpl<autocast_layer<c10::DispatchKey::AutocastCUDA, at::kCUDA>>::call)));
}

}  // namespace charrnn_fast
