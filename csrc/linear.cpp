// The ops `linear` and `linear_backward`: F.linear, with the same bits for any number of threads.
#include <torch/library.h>

#include <algorithm>

#include "allocation.h"
#include "layer.h"
#include "teams.h"

namespace charrnn_fast {

using at::Tensor;

bool linear_is_served(const Tensor& input, const Tensor& weight, const Tensor& bias) {
  const auto dtype = weight.scalar_type();
  const auto plain = [&](const Tensor& tensor) {
    return tensor.device().is_cpu() && tensor.layout() == at::kStrided &&
           !tensor.unsafeGetTensorImpl()->has_symbolic_sizes_strides() &&
           tensor.scalar_type() == dtype && tensor.numel() > 0;
  };
  return (dtype == at::kFloat || dtype == at::kDouble) && plain(input) && plain(weight) &&
         plain(bias) && input.dim() >= 2 && weight.dim() == 2 && bias.dim() == 1 &&
         input.size(-1) == weight.size(1) && bias.size(0) == weight.size(0);
}

namespace composite {

Tensor linear(const Tensor& input, const Tensor& weight, const Tensor& bias) {
  return at::linear(input, weight, bias);
}

std::vector<Tensor> linear_backward(const Tensor& dy, const Tensor& input, const Tensor& weight) {
  const Tensor delta = dy.flatten(0, -2), x = input.flatten(0, -2);
  return {at::matmul(dy, weight), at::mm(delta.t(), x), delta.sum(0)};
}

}  // namespace composite

namespace {

template <typename scalar>
void run_linear(const Kernels<scalar>& kernels, const Tensor& x, const Tensor& W, const Tensor& b,
                Tensor& y) {
  LinearArgs<scalar> args = {
      .N = x.numel() / W.size(1),
      .I = W.size(1),
      .H = W.size(0),
      .x = x.const_data_ptr<scalar>(),
      .W = W.const_data_ptr<scalar>(),
      .b = b.const_data_ptr<scalar>(),
      .y = y.mutable_data_ptr<scalar>(),
      .workspace = nullptr,
  };
  const Scratch scratch(kernels.linear_workspace(args));
  args.workspace = scratch.data();
  const int threads = threads_for(static_cast<double>(args.N) * args.I * args.H);
  const Plan plan = {static_cast<int>(std::min<int64_t>(threads, args.N)), Split::kBatch, false};
  run_teams(1, plan, [&](int64_t, const Team& team) { kernels.linear(args, team); });
}

Tensor linear_cpu(const Tensor& input, const Tensor& weight, const Tensor& bias) {
  const SurvivesFork guard;
  if (!linear_is_served(input, weight, bias)) return composite::linear(input, weight, bias);
  const Tensor x = input.contiguous(), W = weight.contiguous(), b = bias.contiguous();
  c10::SmallVector<int64_t, 4> shape(input.sizes());
  shape.back() = W.size(0);
  Tensor y = empty(shape, W.scalar_type());
  const Isa& current = isa();
  if (W.scalar_type() == at::kFloat) {
    run_linear(*current.f32, x, W, b, y);
  } else {
    run_linear(*current.f64, x, W, b, y);
  }
  return y;
}

// That of the first step of a relu layer whose output is positive: of W_hh and the biases, which
// such a step does not read, the memory is never touched.
std::vector<Tensor> linear_backward_cpu(const Tensor& dy, const Tensor& input,
                                        const Tensor& weight) {
  const SurvivesFork guard;
  const int64_t V = weight.size(0), H = weight.size(1);
  const auto dtype = weight.scalar_type();
  const Tensor W_hh = empty({V, V}, dtype), b = empty({V}, dtype);
  const Optional delta = dy.reshape({1, -1, V});
  const Tensor x = input.reshape({1, -1, H});
  const std::vector<Tensor> weights = {weight, W_hh, b, b};
  const Tensor y = at::ones({V}, weight.options()).expand_as(*delta);
  const c10::List<bool> needs({true, false, false, true, false, true, false});  // x, W_ih, b_ih
  auto grads = call_layer_backward(
      {delta, kNone, kNone, kNone},
      {x, kNone, kNone, weights, kNone, kNone, kNone, "RNN_RELU", true}, y, kNone, needs);
  grads[0] = grads[0].view(input.sizes());
  return grads;
}

}  // namespace

TORCH_LIBRARY_IMPL(charrnn_fast, CPU, m) {
  m.impl("linear", TORCH_FN(linear_cpu));
  m.impl("linear_backward", TORCH_FN(linear_backward_cpu));
}

// Every other device, and transforms.
TORCH_LIBRARY_IMPL(charrnn_fast, CompositeExplicitAutograd, m) {
  m.impl("linear", TORCH_FN(composite::linear));
  m.impl("linear_backward", TORCH_FN(composite::linear_backward));
}

TORCH_LIBRARY_IMPL(charrnn_fast, FuncTorchBatched, m) {
  m.impl("linear", TORCH_FN(composite::linear));
  m.impl("linear_backward", TORCH_FN(composite::linear_backward));
}

TORCH_LIBRARY_IMPL(charrnn_fast, Batched, m) {
  m.impl("linear", TORCH_FN(composite::linear));
  m.impl("linear_backward", TORCH_FN(composite::linear_backward));
}

TORCH_LIBRARY_IMPL(charrnn_fast, AutocastCPU, m) { m.impl("linear", TORCH_FN(composite::linear)); }

TORCH_LIBRARY_IMPL(charrnn_fast, AutocastCUDA, m) { m.impl("linear", TORCH_FN(composite::linear)); }

}  // namespace charrnn_fast
