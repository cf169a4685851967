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
#include "operands.h"
#include "teams.h"

namespace charrnn_fast {

static at::ScalarType computed_by(const Isa& isa, at::ScalarType dtype) {
  if (dtype == at::kDouble || (dtype == at::kBFloat16 && isa.bf16 != nullptr)) return dtype;
  return at::kFloat;
}

at::ScalarType computed_in(at::ScalarType dtype) { return computed_by(isa(), dtype); }

namespace {

// The layout of the rows, with the arrays it points to.
class Rows {
 public:
  Rows(const Layer& layer, const Optional& batch_sizes, const Optional& lengths,
       const Optional& resets)
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
    } else if (resets.has_value()) {
      const int64_t* steps = lengths.has_value() ? lengths->const_data_ptr<int64_t>() : nullptr;
      split(layer, steps, resets->const_data_ptr<bool>());
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

  // Of one direction.
  Sequences sequences(bool reverse) const {
    Sequences seq = seq_;
    if (pieces_.empty()) return seq;
    seq.start_row = reverse ? last_.data() : first_.data();
    seq.end_row = reverse ? first_of_all_.data() : last_.data();
    return seq;
  }
  // The sizes by which a call is divided among threads: a piece counts as a sequence.
  Layer planned(Layer layer) const {
    layer.T = seq_.T;
    layer.B = seq_.B;
    return layer;
  }

 private:
  struct Piece {
    int64_t sequence, begin, end;
  };

  // The pieces between resets, as sequences of their own.
  void split(const Layer& layer, const int64_t* steps, const bool* reset) {
    for (int64_t b = 0; b < layer.B; ++b) {
      const int64_t end = steps != nullptr ? steps[b] : layer.T;
      int64_t begin = 0;
      for (int64_t t = 1; t < end; ++t) {
        if (!reset[t * layer.B + b]) continue;
        pieces_.push_back({b, begin, t});
        begin = t;
      }
      pieces_.push_back({b, begin, end});
    }
    std::stable_sort(pieces_.begin(), pieces_.end(), [](const Piece& a, const Piece& b) {
      return a.end - a.begin > b.end - b.begin;
    });
    for (const Piece& piece : pieces_) {
      const int64_t b = piece.sequence, length = steps != nullptr ? steps[b] : layer.T;
      lengths_.push_back(piece.end - piece.begin);
      slot_row_.push_back(piece.begin * layer.B + b);
      first_of_all_.push_back(piece.begin == 0 ? b : -1);
      first_.push_back(piece.begin == 0 && !reset[b] ? b : -1);
      last_.push_back(piece.end == length ? b : -1);
    }
    seq_.T = lengths_[0];
    seq_.B = static_cast<int64_t>(pieces_.size());
    seq_.slot_row = slot_row_.data();
    seq_.lengths = lengths_.data();
  }

  std::vector<int64_t> step_row_, lengths_, slot_row_;
  // Of each piece the sequence whose first, or last, one it is, else -1. In `first_` only where no
  // reset comes before the first step.
  std::vector<int64_t> first_, first_of_all_, last_;
  std::vector<Piece> pieces_;
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

template <typename scalar>
const scalar* data_or_null(const Optional& tensor, int64_t offset) {
  return tensor.has_value() ? data<scalar>(*tensor) + offset : nullptr;
}

// Where to write, or null where a result is empty, or undefined, as what nobody asked for is.
template <typename scalar>
scalar* out(const at::Tensor& tensor, int64_t offset) {
  return tensor.numel() > 0 ? mutable_data<scalar>(tensor) + offset : nullptr;
}

template <typename scalar>
void forward_layer(const Kernels<scalar>& table, const Layer& layer, const Rows& rows,
                   const Call& call, const LayerResult& result) {
  const auto& [y, h_n, c_n, cells, saved] = result;
  const Plan plan = plan_forward(rows.planned(layer));
  const int64_t state = layer.B * layer.H, columns = layer.D * layer.H;
  const int64_t saved_size = layer.N * sizes_of(layer.cell).saved * layer.H;
  std::array<ForwardArgs<scalar>, 2> args;
  for (int64_t d = 0; d < layer.D; ++d) {
    const Weights w = weights_of(call, d);
    args[d] = {
        .seq = rows.sequences(d == 1),
        .I = layer.I,
        .H = layer.H,
        .cell = layer.cell,
        .reverse = d == 1,
        .split = plan.split,
        .x = layer.tokens ? nullptr : data<scalar>(call.input),
        .ldx = layer.I,
        .ids = layer.tokens ? call.input.const_data_ptr<int64_t>() : nullptr,
        .W_ih = data<scalar>(w.W_ih),
        .W_hh = data<scalar>(w.W_hh),
        .b_ih = call.has_biases ? data<scalar>(w.b_ih) : nullptr,
        .b_hh = call.has_biases ? data<scalar>(w.b_hh) : nullptr,
        .h0 = data_or_null<scalar>(call.hx, d * state),
        .c0 = data_or_null<scalar>(call.cx, d * state),
        .y = out<scalar>(y, d * layer.H),
        .ldy = columns,
        .h_n = out<scalar>(h_n, d * state),
        .c_n = out<scalar>(c_n, d * state),
        .cells = out<scalar>(cells, d * layer.H),
        .ldcells = columns,
        .saved = out<scalar>(saved, d * saved_size),
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
bool finite_recurrence(const Kernels<scalar>& table, const Call& call) {
  for (int64_t d = 0; d < directions_of(call); ++d) {
    const at::Tensor& W_hh = weights_of(call, d).W_hh;
    if (!table.all_finite(data<scalar>(W_hh), W_hh.numel())) return false;
  }
  return true;
}

// Zeros in the rows past each sequence's end, which the kernels leave alone, of a tensor that has N
// rows, perhaps for each direction.
void clear_gaps(const at::Tensor& tensor, const Layer& layer, const at::Tensor& lengths) {
  if (tensor.numel() == 0) return;
  const int64_t blocks = tensor.dim() == 3 && tensor.size(1) == layer.N ? tensor.size(0) : 1;
  const size_t bytes = tensor.numel() / (blocks * layer.N) * tensor.element_size();
  const int64_t* steps = lengths.const_data_ptr<int64_t>();
  auto* data = static_cast<std::byte*>(tensor.mutable_data_ptr());
  for (int64_t block = 0; block < blocks; ++block) {
    for (int64_t t = 0; t < layer.T; ++t) {
      for (int64_t b = 0; b < layer.B; ++b) {
        if (t < steps[b]) continue;
        std::memset(data + ((block * layer.T + t) * layer.B + b) * bytes, 0, bytes);
      }
    }
  }
}

// By the kernels of one ISA: another thread may select another one meanwhile.
LayerResult forward_by_kernels(const Isa& current, const Layer& layer, const Call& given) {
  const auto dtype = given.weights[0].scalar_type(), computed = computed_by(current, dtype);
  Operands operands(given, computed);
  const Call& call = operands.call;
  if (layer.tokens) check_token_ids(call.input, layer.I);

  const CellSizes sizes = sizes_of(layer.cell);
  const auto states = [&](bool wanted) {
    return wanted ? empty({layer.D, layer.B, layer.H}, computed) : at::Tensor();
  };
  const auto steps = [&](bool wanted) {
    const int64_t columns = layer.D * layer.H;
    return !wanted        ? at::Tensor()
           : layer.packed ? empty({layer.N, columns}, computed)
                          : empty({layer.T, layer.B, columns}, computed);
  };
  LayerResult result{steps(true), states(true), states(sizes.has_state), steps(call.cells),
                     call.keep && sizes.saved > 0
                         ? empty({layer.D, layer.N, sizes.saved * layer.H}, computed)
                         : at::Tensor()};
  if (call.lengths.has_value()) {
    const auto& [y, h_n, c_n, cells, saved] = result;
    for (const at::Tensor& rows : {y, cells, saved}) clear_gaps(rows, layer, *call.lengths);
  }
  if (layer.N > 0 && layer.H > 0) {
    count(counters().forward_fused);
    const Rows rows(layer, call.batch_sizes, call.lengths, call.resets);
    with_kernels(current, computed, [&](const auto& kernels) {
      if (!call.hx.has_value() && !finite_recurrence(kernels, call)) {
        operands.hx = at::zeros({layer.D, layer.B, layer.H}, computed);
      }
      forward_layer(kernels, layer, rows, call, result);
    });
  }
  if (computed == dtype) return result;
  auto& [y, h_n, c_n, cells, saved] = result;
  for (at::Tensor* each : {&y, &h_n, &c_n, &cells}) {
    if (each->defined()) *each = each->to(dtype);
  }
  return result;
}

LayerResult forward_cpu(const Call& call) {
  const SurvivesFork guard;
  const Layer layer = check_layer(call);
  if (why_composite(call) != nullptr) return composite::forward(call);
  return forward_by_kernels(isa(), layer, call);
}

// The tensor as it is where its rows lie equally far apart, be it at distance 0; else a copy.
at::Tensor with_regular_rows(const at::Tensor& y) {
  const bool regular = y.stride(-1) == 1 &&
                       (y.dim() == 2 || y.size(0) == 1 || y.stride(0) == y.size(1) * y.stride(1));
  return regular ? y : y.contiguous();
}

template <typename scalar>
void backward_layer(const Kernels<scalar>& table, const Layer& layer, const Rows& rows,
                    const Grads& given, const Call& call, const at::Tensor& y,
                    const Optional& saved, const std::vector<at::Tensor>& grads) {
  const Plan plan = plan_backward(rows.planned(layer));
  const CellSizes sizes = sizes_of(layer.cell);
  const int64_t state = layer.B * layer.H, columns = layer.D * layer.H;
  std::array<BackwardArgs<scalar>, 2> args;
  size_t bytes = 0;  // of the workspace of either direction
  std::array<at::Tensor, 2> dx;
  for (int64_t d = 0; d < layer.D; ++d) {
    const Weights w = weights_of(call, d);
    const at::Tensor* dw = &grads[first_weight(call.has_biases, d)];
    const at::Tensor& dx_all = grads[kInput];
    dx[d] = d == 0 || dx_all.numel() == 0 ? dx_all : at::zeros_like(dx_all);
    args[d] = {
        .seq = rows.sequences(d == 1),
        .I = layer.I,
        .H = layer.H,
        .cell = layer.cell,
        .reverse = d == 1,
        .split = plan.split,
        .x = layer.tokens ? nullptr : data<scalar>(call.input),
        .ldx = layer.I,
        .ids = layer.tokens ? call.input.const_data_ptr<int64_t>() : nullptr,
        .W_ih = data<scalar>(w.W_ih),
        .W_hh = data<scalar>(w.W_hh),
        .h0 = data_or_null<scalar>(call.hx, d * state),
        .c0 = data_or_null<scalar>(call.cx, d * state),
        .y = data<scalar>(y) + d * layer.H,
        .ldy = y.stride(-2),
        .saved =
            sizes.saved > 0 ? data<scalar>(*saved) + d * layer.N * sizes.saved * layer.H : nullptr,
        .dy = data_or_null<scalar>(given.dy, d * layer.H),
        .lddy = columns,
        .dcells = data_or_null<scalar>(given.dcells, d * layer.H),
        .lddcells = columns,
        .dh_n = data_or_null<scalar>(given.dh_n, d * state),
        .dc_n = data_or_null<scalar>(given.dc_n, d * state),
        .dx = out<scalar>(dx[d], 0),
        .dh0 = out<scalar>(grads[kHx], d * state),
        .dc0 = out<scalar>(grads[kCx], d * state),
        .dW_ih = out<scalar>(dw[0], 0),
        .dW_hh = out<scalar>(dw[1], 0),
        .db_ih = call.has_biases ? out<scalar>(dw[2], 0) : nullptr,
        .db_hh = call.has_biases ? out<scalar>(dw[3], 0) : nullptr,
        .workspace = nullptr,
    };
    bytes = std::max(bytes, whole_pages(table.backward_workspace(args[d], plan.members)));
  }
  const Scratch scratch(layer.D * bytes);
  for (int64_t d = 0; d < layer.D; ++d) args[d].workspace = scratch.data() + d * bytes;
  const auto backward = table.backward;
  run_teams(layer.D, plan, [&](int64_t d, const Team& team) { backward(args[d], team); });
  if (layer.D == 2 && grads[kInput].numel() > 0) grads[kInput].add_(dx[1]);
}

// Whether forward on this ISA has kept what backward needs, or kept it at all.
bool fits(const Optional& saved, const Layer& layer, at::ScalarType computed) {
  const int64_t numbers = sizes_of(layer.cell).saved;
  return numbers == 0 ||
         (saved.has_value() && saved->scalar_type() == computed && saved->is_contiguous() &&
          saved->sizes() == at::IntArrayRef({layer.D, layer.N, numbers * layer.H}));
}

std::vector<at::Tensor> backward_cpu(const Grads& given_grads, const Call& given,
                                     const at::Tensor& given_y, const Optional& given_saved,
                                     const c10::List<bool>& needs) {
  const SurvivesFork guard;
  const Layer layer = check_layer_backward(given_grads, given, given_y, given_saved, needs);
  if (why_composite(given) != nullptr) {
    return composite::backward(given_grads, given, given_y, given_saved, needs);
  }
  const Isa& current = isa();
  const auto dtype = given.weights[0].scalar_type(), computed = computed_by(current, dtype);
  const Operands operands(given, computed);
  const Call& call = operands.call;
  const at::Tensor y = with_regular_rows(given_y.to(computed));
  const Optional dy = plain(given_grads.dy, computed), dh_n = plain(given_grads.dh_n, computed);
  const Optional dc_n = plain(given_grads.dc_n, computed);
  const Optional dcells = plain(given_grads.dcells, computed);
  if (layer.tokens) check_token_ids(call.input, layer.I);

  const bool nothing = layer.N == 0 || layer.H == 0;
  const auto grad = [&](bool wanted, at::IntArrayRef sizes, bool zeros) {
    if (!wanted) return at::Tensor();
    return zeros || nothing ? at::zeros(sizes, computed) : empty(sizes, computed);
  };
  // Rows that no sequence writes: past the ends, and states that a reset makes unused.
  const bool gaps = call.lengths.has_value(), unused = call.resets.has_value();
  const std::array<int64_t, 3> state = {layer.D, layer.B, layer.H};
  std::vector<at::Tensor> grads;
  grads.reserve(needs.size());
  grads.push_back(grad(needs[kInput], call.input.sizes(), gaps));
  grads.push_back(grad(needs[kHx], state, unused));
  grads.push_back(grad(needs[kCx], state, unused));
  for (size_t i = 0; i < call.weights.size(); ++i) {
    grads.push_back(grad(needs[kFirstWeight + i], call.weights[i].sizes(), false));
  }
  if (!nothing) {
    count(counters().backward_fused);
    const Rows rows(layer, call.batch_sizes, call.lengths, call.resets);
    Optional saved = given_saved;
    if (!fits(saved, layer, computed)) {
      expect_unchanged_operands();
      Call again = call;
      again.keep = true;
      saved = std::get<4>(forward_by_kernels(current, layer, again));
    }
    with_kernels(current, computed, [&](const auto& kernels) {
      backward_layer(kernels, layer, rows, {dy, dh_n, dc_n, dcells}, call, y, saved, grads);
    });
  }
  if (computed == dtype) return listed(std::move(grads));
  for (at::Tensor& each : grads) {
    if (each.defined()) each = each.to(dtype);
  }
  return listed(std::move(grads));
}

}  // namespace

TORCH_LIBRARY_IMPL(charrnn_fast, CPU, m) {
  m.impl("rnn_layer", TORCH_FN(LayerImpl<forward_cpu>::call));
  m.impl("rnn_layer_backward", TORCH_FN(LayerBackwardImpl<backward_cpu>::call));
}

}  // namespace charrnn_fast
