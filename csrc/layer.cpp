#include "layer.h"

#include <ATen/TensorSubclassLikeUtils.h>

#include <algorithm>

namespace charrnn_fast {
namespace {

void check_weights(at::TensorList weights, bool has_biases, int64_t* D) {
  const size_t per_direction = has_biases ? 4 : 2;
  TORCH_CHECK(weights.size() == per_direction || weights.size() == 2 * per_direction,
              "weights must hold ", per_direction, " tensors for one direction or ",
              2 * per_direction, " for two (has_biases=", has_biases ? "True" : "False", "), got ",
              weights.size());
  *D = static_cast<int64_t>(weights.size() / per_direction);
  TORCH_CHECK(weights[0].dim() == 2, "weight_ih must have 2 dimensions, got ", weights[0].dim());
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
  check_index_list(lengths, "lengths");
  check_shape(lengths, "lengths", {layer.B});
  const at::Tensor values = lengths.contiguous();
  const int64_t* length = values.const_data_ptr<int64_t>();
  for (int64_t b = 0; b < layer.B; ++b) {
    TORCH_CHECK_VALUE(length[b] >= 1 && length[b] <= layer.T, "lengths must lie in [1, ", layer.T,
                      "], the steps of the input, got ", length[b], " for sequence ", b);
  }
}

}  // namespace

Cell parse_mode(std::string_view mode) {
  if (mode == "RNN_TANH") return Cell::kTanh;
  if (mode == "RNN_RELU") return Cell::kRelu;
  if (mode == "RNN_SIGMOID") return Cell::kSigmoid;
  TORCH_CHECK_VALUE(false, "Unrecognized RNN mode: ", std::string(mode));
}

Layer check_layer(const at::Tensor& input, const Optional& hx, at::TensorList weights,
                  const Optional& batch_sizes, const Optional& lengths, std::string_view mode,
                  bool has_biases) {
  Layer layer{};
  layer.cell = parse_mode(mode);
  check_dense(input, hx, weights);
  check_weights(weights, has_biases, &layer.D);
  layer.H = weights[0].size(0);
  layer.I = weights[0].size(1);
  layer.tokens = input.scalar_type() == at::kLong;
  layer.packed = batch_sizes.has_value();

  const int64_t dims = (layer.packed ? 1 : 2) + (layer.tokens ? 0 : 1);
  TORCH_CHECK(input.dim() == dims, "input must have ", dims, " dimensions, got ", input.dim());
  if (layer.tokens) {
    TORCH_CHECK(input.device() == weights[0].device(), "RNN input is on ", input.device(),
                " but weight_ih is on ", weights[0].device());
  } else {
    check_same_kind(input, "input", weights[0]);
    TORCH_CHECK(input.size(-1) == layer.I, "input.size(-1) must be equal to input_size. Expected ",
                layer.I, ", got ", input.size(-1));
  }
  if (layer.packed) {
    TORCH_CHECK(!lengths.has_value(), "lengths cannot be given with packed input");
    layer.N = input.size(0);
    check_batch_sizes(*batch_sizes, &layer);
  } else {
    layer.T = input.size(0);
    layer.B = input.size(1);
    layer.N = layer.T * layer.B;
    TORCH_CHECK(layer.T > 0, "Expected sequence length to be larger than 0 in RNN");
    if (lengths.has_value()) check_lengths(*lengths, layer);
  }

  const size_t per_direction = has_biases ? 4 : 2;
  for (size_t i = 0; i < weights.size(); ++i) {
    static constexpr const char* kNames[] = {"weight_ih", "weight_hh", "bias_ih", "bias_hh"};
    const size_t kind = i % per_direction;
    if (kind == 0) {
      check_shape(weights[i], kNames[kind], {layer.H, layer.I});
    } else if (kind == 1) {
      check_shape(weights[i], kNames[kind], {layer.H, layer.H});
    } else {
      check_shape(weights[i], kNames[kind], {layer.H});
    }
    if (i > 0) check_same_kind(weights[i], kNames[kind], weights[0]);
  }
  if (hx.has_value()) {
    check_same_kind(*hx, "hx", weights[0]);
    check_shape(*hx, "hidden", {layer.D, layer.B, layer.H});
  }
  return layer;
}

Layer check_layer_backward(const Optional& dy, const Optional& dh_n, const at::Tensor& input,
                           const Optional& hx, at::TensorList weights, const at::Tensor& y,
                           const Optional& batch_sizes, const Optional& lengths,
                           std::string_view mode, bool has_biases, const c10::List<bool>& needs) {
  const Layer layer = check_layer(input, hx, weights, batch_sizes, lengths, mode, has_biases);
  const int64_t width = layer.D * layer.H;
  const std::vector<int64_t> y_shape = layer.packed ? std::vector<int64_t>{layer.N, width}
                                                    : std::vector<int64_t>{layer.T, layer.B, width};
  check_same_kind(y, "y", weights[0]);
  check_shape(y, "y", y_shape);
  if (dy.has_value()) {
    check_same_kind(*dy, "dy", weights[0]);
    check_shape(*dy, "dy", y_shape);
  }
  if (dh_n.has_value()) {
    check_same_kind(*dh_n, "dh_n", weights[0]);
    check_shape(*dh_n, "dh_n", {layer.D, layer.B, layer.H});
  }
  TORCH_CHECK(needs.size() == weights.size() + 2, "needs must have ", weights.size() + 2,
              " entries, one for each of input, hx and the weights, got ", needs.size());
  return layer;
}

void check_dense(const at::Tensor& input, const Optional& hx, at::TensorList weights) {
  const auto check = [](const at::Tensor& tensor, const char* name) {
    TORCH_CHECK(tensor.layout() == at::kStrided && !tensor.is_quantized(), "RNN ", name,
                " must be a dense tensor, neither sparse nor quantized");
  };
  check(input, "input");
  if (hx.has_value()) check(*hx, "hx");
  for (const at::Tensor& weight : weights) check(weight, "weight");
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

const char* why_composite(const at::Tensor& input, const Optional& hx, at::TensorList weights) {
  const at::Tensor& weight = weights[0];
  if (!weight.device().is_cpu()) return "the device is not the CPU";
  const auto dtype = weight.scalar_type();
  if (dtype != at::kFloat && dtype != at::kDouble && dtype != at::kBFloat16 && dtype != at::kHalf) {
    return "the dtype is none of float32, float64, bfloat16 and float16";
  }
  if (weight.layout() != at::kStrided || input.layout() != at::kStrided) {
    return "the layout is not strided";
  }
  if (at::isTensorSubclassLike(input) || (hx.has_value() && at::isTensorSubclassLike(*hx)) ||
      std::any_of(weights.begin(), weights.end(),
                  [](const at::Tensor& w) { return at::isTensorSubclassLike(w); })) {
    return "a tensor is a subclass or is traced by a transform";
  }
  return nullptr;
}

Counters& counters() {
  static Counters instance;
  return instance;
}

}  // namespace charrnn_fast
