// One layer in differentiable at:: ops: the formulas behind the kernels, for what the kernels do
// not serve (other dtypes and devices, double backward, forward-mode AD, vmap). Packed rows become
// padded ones with lengths on the way in, and padded rows packed ones on the way out.
#include <ATen/TensorSubclassLikeUtils.h>

#include "layer.h"

namespace charrnn_fast::composite {
namespace {

using at::Tensor;

Tensor activate(const Tensor& sum, Cell cell) {
  switch (cell) {
    case Cell::kTanh:
      return at::tanh(sum);
    case Cell::kRelu:
      return at::relu(sum);
    case Cell::kSigmoid:
      return at::sigmoid(sum);
  }
  TORCH_INTERNAL_ASSERT(false);
}

// The gradient of the sum inside the activation, by means of its result alone.
Tensor activate_backward(const Tensor& grad, const Tensor& y, Cell cell) {
  switch (cell) {
    case Cell::kTanh:
      return at::tanh_backward(grad, y);
    case Cell::kRelu:
      return at::threshold_backward(grad, y, 0);
    case Cell::kSigmoid:
      return at::sigmoid_backward(grad, y);
  }
  TORCH_INTERNAL_ASSERT(false);
}

// The weights of one direction.
struct Direction {
  Tensor W_ih, W_hh, b_ih, b_hh;
  bool reverse;
};

std::vector<Direction> directions(at::TensorList weights, bool has_biases) {
  const size_t step = has_biases ? 4 : 2;
  std::vector<Direction> result;
  for (size_t i = 0; i < weights.size(); i += step) {
    result.push_back({weights[i], weights[i + 1], has_biases ? weights[i + 2] : Tensor(),
                      has_biases ? weights[i + 3] : Tensor(), i > 0});
  }
  return result;
}

// [..., X] -> [rows, X]. Not at::flatten: the vmap behind is_grads_batched has no rule for it.
Tensor as_rows(const Tensor& tensor) {
  c10::SymInt rows = 1;
  for (const c10::SymInt& size : tensor.sym_sizes().slice(0, tensor.dim() - 1)) rows *= size;
  return tensor.reshape_symint({rows, tensor.sym_size(-1)});
}

// Where rows lie: how many steps, and for packed or ragged input which rows are real.
struct Rows {
  int64_t T = 0;
  bool packed = false;
  Tensor valid;   // bool [T, B, 1], or undefined: all rows are
  Tensor last;    // bool [T, B, 1]: the last step of each sequence; defined with valid
  Tensor pad;     // int64 [T*B]: the packed row at each padded place, 0 where there is none
  Tensor unpad;   // int64 [N]: the padded place of each packed row
  int64_t B = 0;  // of packed input only

  // [N, X] or [T, B, X] -> [T, B, X]
  Tensor padded(const Tensor& rows) const {
    if (!packed) return rows;
    return rows.index_select(0, pad).view_symint({T, B, rows.sym_size(-1)});
  }
  // [T, B, X] -> [N, X] or [T, B, X]
  Tensor unpadded(const Tensor& rows) const {
    if (!packed) return rows;
    return as_rows(rows).index_select(0, unpad);
  }
};

Rows find_rows(const Tensor& input, const Optional& batch_sizes, const Optional& lengths) {
  Rows rows;
  Tensor length;
  if (batch_sizes.has_value()) {
    const Tensor sizes = batch_sizes->contiguous();
    const int64_t* size = sizes.const_data_ptr<int64_t>();
    rows.packed = true;
    rows.T = sizes.numel();
    rows.B = size[0];
    std::vector<int64_t> pad(rows.T * rows.B, 0), unpad, steps(rows.B, 0);
    for (int64_t t = 0; t < rows.T; ++t) {
      for (int64_t b = 0; b < size[t]; ++b) {
        pad[t * rows.B + b] = static_cast<int64_t>(unpad.size());
        unpad.push_back(t * rows.B + b);
        steps[b] = t + 1;
      }
    }
    rows.pad = at::tensor(pad, at::kLong).to(input.device());
    rows.unpad = at::tensor(unpad, at::kLong).to(input.device());
    length = at::tensor(steps, at::kLong);
  } else {
    rows.T = input.sym_size(0).guard_int(__FILE__, __LINE__);
    TORCH_CHECK(rows.T > 0, "Expected sequence length to be larger than 0 in RNN");
    if (lengths.has_value()) length = *lengths;
  }
  if (length.defined()) {
    length = length.to(input.device()).view({1, -1, 1});
    const Tensor step = at::arange(rows.T, length.options()).view({-1, 1, 1});
    rows.valid = step.lt(length);
    rows.last = step.eq(length - 1);
  }
  return rows;
}

// x W_ih' + b_ih over all rows; ids pick columns of W_ih instead.
Tensor project(const Tensor& input, const Direction& d) {
  if (input.scalar_type() != at::kLong) return at::linear(input, d.W_ih, d.b_ih);
  const Tensor picked = at::embedding(d.W_ih.t(), input);
  return d.b_ih.defined() ? picked + d.b_ih : picked;
}

void check_ids(const Tensor& input, at::TensorList weights) {
  if (input.scalar_type() == at::kLong && input.device().is_cpu() &&
      !at::isTensorSubclassLike(input)) {
    check_token_ids(input.contiguous(), weights[0].size(1));
  }
}

Tensor initial(const Optional& hx, int64_t direction, const Tensor& step) {
  return hx.has_value() ? hx->select(0, direction) : at::zeros_like(step);
}

}  // namespace

Pair forward(const Tensor& input, const Optional& hx, at::TensorList weights,
             const Optional& batch_sizes, const Optional& lengths, std::string_view mode,
             bool has_biases) {
  count(counters().forward_composite);
  const Cell cell = parse_mode(mode);
  check_dense(input, hx, weights);
  const Rows rows = find_rows(input, batch_sizes, lengths);
  check_ids(input, weights);
  std::vector<Tensor> y, h_n;
  for (const Direction& d : directions(weights, has_biases)) {
    const std::vector<Tensor> sums = rows.padded(project(input, d)).unbind(0);
    std::vector<Tensor> steps(rows.T);
    Tensor h = initial(hx, d.reverse, sums[0]);
    for (int64_t i = 0; i < rows.T; ++i) {
      const int64_t t = d.reverse ? rows.T - 1 - i : i;
      const Tensor next = activate(at::linear(h, d.W_hh, d.b_hh) + sums[t], cell);
      if (rows.valid.defined()) {
        const Tensor valid = rows.valid.select(0, t);
        h = at::where(valid, next, h);
        steps[t] = at::where(valid, next, at::zeros_like(next));
      } else {
        steps[t] = h = next;
      }
    }
    y.push_back(at::stack(steps));
    h_n.push_back(h);
  }
  const Tensor all = y.size() == 1 ? y[0] : at::cat(y, -1);
  return {rows.unpadded(all), at::stack(h_n)};
}

std::vector<Tensor> backward(const Optional& dy, const Optional& dh_n, const Tensor& input,
                             const Optional& hx, at::TensorList weights, const Tensor& y,
                             const Optional& batch_sizes, const Optional& lengths,
                             std::string_view mode, bool has_biases, const c10::List<bool>& needs) {
  count(counters().backward_composite);
  TORCH_CHECK(needs.size() == weights.size() + 2, "needs must have ", weights.size() + 2,
              " entries, one for each of input, hx and the weights, got ", needs.size());
  const Cell cell = parse_mode(mode);
  const bool tokens = input.scalar_type() == at::kLong;
  check_dense(input, hx, weights);
  for (const Optional& tensor : {dy, dh_n, Optional(y)}) {
    TORCH_CHECK(!tensor.has_value() || tensor->layout() == at::kStrided,
                "RNN gradients must be dense tensors, not sparse");
  }
  check_ids(input, weights);
  const Rows rows = find_rows(input, batch_sizes, lengths);
  const auto all = directions(weights, has_biases);
  const auto D = static_cast<int64_t>(all.size());
  const size_t per_direction = has_biases ? 4 : 2;
  const Tensor padded_y = rows.padded(y);
  const Tensor padded_dy = dy.has_value() ? rows.padded(*dy) : Tensor();

  std::vector<Tensor> grads(needs.size());
  std::vector<Tensor> dh0;
  Tensor dx;
  for (const Direction& d : all) {
    const auto index = static_cast<int64_t>(d.reverse);
    const Tensor y_d = D == 1 ? padded_y : padded_y.chunk(D, -1)[index];
    const std::vector<Tensor> y_t = y_d.unbind(0);
    std::vector<Tensor> dy_t;
    if (padded_dy.defined()) dy_t = (D == 1 ? padded_dy : padded_dy.chunk(D, -1)[index]).unbind(0);
    Tensor dh = dh_n.has_value() ? dh_n->select(0, index) : at::zeros_like(y_t[0]);
    std::vector<Tensor> deltas(rows.T);
    for (int64_t i = 0; i < rows.T; ++i) {
      const int64_t t = d.reverse ? i : rows.T - 1 - i;
      const Tensor dh_t = dy_t.empty() ? dh : dy_t[t] + dh;
      deltas[t] = activate_backward(dh_t, y_t[t], cell);
      Tensor before = at::matmul(deltas[t], d.W_hh.conj());
      if (rows.valid.defined()) {
        const Tensor valid = rows.valid.select(0, t);
        deltas[t] = at::where(valid, deltas[t], at::zeros_like(deltas[t]));
        before = at::where(valid, before, dh);
      }
      dh = before;
    }
    dh0.push_back(dh);
    const Tensor delta = at::stack(deltas);  // [T, B, H]
    const Tensor delta_rows = rows.unpadded(delta);

    if (needs[0]) {
      const Tensor part = at::matmul(delta_rows, d.W_ih.conj());
      dx = dx.defined() ? dx + part : part;
    }
    const size_t first = 2 + index * per_direction;
    const Tensor flat = as_rows(delta_rows);
    if (needs[first]) {
      if (tokens) {
        const Tensor zeros = at::zeros_like(d.W_ih).t();
        grads[first] = zeros.index_add(0, input.reshape(-1), flat).t();
      } else {
        grads[first] = at::matmul(flat.t(), as_rows(input).conj());
      }
    }
    if (needs[first + 1]) {
      const Tensor h0 = initial(hx, index, y_t[0]).unsqueeze(0);
      Tensor prev = d.reverse ? at::cat({y_d.slice(0, 1), h0}) : at::cat({h0, y_d.slice(0, 0, -1)});
      // A shorter sequence starts, in reverse, at its own last step.
      if (d.reverse && rows.valid.defined()) prev = at::where(rows.last, h0, prev);
      grads[first + 1] = at::matmul(as_rows(delta).t(), as_rows(prev).conj());
    }
    if (has_biases && (needs[first + 2] || needs[first + 3])) {
      const Tensor db = flat.sum(0);
      if (needs[first + 2]) grads[first + 2] = db;
      // A tensor of its own: a later in-place change of one gradient must not reach the other.
      if (needs[first + 3]) grads[first + 3] = needs[first + 2] ? db.clone() : db;
    }
  }
  if (needs[0]) grads[0] = dx;
  if (needs[1]) grads[1] = at::stack(dh0);
  for (auto& grad : grads) {
    if (!grad.defined()) grad = at::empty({0}, y.options());
  }
  return grads;
}

}  // namespace charrnn_fast::composite
