// The CUDA host logic and kernels as the ops' implementation for CPU tensors, on an emulated
// device. Loaded into a process of its own after charrnn_fast: it takes the place of the CPU
// kernels.
#include <torch/library.h>

#include <cstdlib>
#include <string>

#include "../../csrc/cuda/compat.cuh"
#include "../../csrc/cuda/layer_cuda.h"

namespace charrnn_fast::cuda {

// CHARRNN_FAST_DESIGN=block, grid or step is run wherever it can be. Few multiprocessors, so that
// small tests meet several sequences a block.
LaunchPlan plan_layer(const Layer& layer, Dtype dtype, const at::Device&) {
  const DeviceLimits limits = {4, 90, 232448, 65536, true};
  const char* wanted = std::getenv("CHARRNN_FAST_DESIGN");
  const std::string name = wanted != nullptr ? wanted : "block";
  const Design design = name == "grid"   ? Design::kGrid
                        : name == "step" ? Design::kStep
                                         : Design::kBlock;
  const LaunchPlan plan = plan_design(design, layer.H, layer.B, layer.D, dtype, limits);
  TORCH_CHECK(plan.reason != nullptr, "the emulated device has no plan of this design");
  return plan;
}

void* current_stream(const at::Device&) { return nullptr; }

namespace {
int64_t generations = 0;
Generated counted_generate(const GenerateCall& call) {
  const Generated drawn = generate(call);
  ++generations;
  return drawn;
}
}  // namespace

TORCH_LIBRARY_IMPL(charrnn_fast, CPU, m) {
  m.impl("rnn_layer", TORCH_FN(LayerImpl<layer>::call));
  m.impl("rnn_layer_backward", TORCH_FN(LayerBackwardImpl<layer_backward>::call));
  m.impl("generate", TORCH_FN(generate_impl<counted_generate>));
}

}  // namespace charrnn_fast::cuda

// Layers that ran by these kernels, forward and backward.
extern "C" __attribute__((visibility("default"))) int64_t emulated_layers(int backward) {
  const auto& counters = charrnn_fast::counters();
  return backward != 0 ? counters.backward_fused : counters.forward_fused;
}

// Calls of the op `generate` that ran by its kernel.
extern "C" __attribute__((visibility("default"))) int64_t emulated_generations() {
  return charrnn_fast::cuda::generations;
}
