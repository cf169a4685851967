#include "layer.h"

#include <ATen/TensorSubclassLikeUtils.h>

#include <algorithm>
#include <array>

namespace charrnn_fast {
namespace {

void check_weights(const Call& call, int64_t* D) {
  const at::TensorList weights = call.weights;
  const size_t each = weights_per_direction(call.has_biases);
  TORCH_CHECK(weights.size() == each || weights.size() == 2 * each, "weights must hold ", each,
              " tensors for one direction or ", 2 * each,
              " for two (has_biases=", call.has_biases ? "True" : "False", "), got ",
              weights.size());
  *D = directions_of(call);
  for (const size_t i : {0, 1}) {
    TORCH_CHECK(weights[i].dim() == 2, kWeightNames[i], " must have 2 dimensions, got ",
                weights[i].dim());
  }
}

void check_shape(const at::Tensor& tensor, const char* name, at::IntArrayRef expected) {
  TORCH_CHECK(tensor.sizes() == expected, "Expected ", name, " of size ", expected, ", got ",
              tensor.sizes());
}

void check_same_kind(const at::Tensor& tensor, const char* name, const at::Tensor& weight) {
  TORCH_CHECK(tensor.scalar_type() == weight.scalar_type(), "RNN ", name, " dtype (",
              tensor.scalar_type(), ") does not match weight dtype (", weight.scalar_type(), ")");
  TORCH_CHECK(tensor.device() == weight.device(), "RNN ", name, " is on ", tensor.device(),
              " but weight_ih is on ", weight.device());
}

void check_index_list(const at::Tensor& tensor, const char* name) {
  TORCH_CHECK(tensor.scalar_type() == at::kLong && tensor.device().is_cpu() && tensor.dim() == 1,
              name, " must be a 1-D int64 tensor on the CPU, got a ", tensor.dim(), "-D ",
              tensor.scalar_type(), " tensor on ", tensor.device());
}

// Packed data: the sizes fall, and add up to the rows of the input. They may end in zeros, as
// nn.RNN takes them, too: no step of these exists.
void check_batch_sizes(const at::Tensor& batch_sizes, Layer* layer) {
  check_index_list(batch_sizes, "batch_sizes");
  const at::Tensor sizes = batch_sizes.contiguous();
  const int64_t* size = sizes.const_data_ptr<int64_t>();
  TORCH_CHECK_INDEX(sizes.numel() > 0, "Expected batch_sizes with at least one step, got none");
  layer->T = 0;
  layer->B = size[0];
  int64_t rows = 0;
  for (int64_t t = 0; t < sizes.numel(); ++t) {
    TORCH_CHECK(t == 0 ? size[t] > 0 : 0 <= size[t] && size[t] <= size[t - 1],
                "batch_sizes must begin above zero and never rise, got ", size[t], " at step ", t);
    if (size[t] > 0) layer->T = t + 1;
    // Compared before it is added: sizes near 2^63 would wrap around to a sum that fits.
    TORCH_CHECK(size[t] <= layer->N - rows, "batch_sizes add up to more rows than input has, ",
                layer->N, ", at step ", t);
    rows += size[t];
  }
  TORCH_CHECK(rows == layer->N, "batch_sizes add up to ", rows, " rows, but input has ", layer->N);
}

void check_lengths(const at::Tensor& lengths, const Layer& layer) {
  TORCH_CHECK(at::isIntegralType(lengths.scalar_type(), /*includeBool=*/false) &&
                  lengths.device().is_cpu() && lengths.dim() == 1,
              "lengths must be a 1-D tensor of int64, or of other integers, on the CPU, got a ",
              lengths.dim(), "-D ", lengths.scalar_type(), " tensor on ", lengths.device());
  check_shape(lengths, "lengths", {layer.B});
  const at::Tensor values = lengths.to(at::kLong).contiguous();
  const int64_t* length = values.const_data_ptr<int64_t>();
  for (int64_t b = 0; b < layer.B; ++b) {
    TORCH_CHECK_VALUE(length[b] >= 1 && length[b] <= layer.T, "lengths must lie in [1, ", layer.T,
                      "], the steps of the input, got ", length[b], " for sequence ", b);
  }
}

void check_resets(const at::Tensor& resets, const Call& call, const Layer& layer) {
  TORCH_CHECK_VALUE(!layer.packed,
                    "resets cannot be given with packed input: pad it, and give lengths=");
  TORCH_CHECK(resets.scalar_type() == at::kBool, "resets must be a bool tensor, got ",
              resets.scalar_type());
  TORCH_CHECK(resets.device() == call.input.device(), "RNN resets is on ", resets.device(),
              " but input is on ", call.input.device());
  check_shape(resets, "resets", {layer.T, layer.B});
}

}  // namespace

Cell parse_mode(std::string_view mode) {
  if (mode == "RNN_TANH") return Cell::kTanh;
  if (mode == "RNN_RELU") return Cell::kRelu;
  if (mode == "RNN_SIGMOID") return Cell::kSigmoid;
  if (mode == "LSTM") return Cell::kLstm;
  if (mode == "GRU") return Cell::kGru;
  TORCH_CHECK_VALUE(false, "Unrecognized RNN mode: ", std::string(mode));
}

void check_kind(const Call& call) {
  const auto check = [](const at::Tensor& tensor, const char* name) {
    TORCH_CHECK(tensor.layout() == at::kStrided && !tensor.is_quantized(), "RNN ", name,
                " must be a dense tensor, neither sparse nor quantized");
  };
  check(call.input, "input");
  if (call.hx.has_value()) check(*call.hx, "hx");
  if (call.cx.has_value()) check(*call.cx, "cx");
  if (call.batch_sizes.has_value()) check(*call.batch_sizes, "batch_sizes");
  if (call.lengths.has_value()) check(*call.lengths, "lengths");
  if (call.resets.has_value()) check(*call.resets, "resets");
  for (const at::Tensor& weight : call.weights) check(weight, "weight");
  if (sizes_of(parse_mode(call.mode)).has_state) return;
  TORCH_CHECK_VALUE(!call.cx.has_value(), "cx must be None: ", std::string(call.mode),
                    " has no cell state");
  TORCH_CHECK_VALUE(!call.cells, "cells must be False: ", std::string(call.mode),
                    " has no cell states");
}

void check_needs(const Call& call, const c10::List<bool>& needs) {
  const size_t expected = kFirstWeight + call.weights.size();
  TORCH_CHECK(needs.size() == expected, "needs must have ", expected,
              " entries, one for each of input, hx, cx and the weights, got ", needs.size());
  TORCH_CHECK(call.input.scalar_type() != at::kLong || !needs[kInput],
              "needs of input must be False: token ids have no gradient");
  TORCH_CHECK(sizes_of(parse_mode(call.mode)).has_state || !needs[kCx],
              "needs of cx must be False: ", std::string(call.mode), " has no cell state");
}

Layer check_layer(const Call& call) {
  Layer layer{};
  layer.cell = parse_mode(call.mode);
  check_kind(call);
  check_weights(call, &layer.D);
  const at::Tensor &input = call.input, &weight = call.weights[0];
  layer.H = call.weights[1].size(1);
  layer.I = weight.size(1);
  layer.tokens = input.scalar_type() == at::kLong;
  layer.packed = call.batch_sizes.has_value();

  TORCH_CHECK(layer.tokens || !at::isIntegralType(input.scalar_type(), /*includeBool=*/false),
              "RNN input of dtype ", input.scalar_type(),
              " holds neither token ids, which are int64, nor values of the weights' dtype, ",
              weight.scalar_type());
  const int64_t dims = (layer.packed ? 1 : 2) + (layer.tokens ? 0 : 1);
  TORCH_CHECK(input.dim() == dims, "input must have ", dims, " dimensions, got ", input.dim());
  if (layer.tokens) {
    TORCH_CHECK(input.device() == weight.device(), "RNN input is on ", input.device(),
                " but weight_ih is on ", weight.device());
  } else {
    check_same_kind(input, "input", weight);
    TORCH_CHECK(input.size(-1) == layer.I, "input.size(-1) must be equal to input_size. Expected ",
                layer.I, ", got ", input.size(-1));
  }
  if (layer.packed) {
    TORCH_CHECK(!call.lengths.has_value(), "lengths cannot be given with packed input");
    layer.N = input.size(0);
    check_batch_sizes(*call.batch_sizes, &layer);
  } else {
    layer.T = input.size(0);
    layer.B = input.size(1);
    layer.N = layer.T * layer.B;
    TORCH_CHECK(layer.T > 0, "Expected sequence length to be larger than 0 in RNN");
    if (call.lengths.has_value()) check_lengths(*call.lengths, layer);
  }
  if (call.resets.has_value()) check_resets(*call.resets, call, layer);

  const int64_t rows = sizes_of(layer.cell).gates * layer.H;
  for (size_t i = 0; i < call.weights.size(); ++i) {
    const size_t kind = i % weights_per_direction(call.has_biases);
    const char* name = kWeightNames[kind];
    if (kind == 0) {
      check_shape(call.weights[i], name, {rows, layer.I});
    } else if (kind == 1) {
      check_shape(call.weights[i], name, {rows, layer.H});
    } else {
      check_shape(call.weights[i], name, {rows});
    }
    if (i > 0) check_same_kind(call.weights[i], name, weight);
  }
  if (call.hx.has_value()) {
    check_same_kind(*call.hx, "hx", weight);
    check_shape(*call.hx, "hidden", {layer.D, layer.B, layer.H});
  }
  if (call.cx.has_value()) {
    check_same_kind(*call.cx, "cx", weight);
    check_shape(*call.cx, "cell state", {layer.D, layer.B, layer.H});
  }
  return layer;
}

Layer check_layer_backward(const Grads& grads, const Call& call, const at::Tensor& y,
                           const Optional& saved, const c10::List<bool>& needs) {
  const Layer layer = check_layer(call);
  const at::Tensor& weight = call.weights[0];
  const int64_t width = layer.D * layer.H;
  using Shape = std::array<int64_t, 3>;
  const Shape steps = layer.packed ? Shape{layer.N, width} : Shape{layer.T, layer.B, width};
  const at::IntArrayRef y_shape(steps.data(), layer.packed ? 2 : 3);
  const Shape state_shape = {layer.D, layer.B, layer.H};
  check_same_kind(y, "y", weight);
  check_shape(y, "y", y_shape);
  const auto check = [&](const Optional& grad, const char* name, at::IntArrayRef shape) {
    if (!grad.has_value()) return;
    check_same_kind(*grad, name, weight);
    check_shape(*grad, name, shape);
  };
  check(grads.dy, "dy", y_shape);
  check(grads.dh_n, "dh_n", state_shape);
  check(grads.dc_n, "dc_n", state_shape);
  check(grads.dcells, "dcells", y_shape);
  TORCH_CHECK_VALUE(
      sizes_of(layer.cell).has_state || (!grads.dc_n.has_value() && !grads.dcells.has_value()),
      "dc_n and dcells must be None: ", std::string(call.mode), " has no cell state");
  TORCH_CHECK(
      !saved.has_value() || (saved->layout() == at::kStrided && saved->device() == weight.device()),
      "saved must be what rnn_layer returned, or None, got a tensor on ", saved->device());
  check_needs(call, needs);
  return layer;
}

void check_token_ids(const at::Tensor& ids, int64_t I) {
  const int64_t* id = ids.const_data_ptr<int64_t>();
  const int64_t n = ids.numel();
  // One pass that vectorises; the place is looked for only when there is something to report.
  bool bad = false;
  for (int64_t i = 0; i < n; ++i) bad |= static_cast<uint64_t>(id[i]) >= static_cast<uint64_t>(I);
  if (!bad) return;
  const int64_t* at =
      std::find_if(id, id + n, [I](int64_t value) { return value < 0 || value >= I; });
  const int64_t place = at - id;
  if (ids.dim() == 2) {
    TORCH_CHECK_INDEX(false, "token id ", *at, " is out of range: input_size is ", I, " (at step ",
                      place / ids.size(1), " of sequence ", place % ids.size(1), ")");
  }
  TORCH_CHECK_INDEX(false, "token id ", *at, " is out of range: input_size is ", I, " (at row ",
                    place, ")");
}

const char* why_composite(const Call& call) {
  const at::Tensor& weight = call.weights[0];
  if (!weight.device().is_cpu()) return "the device is not the CPU";
  const auto dtype = weight.scalar_type();
  if (dtype != at::kFloat && dtype != at::kDouble && dtype != at::kBFloat16 && dtype != at::kHalf) {
    return "the dtype is none of float32, float64, bfloat16 and float16";
  }
  if (weight.layout() != at::kStrided || call.input.layout() != at::kStrided) {
    return "the layout is not strided";
  }
  const auto foreign = [](const Optional& tensor) {
    return tensor.has_value() && at::isTensorSubclassLike(*tensor);
  };
  if (at::isTensorSubclassLike(call.input) || foreign(call.hx) || foreign(call.cx) ||
      foreign(call.resets) ||
      std::any_of(call.weights.begin(), call.weights.end(),
                  [](const at::Tensor& w) { return at::isTensorSubclassLike(w); })) {
    return "a tensor is a subclass or is traced by a transform";
  }
  return nullptr;
}

namespace {
thread_local const char* changed_operand = nullptr;
}

WithChangedOperand::WithChangedOperand(const char* name) : outer_(changed_operand) {
  changed_operand = name;
}
WithChangedOperand::~WithChangedOperand() { changed_operand = outer_; }

void expect_unchanged_operands() {
  TORCH_CHECK(changed_operand == nullptr, kOperandChanged, changed_operand,
              ", from which the gates are computed again here");
}

int64_t saved_numbers(std::string_view mode) { return sizes_of(parse_mode(mode)).saved; }

Counters& counters() {
  static Counters instance;
  return instance;
}

}  // namespace charrnn_fast
