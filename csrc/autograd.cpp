// Autograd of the ops. A Node of our own rather than a torch::autograd::Function: it costs less
// per call and works inside torch.func's grad, which refuses the latter.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/library.h>

#include <mutex>
#include <type_traits>

#include "layer.h"

namespace charrnn_fast {

template <typename Op>
static c10::TypedOperatorHandle<Op> find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Op>();
}

const c10::TypedOperatorHandle<LayerBackwardOp>& layer_backward_op() {
  static const auto op = find_op<LayerBackwardOp>("charrnn_fast::rnn_layer_backward");
  return op;
}

namespace {

using at::Tensor;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

const auto& layer_op() {
  static const auto op = find_op<LayerOp>("charrnn_fast::rnn_layer");
  return op;
}

const auto& linear_op() {
  static const auto op = find_op<LinearOp>("charrnn_fast::linear");
  return op;
}

const auto& linear_backward_op() {
  static const auto op = find_op<LinearBackwardOp>("charrnn_fast::linear_backward");
  return op;
}

Optional defined_or_none(const Tensor& tensor) {
  return tensor.defined() ? Optional(tensor) : std::nullopt;
}

// torch >= 2.12 holds nodes in an intrusive_ptr, earlier releases in a shared_ptr.
using NodePtr = std::decay_t<decltype(std::declval<torch::autograd::Edge>().function)>;
template <typename T, typename Pointer = NodePtr>
auto make_node() {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<Node>>) {
    // Found by argument-dependent look-up, where it exists.
    return std::shared_ptr<T>(new T(), [](auto* node) { deleteNode(node); });
  } else {
    return c10::make_intrusive<T>();
  }
}

// Whether a tensor still has the value that it had when this was made.
class Version {
 public:
  Version() = default;
  explicit Version(const Tensor& tensor) {
    if (tensor.is_inference()) return;
    counter_ = torch::autograd::impl::version_counter(tensor);
    expected_ = counter_.current_version();
  }
  bool unchanged() const { return !counter_.enabled() || counter_.current_version() == expected_; }

 private:
  c10::VariableVersion counter_;
  uint32_t expected_ = 0;
};

// An operand. Where backward reads its value, a change before it must be an error; nn.RNN allows
// changes of the others (the biases, for one), so those are kept as they are.
struct SavedOperand {
  SavedVariable saved;
  Tensor kept;
  Version version;

  SavedOperand() = default;
  SavedOperand(const Tensor& operand, bool read) {
    if (read) {
      saved = SavedVariable(operand, false);
    } else {
      kept = operand;
      version = Version(operand);
    }
  }
  Tensor unpack() const { return kept.defined() ? kept : saved.unpack(); }
  bool unchanged() const { return !kept.defined() || version.unchanged(); }
  void reset() {
    saved.reset_data();
    kept.reset();
  }
};

struct RnnLayerBackward : public Node {
  std::string name() const override { return "RnnLayerBackward"; }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    input.reset();
    hx.reset();
    for (SavedOperand& weight : weights) weight.reset();
    y.reset_data();
    released = true;
  }

  variable_list apply(variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex_);
    TORCH_CHECK(!released, torch::autograd::ERR_BACKWARD_TWICE);
    variable_list result(2 + weights.size());
    if (!grads[0].defined() && !grads[1].defined()) return result;

    const Tensor x = input.unpack();
    const Optional h0 = has_hx ? Optional(hx.unpack()) : std::nullopt;
    std::vector<Tensor> params;
    params.reserve(weights.size());
    bool operands_unchanged = input.unchanged() && hx.unchanged();
    for (const SavedOperand& weight : weights) {
      params.push_back(weight.unpack());
      operands_unchanged = operands_unchanged && weight.unchanged();
    }
    const Optional sizes = defined_or_none(batch_sizes), ragged = defined_or_none(lengths);
    // nn.RNN saves a private copy of each step, so its output may be changed in place. We save the
    // output itself; when it has been changed, it is computed once more, to the same bits.
    const bool again = !y_version.unchanged() && operands_unchanged;
    const Tensor states =
        again ? std::get<0>(layer_op().call(x, h0, params, sizes, ragged, mode, has_biases))
              : y.unpack(getptr());
    c10::List<bool> needs;
    needs.reserve(result.size());
    for (size_t i = 0; i < result.size(); ++i) needs.push_back(task_should_compute_output(i));

    auto computed =
        layer_backward_op().call(defined_or_none(grads[0]), defined_or_none(grads[1]), x, h0,
                                 params, states, sizes, ragged, mode, has_biases, needs);
    for (size_t i = 0; i < result.size(); ++i) {
      if (needs[i]) result[i] = std::move(computed[i]);
    }
    return result;
  }

  SavedOperand input, hx;
  std::vector<SavedOperand> weights;
  SavedVariable y;
  Version y_version;
  Tensor batch_sizes, lengths;
  std::string mode;
  bool has_biases = false;
  bool has_hx = false;
  bool released = false;
};

bool has_tangent(const Optional& a, const Optional& b, const Optional& c, at::TensorList list) {
  using torch::autograd::isFwGradDefined;
  return isFwGradDefined(a) || isFwGradDefined(b) || isFwGradDefined(c) ||
         torch::autograd::isFwGradDefinedTensorList(list);
}

Pair layer_autograd(c10::DispatchKeySet keys, const Tensor& input, const Optional& hx,
                    at::TensorList weights, const Optional& batch_sizes, const Optional& lengths,
                    std::string_view mode, bool has_biases) {
  if (has_tangent(input, hx, std::nullopt, weights)) {
    return composite::forward(input, hx, weights, batch_sizes, lengths, mode, has_biases);
  }
  const bool recorded = torch::autograd::compute_requires_grad(input, hx, weights);
  auto result = [&] {
    at::AutoDispatchBelowADInplaceOrView guard;
    return layer_op().redispatch(keys & c10::after_autograd_keyset, input, hx, weights, batch_sizes,
                                 lengths, mode, has_biases);
  }();
  if (!recorded) return result;

  auto node = make_node<RnnLayerBackward>();
  torch::autograd::edge_list edges;
  edges.reserve(2 + weights.size());
  const auto add_edge = [&](const Tensor& tensor) {
    edges.push_back(tensor.defined() ? torch::autograd::impl::gradient_edge(tensor)
                                     : torch::autograd::Edge());
  };
  add_edge(input);
  add_edge(hx.value_or(Tensor()));
  for (const Tensor& weight : weights) add_edge(weight);
  node->set_next_edges(std::move(edges));

  const size_t per_direction = has_biases ? 4 : 2;
  const auto any_trained = [&](size_t kind) {
    for (size_t i = kind; i < weights.size(); i += per_direction) {
      if (weights[i].requires_grad()) return true;
    }
    return false;
  };
  const c10::SymInt T = batch_sizes.has_value() ? batch_sizes->sym_numel() : input.sym_size(0);
  const bool many_steps = T.maybe_as_int() != 1;
  const bool reads_W_ih = input.requires_grad();
  const bool reads_W_hh = many_steps || (hx.has_value() && hx->requires_grad());
  node->input = SavedOperand(input, any_trained(0));
  node->has_hx = hx.has_value();
  if (hx.has_value()) node->hx = SavedOperand(*hx, any_trained(1));
  node->weights.reserve(weights.size());
  for (size_t i = 0; i < weights.size(); ++i) {
    const size_t kind = i % per_direction;
    node->weights.emplace_back(weights[i], (kind == 0 && reads_W_ih) || (kind == 1 && reads_W_hh));
  }
  node->has_biases = has_biases;
  node->batch_sizes = batch_sizes.value_or(Tensor());
  node->lengths = lengths.value_or(Tensor());
  node->mode = std::string(mode);

  torch::autograd::set_history(std::get<0>(result), node);
  torch::autograd::set_history(std::get<1>(result), node);
  node->y = SavedVariable(std::get<0>(result), true);
  node->y_version = Version(std::get<0>(result));
  return result;
}

// Recorded when backward itself is differentiated: then the composite, whose ops record themselves.
std::vector<Tensor> layer_backward_autograd(c10::DispatchKeySet keys, const Optional& dy,
                                            const Optional& dh_n, const Tensor& input,
                                            const Optional& hx, at::TensorList weights,
                                            const Tensor& y, const Optional& batch_sizes,
                                            const Optional& lengths, std::string_view mode,
                                            bool has_biases, c10::List<bool> needs) {
  if (torch::autograd::compute_requires_grad(dy, dh_n, input, hx, weights, y) ||
      has_tangent(dy, dh_n, input, weights) || has_tangent(hx, y, std::nullopt, {})) {
    return composite::backward(dy, dh_n, input, hx, weights, y, batch_sizes, lengths, mode,
                               has_biases, needs);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return layer_backward_op().redispatch(keys & c10::after_autograd_keyset, dy, dh_n, input, hx,
                                        weights, y, batch_sizes, lengths, mode, has_biases, needs);
}

struct LinearBackward : public Node {
  std::string name() const override { return "LinearBackward"; }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    input.reset();
    weight.reset();
    released = true;
  }

  variable_list apply(variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex_);
    TORCH_CHECK(!released, torch::autograd::ERR_BACKWARD_TWICE);
    variable_list result(3);
    if (!grads[0].defined()) return result;
    auto computed = linear_backward_op().call(grads[0], input.unpack(), weight.unpack());
    for (size_t i = 0; i < result.size(); ++i) {
      if (task_should_compute_output(i)) result[i] = std::move(computed[i]);
    }
    return result;
  }

  SavedOperand input, weight;
  bool released = false;
};

Tensor linear_autograd(c10::DispatchKeySet keys, const Tensor& input, const Tensor& weight,
                       const Tensor& bias) {
  using torch::autograd::isFwGradDefined;
  if (!linear_is_served(input, weight, bias) || isFwGradDefined(input) || isFwGradDefined(weight) ||
      isFwGradDefined(bias)) {
    return composite::linear(input, weight, bias);
  }
  const bool recorded = torch::autograd::compute_requires_grad(input, weight, bias);
  Tensor y = [&] {
    at::AutoDispatchBelowADInplaceOrView guard;
    return linear_op().redispatch(keys & c10::after_autograd_keyset, input, weight, bias);
  }();
  if (!recorded) return y;
  auto node = make_node<LinearBackward>();
  node->set_next_edges(torch::autograd::collect_next_edges(input, weight, bias));
  node->input = SavedOperand(input, weight.requires_grad());
  node->weight = SavedOperand(weight, input.requires_grad());
  torch::autograd::set_history(y, node);
  return y;
}

// As layer_backward_autograd.
std::vector<Tensor> linear_backward_autograd(c10::DispatchKeySet keys, const Tensor& dy,
                                             const Tensor& input, const Tensor& weight) {
  using torch::autograd::isFwGradDefined;
  if (torch::autograd::compute_requires_grad(dy, input, weight) || isFwGradDefined(dy) ||
      isFwGradDefined(input) || isFwGradDefined(weight)) {
    return composite::linear_backward(dy, input, weight);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return linear_backward_op().redispatch(keys & c10::after_autograd_keyset, dy, input, weight);
}

}  // namespace

Pair call_layer(const Tensor& input, const Optional& hx, at::TensorList weights,
                const Optional& batch_sizes, const Optional& lengths, std::string_view mode,
                bool has_biases) {
  return layer_op().call(input, hx, weights, batch_sizes, lengths, mode, has_biases);
}

TORCH_LIBRARY_IMPL(charrnn_fast, Autograd, m) {
  m.impl("rnn_layer", TORCH_FN(layer_autograd));
  m.impl("rnn_layer_backward", TORCH_FN(layer_backward_autograd));
  m.impl("linear", TORCH_FN(linear_autograd));
  m.impl("linear_backward", TORCH_FN(linear_backward_autograd));
}

}  // namespace charrnn_fast
