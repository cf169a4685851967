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
    default:
      TORCH_INTERNAL_ASSERT(false);
  }
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
    default:
      TORCH_INTERNAL_ASSERT(false);
  }
}

// [..., X] -> [rows, X]. Not at::flatten: the vmap behind is_grads_batched has no rule for it.
Tensor as_rows(const Tensor& tensor) {
  c10::SymInt rows = 1;
  for (const c10::SymInt& size : tensor.sym_sizes().slice(0, tensor.dim() - 1)) rows *= size;
  return tensor.reshape_symint({rows, tensor.sym_size(-1)});
}

// Where rows lie: how many steps, for packed or ragged input which rows are real, and where a
// sequence is split in pieces.
struct PaddedRows {
  int64_t T = 0;
  bool packed = false;
  Tensor valid;   // bool [T, B, 1], or undefined: all rows are
  Tensor last;    // bool [T, B, 1]: the last step of each sequence; defined with valid
  Tensor pad;     // int64 [T*B]: the packed row at each padded place, 0 where there is none
  Tensor unpad;   // int64 [N]: the padded place of each packed row
  int64_t B = 0;  // of packed input only
  // bool [T, B, 1], or undefined: steps that begin from zeros, not from the step run before. In
  // reverse the step run before is the next in time, and it is that one which is marked.
  Tensor fresh[2];

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

PaddedRows find_rows(const Call& call) {
  const auto& [input, batch_sizes, lengths, resets] =
      std::tie(call.input, call.batch_sizes, call.lengths, call.resets);
  PaddedRows rows;
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
    if (lengths.has_value()) length = lengths->to(at::kLong);
  }
  if (length.defined()) {
    length = length.to(input.device()).view({1, -1, 1});
    const Tensor step = at::arange(rows.T, length.options()).view({-1, 1, 1});
    rows.valid = step.lt(length);
    rows.last = step.eq(length - 1);
  }
  if (resets.has_value()) {
    TORCH_CHECK_VALUE(!rows.packed,
                      "resets cannot be given with packed input: pad it, and give lengths=");
    const Tensor marked = resets->unsqueeze(-1).to(at::kBool);
    // A mark past a sequence's end splits nothing.
    const Tensor real = rows.valid.defined() ? marked.logical_and(rows.valid) : marked;
    rows.fresh[0] = marked;
    rows.fresh[1] = at::cat({real.slice(0, 1), at::zeros_like(real.slice(0, 0, 1))});
  }
  return rows;
}

// The input as the formula may see it. What is past a sequence's end may be anything, nan too, and
// a gradient of zero times that is nan.
Tensor without_padding(const Tensor& input, const PaddedRows& rows) {
  if (rows.packed || !rows.valid.defined() || input.scalar_type() == at::kLong) return input;
  return at::where(rows.valid, input, at::zeros_like(input));
}

// x W_ih' + b_ih over all rows; ids pick columns of W_ih instead.
Tensor project(const Tensor& input, const Weights& w) {
  if (input.scalar_type() != at::kLong) return at::linear(input, w.W_ih, w.b_ih);
  const Tensor picked = at::embedding(w.W_ih.t(), input);
  return w.b_ih.defined() ? picked + w.b_ih : picked;
}

void check_ids(const Call& call) {
  const Tensor& input = call.input;
  if (input.scalar_type() == at::kLong && input.device().is_cpu() &&
      !at::isTensorSubclassLike(input)) {
    check_token_ids(input.contiguous(), call.weights[0].size(1));
  }
}

// What goes from step to step: h, and the c of a cell that has one, else undefined. Backward, their
// gradients.
struct State {
  Tensor h, c;
};

// Of h and c, or of h alone.
template <typename Function>
State each(const State& state, const Function& function) {
  return {function(state.h), state.c.defined() ? function(state.c) : Tensor()};
}

State where(const Tensor& condition, const State& a, const State& b) {
  return {at::where(condition, a.h, b.h), a.c.defined() ? at::where(condition, a.c, b.c) : a.c};
}

State where_not(const Tensor& condition, const State& state) {
  return each(state,
              [&](const Tensor& part) { return at::where(condition, at::zeros_like(part), part); });
}

// States of one direction, or their gradients; zeros like `like` where there are none.
State initial(const Optional& h, const Optional& c, bool has_state, int64_t direction,
              const Tensor& like) {
  const auto part = [&](const Optional& all) {
    return all.has_value() ? all->select(0, direction) : at::zeros_like(like);
  };
  return {part(h), has_state ? part(c) : Tensor()};
}

// The state after a step, from x W_ih' + b_ih and the state before it.
State step(Cell cell, const Tensor& from_x, const State& before, const Weights& w) {
  const Tensor from_h = at::linear(before.h, w.W_hh, w.b_hh);
  if (cell == Cell::kLstm) {
    const std::vector<Tensor> sum = (from_h + from_x).chunk(4, -1);
    const Tensor i = at::sigmoid(sum[0]), f = at::sigmoid(sum[1]), g = at::tanh(sum[2]);
    const Tensor c = f * before.c + i * g;
    return {at::sigmoid(sum[3]) * at::tanh(c), c};
  }
  if (cell == Cell::kGru) {
    const std::vector<Tensor> x = from_x.chunk(3, -1), h = from_h.chunk(3, -1);
    const Tensor r = at::sigmoid(x[0] + h[0]), z = at::sigmoid(x[1] + h[1]);
    const Tensor n = at::tanh(x[2] + r * h[2]);
    return {n + z * (before.h - n), Tensor()};
  }
  return {activate(from_h + from_x, cell), Tensor()};
}

// The gradients of a step: of its sums, as rows of W_ih and W_hh are ordered, and of the state
// before it.
struct Deltas {
  Tensor x, h;
  State before;
};

// Backward of the steps of one direction, each from what y and x tell of it: the gates are computed
// again, those of all steps with one product.
class StepsBackward {
 public:
  // y [T, B, H], from_x [T, B, G*H], and before [T, B, H] the h that each step began from. Of
  // from_x and before an Elman cell makes no use.
  StepsBackward(Cell cell, const Weights& w, const PaddedRows& rows, bool reverse, const Tensor& y,
                const Tensor& from_x, const Tensor& before, const State& start)
      : cell_(cell), W_hh_(w.W_hh.conj()), y_(y.unbind(0)) {
    if (cell == Cell::kLstm) {
      lstm(at::linear(before, w.W_hh, w.b_hh) + from_x, rows, reverse, start.c);
    } else if (cell == Cell::kGru) {
      gru(from_x.chunk(3, -1), at::linear(before, w.W_hh, w.b_hh).chunk(3, -1), before);
    }
  }

  // From the gradients of the state after step t.
  Deltas run(int64_t t, const State& grad) const {
    if (cell_ == Cell::kLstm) {
      const Tensor dc = grad.c + grad.h * slopes_[4][t];
      const Tensor delta = at::cat(
          {dc * slopes_[0][t], dc * slopes_[1][t], dc * slopes_[2][t], grad.h * slopes_[3][t]}, -1);
      return {delta, delta, {at::matmul(delta, W_hh_), dc * slopes_[5][t]}};
    }
    if (cell_ == Cell::kGru) {
      const Tensor dn = grad.h * slopes_[2][t], dr = dn * slopes_[0][t];
      const Tensor dz = grad.h * slopes_[1][t];
      const Tensor delta_h = at::cat({dr, dz, dn * slopes_[3][t]}, -1);
      return {at::cat({dr, dz, dn}, -1),
              delta_h,
              {at::matmul(delta_h, W_hh_) + grad.h * slopes_[4][t], Tensor()}};
    }
    const Tensor delta = activate_backward(grad.h, y_[t], cell_);
    return {delta, delta, {at::matmul(delta, W_hh_), Tensor()}};
  }

 private:
  void lstm(const Tensor& sums, const PaddedRows& rows, bool reverse, Tensor c) {
    const std::vector<Tensor> sum = sums.chunk(4, -1);
    const Tensor i = at::sigmoid(sum[0]), f = at::sigmoid(sum[1]), g = at::tanh(sum[2]);
    const Tensor o = at::sigmoid(sum[3]), added = i * g;
    const std::vector<Tensor> f_t = f.unbind(0), added_t = added.unbind(0);
    std::vector<Tensor> before(rows.T), after(rows.T);
    for (int64_t k = 0; k < rows.T; ++k) {
      const int64_t t = reverse ? rows.T - 1 - k : k;
      before[t] = c;
      if (rows.fresh[reverse].defined()) {
        before[t] = at::where(rows.fresh[reverse].select(0, t), at::zeros_like(c), c);
      }
      after[t] = f_t[t] * before[t] + added_t[t];
      c = rows.valid.defined() ? at::where(rows.valid.select(0, t), after[t], c) : after[t];
    }
    const Tensor tanh_c = at::tanh(at::stack(after));
    keep({g * i * (1 - i), at::stack(before) * f * (1 - f), i * (1 - g * g), tanh_c * o * (1 - o),
          o * (1 - tanh_c * tanh_c), f});
  }

  void gru(const std::vector<Tensor>& x, const std::vector<Tensor>& h, const Tensor& before) {
    const Tensor r = at::sigmoid(x[0] + h[0]), z = at::sigmoid(x[1] + h[1]);
    const Tensor n = at::tanh(x[2] + r * h[2]);
    keep({h[2] * r * (1 - r), (before - n) * z * (1 - z), (1 - z) * (1 - n * n), r, z});
  }

  void keep(const std::vector<Tensor>& slopes) {
    for (const Tensor& slope : slopes) slopes_.push_back(slope.conj().unbind(0));
  }

  Cell cell_;
  Tensor W_hh_;
  std::vector<Tensor> y_;
  // By what a gradient is multiplied in each step. LSTM: dc for the sums of i, f and g, dh for that
  // of o, dh for dc, dc for the step before. GRU: the gradient of n's sum for that of r, dh for the
  // sums of z and n, that of n for what r multiplies, dh for the step before.
  std::vector<std::vector<Tensor>> slopes_;
};

// The h that each step began from: [T, B, H], of y [T, B, H] and h0 [B, H].
Tensor states_before(const Tensor& y, const Tensor& h0, const PaddedRows& rows, bool reverse) {
  const Tensor first = h0.unsqueeze(0);
  Tensor before = reverse ? at::cat({y.slice(0, 1), first}) : at::cat({first, y.slice(0, 0, -1)});
  // A shorter sequence starts, in reverse, at its own last step.
  if (reverse && rows.valid.defined()) before = at::where(rows.last, first, before);
  const Tensor& fresh = rows.fresh[reverse];
  return fresh.defined() ? at::where(fresh, at::zeros_like(before), before) : before;
}

}  // namespace

LayerResult forward(const Call& call) {
  count(counters().forward_composite);
  const Cell cell = parse_mode(call.mode);
  const CellSizes sizes = sizes_of(cell);
  check_kind(call);
  const PaddedRows rows = find_rows(call);
  check_ids(call);
  const Tensor input = without_padding(call.input, rows);
  std::vector<Tensor> y, cells, h_n, c_n;
  for (int64_t d = 0; d < directions_of(call); ++d) {
    const Weights w = weights_of(call, d);
    const bool reverse = d == 1;
    const std::vector<Tensor> from_x = rows.padded(project(input, w)).unbind(0);
    std::vector<Tensor> h_t(rows.T), c_t(rows.T);
    const Tensor like =
        sizes.gates == 1 ? from_x[0] : from_x[0].narrow_symint(-1, 0, w.W_hh.sym_size(1));
    State state = initial(call.hx, call.cx, sizes.has_state, d, like);
    for (int64_t i = 0; i < rows.T; ++i) {
      const int64_t t = reverse ? rows.T - 1 - i : i;
      const Tensor& fresh = rows.fresh[reverse];
      State next =
          step(cell, from_x[t], fresh.defined() ? where_not(fresh.select(0, t), state) : state, w);
      if (rows.valid.defined()) {
        const Tensor valid = rows.valid.select(0, t);
        state = where(valid, next, state);
        next = where(valid, next, each(next, [](const Tensor& a) { return at::zeros_like(a); }));
      } else {
        state = next;
      }
      h_t[t] = next.h;
      c_t[t] = next.c;
    }
    y.push_back(at::stack(h_t));
    if (call.cells) cells.push_back(at::stack(c_t));
    h_n.push_back(state.h);
    if (sizes.has_state) c_n.push_back(state.c);
  }
  const auto all = [&](const std::vector<Tensor>& parts) {
    return rows.unpadded(parts.size() == 1 ? parts[0] : at::cat(parts, -1));
  };
  return {all(y), at::stack(h_n), sizes.has_state ? at::stack(c_n) : Tensor(),
          call.cells ? all(cells) : Tensor(), Tensor()};
}

std::vector<Tensor> backward(const Grads& given, const Call& call, const Tensor& y,
                             const Optional& saved, const c10::List<bool>& needs) {
  count(counters().backward_composite);
  check_needs(call, needs);
  const Cell cell = parse_mode(call.mode);
  const CellSizes sizes = sizes_of(cell);
  if (sizes.gates > 1) expect_unchanged_operands();
  const bool tokens = call.input.scalar_type() == at::kLong;
  check_kind(call);
  for (const Optional& tensor : {given.dy, given.dh_n, given.dc_n, given.dcells, Optional(y)}) {
    TORCH_CHECK(!tensor.has_value() || tensor->layout() == at::kStrided,
                "RNN gradients must be dense tensors, not sparse");
  }
  TORCH_CHECK(!saved.has_value() || (saved->layout() == at::kStrided && !saved->is_quantized()),
              "saved must be what rnn_layer returned, or None");
  check_ids(call);
  const PaddedRows rows = find_rows(call);
  const Tensor input = without_padding(call.input, rows);
  const int64_t D = directions_of(call);
  // The columns of one direction of what has those of all: [T, B, H].
  const auto columns = [&](const Tensor& of_all, int64_t d) {
    const Tensor padded = rows.padded(of_all);
    return D == 1 ? padded : padded.chunk(D, -1)[d];
  };
  const auto by_step = [&](const Optional& of_all, int64_t d) {
    return of_all.has_value() ? columns(*of_all, d).unbind(0) : std::vector<Tensor>();
  };

  std::vector<Tensor> grads(needs.size());
  std::vector<Tensor> dh0, dc0;
  Tensor dx;
  for (int64_t d = 0; d < D; ++d) {
    const Weights w = weights_of(call, d);
    const size_t first = first_weight(call.has_biases, d);
    const bool reverse = d == 1;
    const Tensor y_d = columns(y, d), like = y_d.select(0, 0);
    const std::vector<Tensor> dy_t = by_step(given.dy, d), dcells_t = by_step(given.dcells, d);
    const State start = initial(call.hx, call.cx, sizes.has_state, d, like);
    const bool again = sizes.gates > 1;
    Tensor before, from_x;
    if (again || needs[first + 1]) before = states_before(y_d, start.h, rows, reverse);
    if (again) from_x = rows.padded(project(input, w));
    const StepsBackward steps(cell, w, rows, reverse, y_d, from_x, before, start);

    State grad = initial(given.dh_n, given.dc_n, sizes.has_state, d, like);
    std::vector<Tensor> deltas_x(rows.T), deltas_h(rows.T);
    for (int64_t i = 0; i < rows.T; ++i) {
      const int64_t t = reverse ? i : rows.T - 1 - i;
      State after = grad;
      if (!dy_t.empty()) after.h = dy_t[t] + after.h;
      if (!dcells_t.empty()) after.c = dcells_t[t] + after.c;
      Deltas deltas = steps.run(t, after);
      if (rows.fresh[reverse].defined()) {
        deltas.before = where_not(rows.fresh[reverse].select(0, t), deltas.before);
      }
      const bool apart = !deltas.x.is_same(deltas.h);
      if (rows.valid.defined()) {
        const Tensor valid = rows.valid.select(0, t);
        deltas.h = at::where(valid, deltas.h, at::zeros_like(deltas.h));
        if (apart) deltas.x = at::where(valid, deltas.x, at::zeros_like(deltas.x));
        deltas.before = where(valid, deltas.before, grad);
      }
      grad = deltas.before;
      deltas_h[t] = deltas.h;
      if (apart) deltas_x[t] = deltas.x;
    }
    dh0.push_back(grad.h);
    dc0.push_back(grad.c);
    const Tensor delta_h = at::stack(deltas_h);  // [T, B, G*H]
    const Tensor delta_x = deltas_x[0].defined() ? at::stack(deltas_x) : delta_h;
    const Tensor rows_x = rows.unpadded(delta_x), rows_h = rows.unpadded(delta_h);

    if (needs[kInput]) {
      const Tensor part = at::matmul(rows_x, w.W_ih.conj());
      dx = dx.defined() ? dx + part : part;
    }
    const Tensor flat_x = as_rows(rows_x), flat_h = as_rows(rows_h);
    if (needs[first]) {
      if (tokens) {
        const Tensor zeros = at::zeros_like(w.W_ih).t();
        grads[first] = zeros.index_add(0, call.input.reshape(-1), flat_x).t();
      } else {
        grads[first] = at::matmul(flat_x.t(), as_rows(input).conj());
      }
    }
    if (needs[first + 1]) {
      grads[first + 1] = at::matmul(as_rows(delta_h).t(), as_rows(before).conj());
    }
    // Tensors of their own: a later in-place change of one gradient must not reach the other.
    if (call.has_biases && needs[first + 2]) grads[first + 2] = flat_x.sum(0);
    if (call.has_biases && needs[first + 3]) grads[first + 3] = flat_h.sum(0);
  }
  if (needs[kInput]) grads[kInput] = dx;
  if (needs[kHx]) grads[kHx] = at::stack(dh0);
  if (needs[kCx]) grads[kCx] = at::stack(dc0);
  return listed(std::move(grads));
}

}  // namespace charrnn_fast::composite
