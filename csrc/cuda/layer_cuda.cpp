// The host side of a layer on CUDA: matrix products by at::, the recurrence by our kernels. Nothing
// here waits for the device, and without lengths or packed rows nothing is copied to it: a call can
// be captured into a CUDA graph.
#include "layer_cuda.h"

#include <ATen/TensorSubclassLikeUtils.h>

#include <algorithm>
#include <vector>

#include "../operands.h"

namespace charrnn_fast::cuda {
namespace {

using at::Tensor;

void check(const char* error) {
  TORCH_CHECK(error == nullptr, "charrnn_fast CUDA kernel: ", error);
}

Dtype dtype_of(const Tensor& tensor) {
  return tensor.scalar_type() == at::kFloat  ? Dtype::kFloat32
         : tensor.scalar_type() == at::kHalf ? Dtype::kFloat16
                                             : Dtype::kBFloat16;
}

// The rows of a layer, on the host and on the device.
struct DeviceRows {
  std::vector<int64_t> running;   // of packed rows: sequences at each step
  std::vector<int64_t> step_row;  // of packed rows: the first row of each step
  std::vector<int64_t> lengths;   // empty: all T
  Tensor device_step_row, device_lengths;

  DeviceRows(const Layer& layer, const Optional& batch_sizes, const Optional& given,
             const at::Device& device) {
    if (batch_sizes.has_value()) {
      const Tensor sizes = batch_sizes->contiguous();
      const int64_t* size = sizes.const_data_ptr<int64_t>();
      running.assign(size, size + layer.T);
      lengths.assign(layer.B, 0);
      int64_t row = 0;
      for (int64_t t = 0; t < layer.T; ++t) {
        step_row.push_back(row);
        row += running[t];
        for (int64_t b = 0; b < running[t]; ++b) lengths[b] = t + 1;
      }
      device_step_row = at::tensor(step_row, at::kLong).to(device);
    } else if (given.has_value()) {
      const Tensor values = given->contiguous();
      lengths.assign(values.const_data_ptr<int64_t>(), values.const_data_ptr<int64_t>() + layer.B);
    }
    if (!lengths.empty()) device_lengths = at::tensor(lengths, at::kLong).to(device);
  }

  int64_t first(const Layer& layer, int64_t t) const {
    return step_row.empty() ? t * layer.B : step_row[t];
  }
  int64_t count(const Layer& layer, int64_t t) const {
    return running.empty() ? layer.B : running[t];
  }
  const int64_t* lengths_or_null() const {
    return device_lengths.defined() ? device_lengths.const_data_ptr<int64_t>() : nullptr;
  }
};

// A contiguous tensor's columns of one direction, as [N, H].
Tensor columns(const Tensor& tensor, const Layer& layer, int64_t d) {
  return tensor.view({layer.N, layer.D * layer.H}).narrow(1, d * layer.H, layer.H);
}

const void* data_or_null(const Optional& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr() : nullptr;
}

// y = x W_ih' + b_ih + b_hh for all rows.
void project(const Layer& layer, const Call& call, Tensor& y) {
  const Tensor& input = call.input;
  for (int64_t d = 0; d < layer.D; ++d) {
    const Weights w = weights_of(call, d);
    Tensor out = columns(y, layer, d);
    if (layer.tokens) {
      Tensor table = w.W_ih.t();
      if (call.has_biases) table = table + (w.b_ih + w.b_hh);
      table = table.contiguous();
      const GatherArgs args{layer.N,
                            layer.I,
                            layer.H,
                            dtype_of(y),
                            input.const_data_ptr<int64_t>(),
                            table.const_data_ptr(),
                            out.mutable_data_ptr(),
                            out.stride(0)};
      check(charrnn_fast_cuda_gather(&args, current_stream(y.device())));
    } else if (call.has_biases) {
      at::addmm_out(out, w.b_ih + w.b_hh, input.view({layer.N, layer.I}), w.W_ih.t());
    } else {
      at::mm_out(out, input.view({layer.N, layer.I}), w.W_ih.t());
    }
  }
}

RecurrenceArgs recurrence_args(const Layer& layer, const DeviceRows& rows, const Call& call,
                               const Tensor& y) {
  RecurrenceArgs args{};
  args.T = layer.T;
  args.B = layer.B;
  args.H = layer.H;
  args.D = static_cast<int32_t>(layer.D);
  args.dtype = dtype_of(y);
  args.cell = layer.cell;
  args.step_row =
      rows.device_step_row.defined() ? rows.device_step_row.const_data_ptr<int64_t>() : nullptr;
  args.lengths = rows.lengths_or_null();
  for (int64_t d = 0; d < layer.D; ++d) {
    args.W_hh[d] = weights_of(call, d).W_hh.const_data_ptr();
  }
  return args;
}

Tensor workspace(const LaunchPlan& plan, const Layer& layer, const Tensor& y) {
  return at::zeros({static_cast<int64_t>(recurrence_workspace(plan, layer.B, layer.H, layer.D))},
                   y.options().dtype(at::kByte));
}

StepArgs step_args(const Layer& layer, const DeviceRows& rows, const Tensor& y) {
  StepArgs args{};
  args.before = -1;
  args.T = layer.T;
  args.B = layer.B;
  args.H = layer.H;
  args.dtype = dtype_of(y);
  args.cell = layer.cell;
  args.lengths = rows.lengths_or_null();
  args.ld = layer.D * layer.H;
  return args;
}

// kStep: y holds the projection, and h_n the state, which begins as h0.
void forward_steps(const Layer& layer, const DeviceRows& rows, const Call& call, Tensor& y,
                   Tensor& h_n) {
  const Optional& hx = call.hx;
  if (hx.has_value()) {
    h_n.copy_(*hx);
  } else {
    h_n.zero_();
  }
  for (int64_t d = 0; d < layer.D; ++d) {
    const Tensor W = weights_of(call, d).W_hh.t();
    Tensor all = columns(y, layer, d), state = h_n.select(0, d);
    StepArgs args = step_args(layer, rows, y);
    args.state = state.mutable_data_ptr();
    for (int64_t s = 0; s < layer.T; ++s) {
      args.t = d == 1 ? layer.T - 1 - s : s;
      args.rows = rows.count(layer, args.t);
      Tensor step = all.narrow(0, rows.first(layer, args.t), args.rows);
      if (s > 0 || hx.has_value()) step.addmm_(state.narrow(0, 0, args.rows), W);
      args.y = step.mutable_data_ptr();
      check(charrnn_fast_cuda_step_forward(&args, current_stream(y.device())));
    }
  }
}

void backward_steps(const Layer& layer, const DeviceRows& rows, const Grads& grads,
                    const Call& call, const Tensor& y, Tensor& delta, Tensor& dh0) {
  const Optional &dy = grads.dy, &dh_n = grads.dh_n;
  const Tensor flat_y = y.view({layer.N, layer.D * layer.H});
  Tensor product = at::empty({layer.B, layer.H}, y.options()), compact = at::empty_like(product);
  for (int64_t d = 0; d < layer.D; ++d) {
    const Tensor& W = weights_of(call, d).W_hh;
    StepArgs args = step_args(layer, rows, y);
    args.product = product.const_data_ptr();
    args.delta_rows = compact.mutable_data_ptr();
    args.initial = dh_n.has_value() ? dh_n->select(0, d).const_data_ptr() : nullptr;
    args.final = dh0.defined() ? dh0.select(0, d).mutable_data_ptr() : nullptr;
    Tensor y_d = columns(y, layer, d), delta_d = columns(delta, layer, d);
    const Tensor dy_d = dy.has_value() ? columns(*dy, layer, d) : Tensor();
    for (int64_t s = 0; s < layer.T; ++s) {
      args.t = d == 1 ? s : layer.T - 1 - s;
      args.rows = rows.count(layer, args.t);
      const int64_t first = rows.first(layer, args.t);
      const auto at_step = [&](const Tensor& tensor) {
        return tensor.narrow(0, first, args.rows).mutable_data_ptr();
      };
      args.y = at_step(y_d);
      args.in = dy.has_value() ? at_step(dy_d) : nullptr;
      args.delta = at_step(delta_d);
      check(charrnn_fast_cuda_step_backward(&args, current_stream(y.device())));
      args.before = args.t;
      if (s + 1 < layer.T || dh0.defined()) at::mm_out(product, compact, W);
    }
    if (!dh0.defined()) continue;
    args.t = -1;
    args.rows = 0;
    args.delta = nullptr;
    check(charrnn_fast_cuda_step_backward(&args, current_stream(y.device())));
  }
}

// dW_ih of token rows: the sum of delta over the rows of each token.
Tensor token_gradient(const Layer& layer, const Tensor& ids, const Tensor& delta) {
  const auto [sorted, order] = at::sort(ids.view({layer.N}), /*stable=*/true, 0, false);
  const Tensor starts =
      at::searchsorted(sorted, at::arange(layer.I + 1, ids.options())).contiguous();
  Tensor sum = at::empty({layer.I, layer.H}, delta.options());
  const SegmentSumArgs args{layer.I,
                            layer.H,
                            dtype_of(delta),
                            order.const_data_ptr<int64_t>(),
                            starts.const_data_ptr<int64_t>(),
                            delta.const_data_ptr(),
                            delta.stride(0),
                            sum.mutable_data_ptr()};
  check(charrnn_fast_cuda_segment_sum(&args, current_stream(delta.device())));
  return sum.t().contiguous();
}

// dW_hh: delta' times the state before each row.
Tensor recurrent_gradient(const Layer& layer, const DeviceRows& rows, int64_t d,
                          const Tensor& delta, const Tensor& y, const Optional& hx) {
  const int64_t T = layer.T, B = layer.B;
  if (layer.packed) {
    // Row N + b of this stands for the initial state of sequence b.
    const Tensor h0 = hx.has_value() ? hx->select(0, d) : at::zeros({B, layer.H}, y.options());
    std::vector<int64_t> before;
    for (int64_t t = 0; t < T; ++t) {
      const int64_t other = d == 1 ? t + 1 : t - 1;
      const int64_t continuing = other < 0 || other >= T ? 0 : rows.running[other];
      for (int64_t b = 0; b < rows.running[t]; ++b) {
        before.push_back(b < continuing ? rows.step_row[other] + b : layer.N + b);
      }
    }
    const Tensor index = at::tensor(before, at::kLong).to(y.device());
    return at::mm(delta.t(), at::cat({y, h0}).index_select(0, index));
  }
  Tensor dW = T > 1 ? at::mm(delta.narrow(0, d == 1 ? 0 : B, (T - 1) * B).t(),
                             y.narrow(0, d == 1 ? B : 0, (T - 1) * B))
                    : at::zeros({layer.H, layer.H}, y.options());
  if (!hx.has_value()) return dW;
  // Each sequence's first step saw the initial state; past a sequence's end y is zero.
  Tensor first = delta.narrow(0, d == 1 ? (T - 1) * B : 0, B);
  if (d == 1 && !rows.lengths.empty()) {
    first = delta.index_select(
        0, (rows.device_lengths - 1) * B + at::arange(B, rows.device_lengths.options()));
  }
  dW.addmm_(first.t(), hx->select(0, d));
  return dW;
}

}  // namespace

const char* why_composite(const Call& call) {
  if (sizes_of(parse_mode(call.mode)).gates > 1) return "this cell has no kernel on CUDA";
  if (call.resets.has_value()) return "resets have no kernel on CUDA";
  const auto dtype = call.weights[0].scalar_type();
  if (dtype != at::kFloat && dtype != at::kHalf && dtype != at::kBFloat16) {
    return "the dtype is none of float32, float16, bfloat16";
  }
  if (call.weights[0].layout() != at::kStrided || call.input.layout() != at::kStrided) {
    return "the layout is not strided";
  }
  if (at::isTensorSubclassLike(call.input) ||
      (call.hx.has_value() && at::isTensorSubclassLike(*call.hx)) ||
      std::any_of(call.weights.begin(), call.weights.end(),
                  [](const Tensor& weight) { return at::isTensorSubclassLike(weight); })) {
    return "a tensor is a subclass or is traced by a transform";
  }
  return nullptr;
}

LayerResult layer(const Call& given) {
  const Layer layer = check_layer(given);
  if (cuda::why_composite(given) != nullptr) return composite::forward(given);
  const Operands operands(given, given.weights[0].scalar_type());
  const Call& call = operands.call;

  const at::TensorOptions options = call.weights[0].options();
  Tensor y = layer.packed ? at::empty({layer.N, layer.D * layer.H}, options)
                          : at::empty({layer.T, layer.B, layer.D * layer.H}, options);
  Tensor h_n = at::empty({layer.D, layer.B, layer.H}, options);
  const LayerResult result{y, h_n, Tensor(), Tensor(), Tensor()};
  if (layer.N == 0 || layer.H == 0) return result;

  const LaunchPlan plan = plan_layer(layer, dtype_of(y), y.device());
  const DeviceRows rows(layer, call.batch_sizes, call.lengths, y.device());
  project(layer, call, y);
  if (plan.design == Design::kStep) {
    forward_steps(layer, rows, call, y, h_n);
  } else {
    const Tensor space = workspace(plan, layer, y);
    RecurrenceArgs args = recurrence_args(layer, rows, call, y);
    args.in = y.const_data_ptr();
    args.out = y.mutable_data_ptr();
    args.initial = data_or_null(call.hx);
    args.final = h_n.mutable_data_ptr();
    args.workspace = space.mutable_data_ptr();
    check(charrnn_fast_cuda_forward(&plan, &args, current_stream(y.device())));
  }
  count(counters().forward_fused);
  return result;
}

std::vector<Tensor> layer_backward(const Grads& given_grads, const Call& given,
                                   const Tensor& given_y, const Optional& saved,
                                   const c10::List<bool>& needs) {
  const Layer layer = check_layer_backward(given_grads, given, given_y, saved, needs);
  if (cuda::why_composite(given) != nullptr) {
    return composite::backward(given_grads, given, given_y, saved, needs);
  }
  const Operands operands(given, given.weights[0].scalar_type());
  const Call& call = operands.call;
  const Tensor y = given_y.contiguous();
  const Optional dy = plain(given_grads.dy, y.scalar_type()),
                 dh_n = plain(given_grads.dh_n, y.scalar_type());

  std::vector<Tensor> grads(needs.size());
  const bool nothing = layer.N == 0 || layer.H == 0;
  const auto finish = [&] {
    for (size_t i = 0; i < grads.size(); ++i) {
      if (grads[i].defined()) continue;
      if (!nothing || !needs[i]) continue;
      grads[i] = i == kInput ? at::zeros(call.input.sizes(), y.options())
                 : i == kHx  ? at::zeros({layer.D, layer.B, layer.H}, y.options())
                             : at::zeros_like(call.weights[i - kFirstWeight]);
    }
    return listed(std::move(grads));
  };
  if (nothing) return finish();

  const LaunchPlan plan = plan_layer(layer, dtype_of(y), y.device());
  const DeviceRows rows(layer, call.batch_sizes, call.lengths, y.device());
  Tensor delta = at::empty({layer.N, layer.D * layer.H}, y.options());
  Tensor dh0 = needs[kHx] ? at::empty({layer.D, layer.B, layer.H}, y.options()) : Tensor();
  if (plan.design == Design::kStep) {
    backward_steps(layer, rows, {dy, dh_n, kNone, kNone}, call, y, delta, dh0);
  } else {
    const Tensor space = workspace(plan, layer, y);
    RecurrenceArgs args = recurrence_args(layer, rows, call, y);
    args.in = data_or_null(dy);
    args.y = y.const_data_ptr();
    args.out = delta.mutable_data_ptr();
    args.initial = data_or_null(dh_n);
    args.final = dh0.defined() ? dh0.mutable_data_ptr() : nullptr;
    args.workspace = space.mutable_data_ptr();
    check(charrnn_fast_cuda_backward(&plan, &args, current_stream(y.device())));
  }
  grads[kHx] = dh0;

  for (int64_t d = 0; d < layer.D; ++d) {
    const Tensor delta_d = columns(delta, layer, d);
    const size_t first = first_weight(call.has_biases, d);
    const Tensor& W_ih = weights_of(call, d).W_ih;
    if (needs[kInput]) {
      if (d == 0) {
        grads[kInput] = at::mm(delta_d, W_ih);
      } else {
        grads[kInput].addmm_(delta_d, W_ih);
      }
    }
    if (needs[first]) {
      grads[first] = layer.tokens ? token_gradient(layer, call.input, delta_d)
                                  : at::mm(delta_d.t(), call.input.view({layer.N, layer.I}));
    }
    if (needs[first + 1]) {
      grads[first + 1] = recurrent_gradient(layer, rows, d, delta_d, columns(y, layer, d), call.hx);
    }
    if (call.has_biases && (needs[first + 2] || needs[first + 3])) {
      const Tensor db = delta_d.sum(0);
      if (needs[first + 2]) grads[first + 2] = db;
      // A tensor of its own: a later in-place change of one gradient must not reach the other.
      if (needs[first + 3]) grads[first + 3] = needs[first + 2] ? db.clone() : db;
    }
  }
  if (grads[kInput].defined()) grads[kInput] = grads[kInput].view(call.input.sizes());
  count(counters().backward_fused);
  return finish();
}

}  // namespace charrnn_fast::cuda
