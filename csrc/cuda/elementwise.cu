// Kernels that visit each element once: the steps of kStep, the gather of token rows and its
// gradient.
#include "elements.cuh"

namespace charrnn_fast::cuda {
namespace {

constexpr int kColumns = 32;

__device__ bool runs(const StepArgs& args, int64_t t, int64_t b) {
  return t >= 0 && t < args.T && t < length_of(args.lengths, b, args.T);
}

__global__ void __launch_bounds__(kThreads) step_forward(const StepArgs args) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= args.rows * args.H) return;
  const int64_t b = i / args.H, j = i % args.H, at = b * args.ld + j;
  float h = 0.0f;
  if (runs(args, args.t, b)) {
    h = activate(args.cell, load(args.y, at, args.dtype));
    store(args.state, i, args.dtype, h);
  }
  store(args.y, at, args.dtype, h);
}

__global__ void __launch_bounds__(kThreads) step_backward(const StepArgs args) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= args.B * args.H) return;
  const int64_t b = i / args.H, j = i % args.H, at = b * args.ld + j;
  const bool ran = runs(args, args.before, b);
  const bool runs_now = runs(args, args.t, b);
  float delta = 0.0f;
  if (runs_now) {
    float g = 0.0f;
    if (ran) {
      g = load(args.product, i, args.dtype);
    } else if (args.initial != nullptr) {
      g = load(args.initial, i, args.dtype);
    }
    if (args.in != nullptr) g += load(args.in, at, args.dtype);
    delta = activate_backward(args.cell, g, load(args.y, at, args.dtype));
  } else if (ran && args.final != nullptr) {
    store(args.final, i, args.dtype, load(args.product, i, args.dtype));
  }
  if (args.delta == nullptr) return;  // after the last step
  if (b < args.rows) store(args.delta, at, args.dtype, delta);
  store(args.delta_rows, i, args.dtype, delta);
}

__global__ void __launch_bounds__(kThreads) gather(const GatherArgs args) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= args.N * args.H) return;
  const int64_t n = i / args.H, j = i % args.H, id = args.ids[n];
  const bool inside = id >= 0 && id < args.I;
  store(args.out, n * args.ld + j, args.dtype,
        inside ? load(args.table, id * args.H + j, args.dtype) : nanf(""));
}

// Block (columns, id): 8 rows of 32 threads add up every eighth row of delta, then each other's
// sums.
__global__ void __launch_bounds__(kThreads) segment_sum(const SegmentSumArgs args) {
  constexpr int kWays = kThreads / kColumns;
  float* partial = reinterpret_cast<float*>(dynamic_shared());  // [kWays][kColumns]
  const int column = threadIdx.x % kColumns, way = threadIdx.x / kColumns;
  const int64_t j = static_cast<int64_t>(blockIdx.y) * kColumns + column;
  const int64_t id = blockIdx.x;
  float sum = 0.0f;
  if (j < args.H) {
    for (int64_t i = args.starts[id] + way; i < args.starts[id + 1]; i += kWays) {
      sum += load(args.delta, args.order[i] * args.ld + j, args.dtype);
    }
  }
  partial[threadIdx.x] = sum;
  block_barrier();
  if (way > 0 || j >= args.H) return;
  for (int other = 1; other < kWays; ++other) sum += partial[other * kColumns + column];
  store(args.sum, id * args.H + j, args.dtype, sum);
}

unsigned blocks_for(int64_t elements) {
  return static_cast<unsigned>((elements + kThreads - 1) / kThreads);
}

}  // namespace
}  // namespace charrnn_fast::cuda

using namespace charrnn_fast::cuda;

extern "C" {

const char* charrnn_fast_cuda_step_forward(const StepArgs* args, void* stream) {
  return launch(step_forward, dim3(blocks_for(args->rows * args->H)), kThreads, 0, false, stream,
                *args);
}

const char* charrnn_fast_cuda_step_backward(const StepArgs* args, void* stream) {
  return launch(step_backward, dim3(blocks_for(args->B * args->H)), kThreads, 0, false, stream,
                *args);
}

const char* charrnn_fast_cuda_gather(const GatherArgs* args, void* stream) {
  return launch(gather, dim3(blocks_for(args->N * args->H)), kThreads, 0, false, stream, *args);
}

const char* charrnn_fast_cuda_segment_sum(const SegmentSumArgs* args, void* stream) {
  const dim3 grid(static_cast<unsigned>(args->I),
                  static_cast<unsigned>((args->H + kColumns - 1) / kColumns));
  return launch(segment_sum, grid, kThreads, kThreads * static_cast<int>(sizeof(float)), false,
                stream, *args);
}

}  // extern "C"
