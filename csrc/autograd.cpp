// Autograd of the ops. A Node of our own rather than a torch::autograd::Function: it costs less
// per call and works inside torch.func's grad, which refuses the latter.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/library.h>

#include <algorithm>
#include <mutex>
#include <type_traits>
#include <utility>

#include "layer.h"

namespace charrnn_fast {

template <typename Op>
static c10::TypedOperatorHandle<Op> find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Op>();
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

const auto& layer_backward_op() {
  static const auto op = find_op<LayerBackwardOp>("charrnn_fast::rnn_layer_backward");
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

// What `listed` made a list of.
LayerResult unlisted(const Call& call, std::vector<Tensor>&& list) {
  size_t next = 0;
  const auto take = [&](bool there) { return there ? std::move(list[next++]) : Tensor(); };
  Tensor y = take(true), h_n = take(true);
  Tensor c_n = take(sizes_of(parse_mode(call.mode)).has_state), cells = take(call.cells);
  Tensor saved = take(next < list.size());
  return {std::move(y), std::move(h_n), std::move(c_n), std::move(cells), std::move(saved)};
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
  // Undefined where there was none.
  Tensor unpack() const { return kept.defined() ? kept : saved.unpack(); }
  bool unchanged() const { return !kept.defined() || version.unchanged(); }
  // For what backward reads and no hook on saved tensors needs to see, in autograd's words.
  void expect_unchanged(const char* name) const {
    TORCH_CHECK(unchanged(), kOperandChanged, name, " of size ", kept.sizes());
  }
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
    cx.reset();
    for (SavedOperand& weight : weights) weight.reset();
    for (SavedOperand* each : {&batch_sizes, &lengths, &resets}) each->reset();
    y.reset_data();
    saved.reset_data();
    released = true;
  }

  variable_list apply(variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex_);
    TORCH_CHECK(!released, torch::autograd::ERR_BACKWARD_TWICE);
    variable_list result(kFirstWeight + weights.size());
    if (std::none_of(grads.begin(), grads.end(), [](const Tensor& g) { return g.defined(); })) {
      return result;
    }
    const auto grad = [&](int output) {
      return output < 0 ? std::nullopt : defined_or_none(grads[output]);
    };
    const Optional dy = grad(0), dh_n = grad(1), dc_n = grad(c_n_at), dcells = grad(cells_at);

    const Tensor x = input.unpack();
    const Optional h0 = defined_or_none(hx.unpack()), c0 = defined_or_none(cx.unpack());
    std::vector<Tensor> params;
    params.reserve(weights.size());
    const char* changed = !input.unchanged() ? "input"
                          : !hx.unchanged()  ? "hx"
                          : !cx.unchanged()  ? "cx"
                                             : nullptr;
    for (size_t i = 0; i < weights.size(); ++i) {
      params.push_back(weights[i].unpack());
      if (!weights[i].unchanged()) changed = kWeightNames[i % weights_per_direction(has_biases)];
    }
    batch_sizes.expect_unchanged("batch_sizes");
    lengths.expect_unchanged("lengths");
    resets.expect_unchanged("resets");
    const Optional sizes = defined_or_none(batch_sizes.unpack());
    const Optional ragged = defined_or_none(lengths.unpack());
    const Optional splits = defined_or_none(resets.unpack());
    const Call call{x, h0, c0, params, sizes, ragged, splits, mode, has_biases};
    // nn.RNN saves a private copy of each step, so its output may be changed in place. We save the
    // output itself; when it has been changed, it is computed once more, to the same bits.
    const bool again = !y_version.unchanged() && changed == nullptr;
    const Tensor states = again ? std::get<0>(call_layer(call)) : y.unpack(getptr());
    const Optional kept = has_saved ? Optional(saved.unpack()) : std::nullopt;
    c10::List<bool> needs;
    needs.reserve(result.size());
    for (size_t i = 0; i < result.size(); ++i) needs.push_back(task_should_compute_output(i));

    const WithChangedOperand guard(changed);
    auto computed = call_layer_backward(Grads{dy, dh_n, dc_n, dcells}, call, states, kept, needs);
    auto next = computed.begin();
    for (size_t i = 0; i < result.size(); ++i) {
      if (task_should_compute_output(i)) result[i] = std::move(*next++);
    }
    return result;
  }

  SavedOperand input, hx, cx;
  std::vector<SavedOperand> weights;
  SavedVariable y, saved;
  Version y_version;
  SavedOperand batch_sizes, lengths, resets;
  std::string mode;
  // Places of the gradients of c_n and cells; negative where they are no results.
  int c_n_at = -1, cells_at = -1;
  bool has_biases = false;
  bool has_saved = false;
  bool released = false;
};

bool has_tangent(const Optional& tensor) { return torch::autograd::isFwGradDefined(tensor); }

bool has_tangent(const Call& call) {
  return has_tangent(call.input) || has_tangent(call.hx) || has_tangent(call.cx) ||
         torch::autograd::isFwGradDefinedTensorList(call.weights);
}

// What backward reads, and what therefore may not change before it.
struct Reads {
  bool input, hx, cx;
  bool weights[4];  // of each kind
};

Reads what_backward_reads(const Call& call, CellSizes sizes, bool saved) {
  // Gates that were not saved are computed again, from everything.
  if (sizes.saved > 0 && !saved) return {true, true, true, {true, true, true, true}};
  const auto any_trained = [&](int64_t kind) {
    for (size_t i = kind; i < call.weights.size(); i += weights_per_direction(call.has_biases)) {
      if (call.weights[i].requires_grad()) return true;
    }
    return false;
  };
  const c10::SymInt T =
      call.batch_sizes.has_value() ? call.batch_sizes->sym_numel() : call.input.sym_size(0);
  const bool many_steps = T.maybe_as_int() != 1;
  const bool trains_hx = call.hx.has_value() && call.hx->requires_grad();
  return {any_trained(0),
          any_trained(1) || sizes.reads_h0,
          sizes.has_state,
          {call.input.requires_grad(), many_steps || trains_hx, false, false}};
}

LayerResult layer_autograd(c10::DispatchKeySet keys, const Call& call) {
  if (has_tangent(call)) return composite::forward(call);
  const bool recorded =
      torch::autograd::compute_requires_grad(call.input, call.hx, call.cx, call.weights);
  Call below = call;
  below.keep = call.keep || recorded;
  auto result = [&] {
    at::AutoDispatchBelowADInplaceOrView guard;
    return unlisted(below, with_arguments(below, [&](const auto&... arguments) {
                      return layer_op().redispatch(keys & c10::after_autograd_keyset, arguments...);
                    }));
  }();
  if (!recorded) return result;
  auto& [y, h_n, c_n, cells, saved] = result;

  auto node = make_node<RnnLayerBackward>();
  torch::autograd::edge_list edges;
  edges.reserve(kFirstWeight + call.weights.size());
  const auto add_edge = [&](const Tensor& tensor) {
    edges.push_back(tensor.defined() ? torch::autograd::impl::gradient_edge(tensor)
                                     : torch::autograd::Edge());
  };
  add_edge(call.input);
  add_edge(call.hx.value_or(Tensor()));
  add_edge(call.cx.value_or(Tensor()));
  for (const Tensor& weight : call.weights) add_edge(weight);
  node->set_next_edges(std::move(edges));

  const CellSizes sizes = sizes_of(parse_mode(call.mode));
  node->has_saved = saved.defined();
  const Reads reads = what_backward_reads(call, sizes, node->has_saved);
  node->input = SavedOperand(call.input, reads.input);
  if (call.hx.has_value()) node->hx = SavedOperand(*call.hx, reads.hx);
  if (call.cx.has_value()) node->cx = SavedOperand(*call.cx, reads.cx);
  node->weights.reserve(call.weights.size());
  for (size_t i = 0; i < call.weights.size(); ++i) {
    const size_t kind = i % weights_per_direction(call.has_biases);
    node->weights.emplace_back(call.weights[i], reads.weights[kind]);
  }
  node->has_biases = call.has_biases;
  if (call.batch_sizes.has_value()) node->batch_sizes = SavedOperand(*call.batch_sizes, false);
  if (call.lengths.has_value()) node->lengths = SavedOperand(*call.lengths, false);
  if (call.resets.has_value()) node->resets = SavedOperand(*call.resets, false);
  node->mode = std::string(call.mode);

  torch::autograd::set_history(y, node);
  torch::autograd::set_history(h_n, node);
  if (sizes.has_state) {
    node->c_n_at = 2;
    torch::autograd::set_history(c_n, node);
  }
  if (call.cells) {
    node->cells_at = 3;
    torch::autograd::set_history(cells, node);
  }
  node->y = SavedVariable(y, true);
  node->y_version = Version(y);
  if (node->has_saved) node->saved = SavedVariable(saved, false);
  return result;
}

// Recorded when backward itself is differentiated: then the composite, whose ops record themselves.
std::vector<Tensor> layer_backward_autograd(c10::DispatchKeySet keys, const Grads& grads,
                                            const Call& call, const Tensor& y,
                                            const Optional& saved, const c10::List<bool>& needs) {
  if (torch::autograd::compute_requires_grad(grads.dy, grads.dh_n, grads.dc_n, grads.dcells,
                                             call.input, call.hx, call.cx, call.weights, y) ||
      has_tangent(call) || has_tangent(grads.dy) || has_tangent(grads.dh_n) ||
      has_tangent(grads.dc_n) || has_tangent(grads.dcells) || has_tangent(y)) {
    return composite::backward(grads, call, y, saved, needs);
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return with_arguments(grads, call, y, saved, needs, [&](const auto&... arguments) {
    return layer_backward_op().redispatch(keys & c10::after_autograd_keyset, arguments...);
  });
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

LayerResult call_layer(const Call& call) {
  return unlisted(call, with_arguments(call, [](const auto&... arguments) {
                    return layer_op().call(arguments...);
                  }));
}

std::vector<Tensor> call_layer_backward(const Grads& grads, const Call& call, const Tensor& y,
                                        const Optional& saved, const c10::List<bool>& needs) {
  return with_arguments(grads, call, y, saved, needs, [](const auto&... arguments) {
    return layer_backward_op().call(arguments...);
  });
}

TORCH_LIBRARY_IMPL(charrnn_fast, Autograd, m) {
  m.impl("rnn_layer", TORCH_FN((LayerImpl<layer_autograd, c10::DispatchKeySet>::call)));
  m.impl("rnn_layer_backward",
         TORCH_FN((LayerBackwardImpl<layer_backward_autograd, c10::DispatchKeySet>::call)));
  m.impl("linear", TORCH_FN(linear_autograd));
  m.impl("linear_backward", TORCH_FN(linear_backward_autograd));
}

}  // namespace charrnn_fast
