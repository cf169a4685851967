// The op `generate`: characters drawn one after the other in one call.
#include "generate.h"

#include <ATen/Parallel.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <thread>

#include "teams.h"

namespace charrnn_fast {
namespace {

using at::Tensor;

// Lets Ctrl-C end a long call. The kernels ask on every thread; Python is asked by the one that
// called, as only the main thread handles signals.
class Interruption {
 public:
  static bool asked(void* self) { return static_cast<Interruption*>(self)->check(); }
  void rethrow() const {
    if (error_ != nullptr) std::rethrow_exception(error_);
  }

 private:
  bool check() {
    if (std::this_thread::get_id() == caller_ && !stopped_.load(std::memory_order_relaxed)) {
      pybind11::gil_scoped_acquire gil;
      if (PyErr_CheckSignals() != 0) {
        error_ = std::make_exception_ptr(pybind11::error_already_set());
        stopped_.store(true, std::memory_order_relaxed);
      }
    }
    return stopped_.load(std::memory_order_relaxed);
  }

  const std::thread::id caller_ = std::this_thread::get_id();
  std::atomic<bool> stopped_{false};
  std::exception_ptr error_;
};

template <typename scalar>
void check_values(const Tensor& tokens, const Tensor& uniforms, const GenerateSizes& sizes) {
  const int64_t* token = tokens.const_data_ptr<int64_t>();
  for (int64_t s = 0; s < sizes.S; ++s) {
    TORCH_CHECK_INDEX(token[s] >= 0 && token[s] < sizes.V, "generate: token id ", token[s],
                      " is out of range: the vocabulary has ", sizes.V, " (stream ", s, ")");
  }
  const scalar* u = uniforms.const_data_ptr<scalar>();
  const auto good = [](scalar value) { return value >= 0 && value < 1; };  // false for a NaN
  bool bad = false;  // one pass that vectorises; the place is looked for when there is one
  for (int64_t i = 0; i < sizes.N * sizes.S; ++i) bad |= !good(u[i]);
  if (!bad) return;
  const int64_t place = std::find_if_not(u, u + sizes.N * sizes.S, good) - u;
  TORCH_CHECK_VALUE(false, "generate: uniforms must lie in [0, 1), got ", u[place], " at [",
                    place / sizes.S, ", ", place % sizes.S, "]");
}

template <typename scalar>
const Kernels<scalar>& kernels() {
  if constexpr (std::is_same_v<scalar, float>) {
    return *isa().f32;
  } else {
    return *isa().f64;
  }
}

template <typename scalar>
void generate(const GenerateSizes& sizes, const GenerateCall& call, Tensor& drawn, Tensor& state,
              Tensor& cell_state) {
  check_values<scalar>(call.tokens, call.uniforms, sizes);
  const size_t per_layer = weights_per_direction(call.has_biases);
  std::array<std::vector<const scalar*>, 4> weights;  // of each kind, by layer
  for (size_t i = 0; i < call.params.size(); ++i) {
    weights[i % per_layer].push_back(call.params[i].const_data_ptr<scalar>());
  }
  Interruption interruption;
  const Kernels<scalar>& table = kernels<scalar>();
  const auto run = [&](int64_t first, int64_t last) {
    GenerateArgs<scalar> args = {
        .N = sizes.N,
        .S = last - first,
        .V = sizes.V,
        .H = sizes.H,
        .layers = sizes.layers,
        .ld = sizes.S,
        .cell = sizes.cell,
        .W_ih = weights[0].data(),
        .W_hh = weights[1].data(),
        .b_ih = call.has_biases ? weights[2].data() : nullptr,
        .b_hh = call.has_biases ? weights[3].data() : nullptr,
        .W_out = call.head_weight.const_data_ptr<scalar>(),
        .b_out = call.head_bias.has_value() ? call.head_bias->const_data_ptr<scalar>() : nullptr,
        .temperature = call.temperature,
        .top_k = call.top_k,
        .top_p = call.top_p,
        .uniforms = call.uniforms.const_data_ptr<scalar>() + first,
        .tokens = call.tokens.const_data_ptr<int64_t>() + first,
        .state = state.mutable_data_ptr<scalar>() + first * sizes.H,
        .cell_state = sizes_of(sizes.cell).has_state
                          ? cell_state.mutable_data_ptr<scalar>() + first * sizes.H
                          : nullptr,
        .drawn = drawn.mutable_data_ptr<int64_t>() + first,
        .stop = Interruption::asked,
        .stop_state = &interruption,
        .workspace = nullptr,
    };
    const Tensor workspace =
        at::empty({static_cast<int64_t>(table.generate_workspace(args))}, at::kByte);
    args.workspace = workspace.mutable_data_ptr();
    table.generate(args);
  };
  // Streams are independent, and draw the same whoever draws beside them. A thread is worth waking
  // for some tens of microseconds.
  const int64_t recurrence = sizes_of(sizes.cell).gates * (2 * sizes.layers - 1) * sizes.H;
  const int64_t products = sizes.N * sizes.H * (recurrence + sizes.V);
  const int64_t grain = std::max<int64_t>(4, (int64_t{1} << 21) / std::max<int64_t>(products, 1));
  at::parallel_for(0, sizes.S, grain, run);
  interruption.rethrow();
}

Generated generate_cpu(const GenerateCall& given) {
  const at::NoGradGuard no_grad;  // what is drawn has no gradient
  const SurvivesFork guard;
  const GenerateSizes sizes = check_generate(given);
  const auto dtype = given.params[0].scalar_type();
  TORCH_CHECK_NOT_IMPLEMENTED(dtype == at::kFloat || dtype == at::kDouble,
                              "generate: weights must be float32 or float64, got ", dtype);
  const Tensor tokens = given.tokens.contiguous(), head_weight = given.head_weight.contiguous();
  const Tensor uniforms = given.uniforms.to(dtype).contiguous();
  const Optional head_bias =
      given.head_bias.has_value() ? Optional(given.head_bias->contiguous()) : std::nullopt;
  std::vector<Tensor> params;
  for (const Tensor& param : given.params) params.push_back(param.contiguous());
  const auto own = [&](const Optional& state) {
    return state.has_value() ? state->clone(at::MemoryFormat::Contiguous)
                             : at::zeros({sizes.layers, sizes.S, sizes.H}, params[0].options());
  };
  Tensor state = own(given.state);
  Tensor cell_state =
      sizes_of(sizes.cell).has_state ? own(given.cell_state) : at::empty({0}, params[0].options());
  Tensor drawn = at::empty({sizes.N, sizes.S}, tokens.options());
  const GenerateCall call{tokens,           given.state,       given.cell_state, params,
                          head_weight,      head_bias,         uniforms,         given.mode,
                          given.has_biases, given.temperature, given.top_k,      given.top_p};
  const auto run = dtype == at::kFloat ? generate<float> : generate<double>;
  run(sizes, call, drawn, state, cell_state);
  return {drawn, state, cell_state};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(charrnn_fast, m) {
  m.def(
      "generate(Tensor tokens, Tensor? state, Tensor? cell_state, Tensor[] params, "
      "Tensor head_weight, Tensor? head_bias, Tensor uniforms, str mode, bool has_biases, "
      "float temperature=1.0, int top_k=0, float top_p=1.0) "
      "-> (Tensor drawn, Tensor state, Tensor cell_state)",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(charrnn_fast, CPU, m) {
  m.impl("generate", TORCH_FN(generate_impl<generate_cpu>));
}

TORCH_LIBRARY_IMPL(charrnn_fast, Autograd, m) {
  m.impl("generate", torch::CppFunction::makeFallthrough());
}

}  // namespace charrnn_fast
