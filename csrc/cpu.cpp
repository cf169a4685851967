// The ops on CPU tensors: the calls into the kernels.
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstring>
#include <numeric>
#include <vector>

#include "allocation.h"
#include "layer.h"
#include "teams.h"

namespace charrnn_fast {

static at::ScalarType computed_in(const Isa& isa, at::ScalarType dtype) {
  if (dtype == at::kDouble || (dtype == at::kBFloat16 && isa.bf16 != nullptr)) return dtype;
  return at::kFloat;
}

at::ScalarType computed_in(at::ScalarType dtype) { return computed_in(isa(), dtype); }

namespace {

// The layout of the rows, with the arrays it points to.
class Rows {
 public:
  Rows(const Layer& layer, const Optional& batch_sizes, const Optional& lengths)
      : seq_{layer.T, layer.B, layer.N, layer.B, nullptr, nullptr, nullptr, nullptr, nullptr} {
    if (batch_sizes.has_value()) {
      const int64_t* running = batch_sizes->const_data_ptr<int64_t>();
      step_row_.resize(layer.T);
      lengths_.resize(layer.B);
      int64_t row = 0;
      for (int64_t t = 0; t < layer.T; ++t) {
        step_row_[t] = row;
        row += running[t];
        const int64_t next = t + 1 < layer.T ? running[t + 1] : 0;
        std::fill(lengths_.begin() + next, lengths_.begin() + running[t], t + 1);
      }
      seq_.step_row = step_row_.data();
      seq_.lengths = lengths_.data();
    } else if (lengths.has_value()) {
      const int64_t* steps = lengths->const_data_ptr<int64_t>();
      slot_row_.resize(layer.B);
      std::iota(slot_row_.begin(), slot_row_.end(), 0);
      std::stable_sort(slot_row_.begin(), slot_row_.end(),
                       [&](int64_t a, int64_t b) { return steps[a] > steps[b]; });
      lengths_.resize(layer.B);
      for (int64_t i = 0; i < layer.B; ++i) lengths_[i] = steps[slot_row_[i]];
      seq_.slot_row = slot_row_.data();
      seq_.lengths = lengths_.data();
    }
  }
  Rows(const Rows&) = delete;
  Rows& operator=(const Rows&) = delete;

  const Sequences& sequences() const { return seq_; }

 private:
  std::vector<int64_t> step_row_, lengths_, slot_row_;
  Sequences seq_;
};

// Calls call(kernels) with the kernels of `dtype`, one that computed_in answers.
template <typename Call>
void with_kernels(const Isa& isa, at::ScalarType dtype, const Call& call) {
  if (dtype == at::kDouble) return call(*isa.f64);
  if (dtype == at::kBFloat16) return call(*isa.bf16);
  return call(*isa.f32);
}

// The kernels have a type of their own for bfloat16, of the same bits.
template <typename scalar>
using InTorch = std::conditional_t<std::is_same_v<scalar, bfloat16>, at::BFloat16, scalar>;

template <typename scalar>
const scalar* data(const at::Tensor& tensor) {
  return reinterpret_cast<const scalar*>(tensor.const_data_ptr<InTorch<scalar>>());
}

template <typename scalar>
scalar* mutable_data(const at::Tensor& tensor) {
  return reinterpret_cast<scalar*>(tensor.mutable_data_ptr<InTorch<scalar>>());
}

Optional contiguous(const Optional& tensor) {
  return tensor.has_value() && tensor->defined() ? Optional(tensor->contiguous()) : std::nullopt;
}

// The tensors themselves where all are contiguous, as weights are; else copies, kept in `copies`.
at::TensorList contiguous(at::TensorList tensors, std::vector<at::Tensor>* copies) {
  if (std::all_of(tensors.begin(), tensors.end(),
                  [](const at::Tensor& tensor) { return tensor.is_contiguous(); })) {
    return tensors;
  }
  for (const at::Tensor& tensor : tensors) copies->push_back(tensor.contiguous());
  return *copies;
}

Optional converted(const Optional& tensor, at::ScalarType dtype) {
  return tensor.has_value() && tensor->defined() ? Optional(tensor->to(dtype)) : std::nullopt;
}

std::vector<at::Tensor> converted(at::TensorList tensors, at::ScalarType dtype) {
  std::vector<at::Tensor> result;
  result.reserve(tensors.size());
  for (const at::Tensor& tensor : tensors) result.push_back(tensor.to(dtype));
  return result;
}

// Token ids stay what they are.
at::Tensor converted_input(const at::Tensor& input, at::ScalarType dtype) {
  return input.scalar_type() == at::kLong ? input : input.to(dtype);
}

template <typename scalar>
const scalar* data_or_null(const Optional& tensor) {
  return tensor.has_value() ? data<scalar>(*tensor) : nullptr;
}

template <typename scalar>
void forward_layer(const Kernels<scalar>& table, const Layer& layer, const at::Tensor& input,
                   const Optional& hx, at::TensorList weights, bool has_biases,
                   const Sequences& seq, at::Tensor& y, at::Tensor& h_n) {
  const int64_t per_direction = has_biases ? 4 : 2;
  const Plan plan = plan_forward(layer);
  const scalar* h0 = data_or_null<scalar>(hx);
  std::array<ForwardArgs<scalar>, 2> args;
  for (int64_t d = 0; d < layer.D; ++d) {
    const at::Tensor* w = &weights[d * per_direction];
    args[d] = {
        .seq = seq,
        .I = layer.I,
        .H = layer.H,
        .cell = layer.cell,
        .reverse = d == 1,
        .split = plan.split,
        .x = layer.tokens ? nullptr : data<scalar>(input),
        .ldx = layer.I,
        .ids = layer.tokens ? input.const_data_ptr<int64_t>() : nullptr,
        .W_ih = data<scalar>(w[0]),
        .W_hh = data<scalar>(w[1]),
        .b_ih = has_biases ? data<scalar>(w[2]) : nullptr,
        .b_hh = has_biases ? data<scalar>(w[3]) : nullptr,
        .h0 = h0 != nullptr ? h0 + d * layer.B * layer.H : nullptr,
        .y = mutable_data<scalar>(y) + d * layer.H,
        .ldy = layer.D * layer.H,
        .h_n = mutable_data<scalar>(h_n) + d * layer.B * layer.H,
        .workspace = nullptr,
    };
  }
  const size_t bytes = whole_pages(table.forward_workspace(args[0], plan.members));
  const Scratch scratch(layer.D * bytes);
  for (int64_t d = 0; d < layer.D; ++d) args[d].workspace = scratch.data() + d * bytes;
  const auto forward = table.forward;
  run_teams(layer.D, plan, [&](int64_t d, const Team& team) { forward(args[d], team); });
}

// Without a state the first step has no recurrent product. nn.RNN computes that of zeros, which
// shows what is infinite or NaN in W_hh.
template <typename scalar>
bool finite_recurrence(const Kernels<scalar>& table, const Layer& layer, at::TensorList weights,
                       bool has_biases) {
  for (int64_t d = 0; d < layer.D; ++d) {
    const at::Tensor& W_hh = weights[d * (has_biases ? 4 : 2) + 1];
    if (!table.all_finite(data<scalar>(W_hh), W_hh.numel())) return false;
  }
  return true;
}

Pair rnn_layer_cpu(const at::Tensor& input_, const Optional& hx_, at::TensorList weights_,
                   const Optional& batch_sizes_, const Optional& lengths_, std::string_view mode,
                   bool has_biases) {
  const SurvivesFork guard;
  const Layer layer = check_layer(input_, hx_, weights_, batch_sizes_, lengths_, mode, has_biases);
  if (why_composite(input_, hx_, weights_) != nullptr) {
    return composite::forward(input_, hx_, weights_, batch_sizes_, lengths_, mode, has_biases);
  }
  // Looked up once: another thread may select another ISA meanwhile.
  const Isa& current = isa();
  const auto dtype = weights_[0].scalar_type(), computed = computed_in(current, dtype);
  if (computed != dtype) {
    const auto [y, h_n] =
        rnn_layer_cpu(converted_input(input_, computed), converted(hx_, computed),
                      converted(weights_, computed), batch_sizes_, lengths_, mode, has_biases);
    return {y.to(dtype), h_n.to(dtype)};
  }
  const at::Tensor input = input_.contiguous();
  Optional hx = contiguous(hx_);
  std::vector<at::Tensor> copies;
  const at::TensorList weights = contiguous(weights_, &copies);
  const Optional batch_sizes = contiguous(batch_sizes_), lengths = contiguous(lengths_);
  if (layer.tokens) check_token_ids(input, layer.I);

  const int64_t columns = layer.D * layer.H;
  at::Tensor y = layer.packed          ? empty({layer.N, columns}, dtype)
                 : lengths.has_value() ? at::zeros({layer.T, layer.B, columns}, dtype)
                                       : empty({layer.T, layer.B, columns}, dtype);
  at::Tensor h_n = empty({layer.D, layer.B, layer.H}, dtype);
  if (layer.N == 0 || layer.H == 0) return {y, h_n};

  count(counters().forward_fused);
  const Rows rows(layer, batch_sizes, lengths);
  with_kernels(current, dtype, [&](const auto& kernels) {
    if (!hx.has_value() && !finite_recurrence(kernels, layer, weights, has_biases)) {
      hx = at::zeros(h_n.sizes(), dtype);
    }
    forward_layer(kernels, layer, input, hx, weights, has_biases, rows.sequences(), y, h_n);
  });
  return {y, h_n};
}

// The tensor as it is where its rows lie equally far apart, be it at distance 0; else a copy.
at::Tensor with_regular_rows(const at::Tensor& y) {
  const bool regular = y.stride(-1) == 1 &&
                       (y.dim() == 2 || y.size(0) == 1 || y.stride(0) == y.size(1) * y.stride(1));
  return regular ? y : y.contiguous();
}

template <typename scalar>
void backward_layer(const Kernels<scalar>& table, const Layer& layer, const Optional& dy,
                    const Optional& dh_n, const at::Tensor& input, const Optional& hx,
                    at::TensorList weights, const at::Tensor& y, bool has_biases,
                    const Sequences& seq, std::vector<at::Tensor>& grads) {
  const int64_t per_direction = has_biases ? 4 : 2;
  const Plan plan = plan_backward(layer);
  const int64_t state = layer.B * layer.H;
  const scalar* h0 = data_or_null<scalar>(hx);
  const scalar* dy_data = data_or_null<scalar>(dy);
  const scalar* dh_n_data = data_or_null<scalar>(dh_n);
  const auto out = [](at::Tensor& grad) {
    return grad.numel() > 0 ? mutable_data<scalar>(grad) : nullptr;
  };
  std::array<BackwardArgs<scalar>, 2> args;
  size_t bytes = 0;  // of the workspace of either direction
  std::array<at::Tensor, 2> dx;
  for (int64_t d = 0; d < layer.D; ++d) {
    const at::Tensor* w = &weights[d * per_direction];
    at::Tensor* dw = &grads[2 + d * per_direction];
    dx[d] = d == 0 || grads[0].numel() == 0 ? grads[0] : at::zeros_like(grads[0]);
    scalar* dh0 = out(grads[1]);
    scalar* db = has_biases ? out(dw[2].numel() > 0 ? dw[2] : dw[3]) : nullptr;
    args[d] = {
        .seq = seq,
        .I = layer.I,
        .H = layer.H,
        .cell = layer.cell,
        .reverse = d == 1,
        .split = plan.split,
        .x = layer.tokens ? nullptr : data<scalar>(input),
        .ldx = layer.I,
        .ids = layer.tokens ? input.const_data_ptr<int64_t>() : nullptr,
        .W_ih = data<scalar>(w[0]),
        .W_hh = data<scalar>(w[1]),
        .h0 = h0 != nullptr ? h0 + d * state : nullptr,
        .y = data<scalar>(y) + d * layer.H,
        .ldy = y.stride(-2),
        .dy = dy_data != nullptr ? dy_data + d * layer.H : nullptr,
        .lddy = layer.D * layer.H,
        .dh_n = dh_n_data != nullptr ? dh_n_data + d * state : nullptr,
        .delta = nullptr,
        .dx = out(dx[d]),
        .dh0 = dh0 != nullptr ? dh0 + d * state : nullptr,
        .dW_ih = out(dw[0]),
        .dW_hh = out(dw[1]),
        .db_ih = db,
        .workspace = nullptr,
    };
    bytes = std::max(bytes, whole_pages(table.backward_workspace(args[d], plan.members)));
  }
  const size_t delta_bytes = whole_pages(layer.N * layer.H * sizeof(scalar));
  const Scratch scratch(layer.D * (delta_bytes + bytes));
  for (int64_t d = 0; d < layer.D; ++d) {
    std::byte* own = scratch.data() + d * (delta_bytes + bytes);
    args[d].delta = reinterpret_cast<scalar*>(own);
    args[d].workspace = own + delta_bytes;
  }
  const auto backward = table.backward;
  run_teams(layer.D, plan, [&](int64_t d, const Team& team) { backward(args[d], team); });
  if (layer.D == 2 && grads[0].numel() > 0) grads[0].add_(dx[1]);
  for (int64_t d = 0; has_biases && d < layer.D; ++d) {
    at::Tensor* dw = &grads[2 + d * per_direction];
    if (dw[2].numel() > 0 && dw[3].numel() > 0) {
      std::memcpy(out(dw[3]), out(dw[2]), layer.H * sizeof(scalar));
    }
  }
}

std::vector<at::Tensor> rnn_layer_backward_cpu(const Optional& dy_, const Optional& dh_n_,
                                               const at::Tensor& input_, const Optional& hx_,
                                               at::TensorList weights_, const at::Tensor& y_,
                                               const Optional& batch_sizes_,
                                               const Optional& lengths_, std::string_view mode,
                                               bool has_biases, c10::List<bool> needs) {
  const SurvivesFork guard;
  const Layer layer = check_layer_backward(dy_, dh_n_, input_, hx_, weights_, y_, batch_sizes_,
                                           lengths_, mode, has_biases, needs);
  if (why_composite(input_, hx_, weights_) != nullptr) {
    return composite::backward(dy_, dh_n_, input_, hx_, weights_, y_, batch_sizes_, lengths_, mode,
                               has_biases, needs);
  }
  // Looked up once: another thread may select another ISA meanwhile.
  const Isa& current = isa();
  const auto dtype = weights_[0].scalar_type(), computed = computed_in(current, dtype);
  if (computed != dtype) {
    return converted(
        rnn_layer_backward_cpu(converted(dy_, computed), converted(dh_n_, computed),
                               converted_input(input_, computed), converted(hx_, computed),
                               converted(weights_, computed), y_.to(computed), batch_sizes_,
                               lengths_, mode, has_biases, needs),
        dtype);
  }
  const at::Tensor input = input_.contiguous(), y = with_regular_rows(y_);
  const Optional hx = contiguous(hx_), dy = contiguous(dy_), dh_n = contiguous(dh_n_);
  const Optional batch_sizes = contiguous(batch_sizes_), lengths = contiguous(lengths_);
  std::vector<at::Tensor> copies;
  const at::TensorList weights = contiguous(weights_, &copies);
  if (layer.tokens) check_token_ids(input, layer.I);

  const bool nothing = layer.N == 0 || layer.H == 0;
  const bool gaps = lengths.has_value();
  const auto grad = [&](bool wanted, at::IntArrayRef sizes, bool zeros) {
    if (!wanted) return empty({0}, dtype);
    return zeros ? at::zeros(sizes, dtype) : empty(sizes, dtype);
  };
  std::vector<at::Tensor> grads;
  grads.reserve(needs.size());
  grads.push_back(grad(needs[0] && !layer.tokens, input.sizes(), gaps));
  grads.push_back(grad(needs[1], {layer.D, layer.B, layer.H}, nothing));
  for (size_t i = 0; i < weights.size(); ++i) {
    grads.push_back(grad(needs[2 + i], weights[i].sizes(), nothing));
  }
  if (nothing) return grads;

  count(counters().backward_fused);
  const Rows rows(layer, batch_sizes, lengths);
  with_kernels(current, dtype, [&](const auto& kernels) {
    backward_layer(kernels, layer, dy, dh_n, input, hx, weights, y, has_biases, rows.sequences(),
                   grads);
  });
  return grads;
}

}  // namespace

TORCH_LIBRARY_IMPL(charrnn_fast, CPU, m) {
  m.impl("rnn_layer", TORCH_FN(rnn_layer_cpu));
  m.impl("rnn_layer_backward", TORCH_FN(rnn_layer_backward_cpu));
}

}  // namespace charrnn_fast
