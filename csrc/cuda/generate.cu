// Draws characters one after the other without leaving the device: a block for each stream.
#include "elements.cuh"

namespace charrnn_fast::cuda {
namespace {

constexpr int kWarps = kThreads / 32;

template <typename T>
__device__ T sum_over_warp(T value) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}

// The dot product of row j of a matrix [.., H] with a state in shared memory; every lane gets it.
__device__ float dot(const void* W, int64_t j, const float* state, int64_t H, Dtype dtype,
                     int lane) {
  float sum = 0.0f;
  for (int64_t k = lane; k < H; k += 32) sum += load(W, j * H + k, dtype) * state[k];
  return sum_over_warp(sum);
}

// Of all values the greatest, and the first place where it is. A NaN is greater than everything.
struct Best {
  float value;
  int at;
};
__device__ bool before(const Best& a, const Best& b) {
  const bool a_nan = a.value != a.value, b_nan = b.value != b.value;
  if (a_nan != b_nan) return a_nan;
  if (!a_nan && a.value != b.value) return a.value > b.value;
  return a.at < b.at;
}
__device__ Best best_of_warp(Best best) {
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) {
    const Best other = {shuffle_xor(best.value, mask), shuffle_xor(best.at, mask)};
    if (before(other, best)) best = other;
  }
  return best;
}

// Shared memory: states [layers][2][H], logits [V], a Best and a character for all threads.
__global__ void __launch_bounds__(kThreads) generate(const __grid_constant__ GenerateArgs args) {
  float* states = reinterpret_cast<float*>(dynamic_shared());
  float* logits = states + args.layers * 2 * args.H;
  Best* bests = reinterpret_cast<Best*>(logits + args.V);
  int* character = reinterpret_cast<int*>(bests + kWarps);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t s = blockIdx.x, H = args.H;

  for (int64_t i = threadIdx.x; i < args.layers * H; i += kThreads) {
    states[(i / H * 2) * H + i % H] = args.state[(i / H * args.S + s) * H + i % H];
  }
  if (threadIdx.x == 0) *character = static_cast<int>(args.first[s]);
  block_barrier();
  for (int64_t i = 0; i < args.n; ++i) {
    const int id = *character;
    for (int layer = 0; layer < args.layers; ++layer) {
      const float* from = states + (layer * 2 + i % 2) * H;
      const float* below = states + ((layer - 1) * 2 + (i + 1) % 2) * H;
      float* to = states + (layer * 2 + (i + 1) % 2) * H;
      for (int64_t j = warp; j < H; j += kWarps) {
        float sum = dot(args.W_hh[layer], j, from, H, args.dtype, lane);
        if (layer > 0) sum += dot(args.W_ih[layer], j, below, H, args.dtype, lane);
        if (lane != 0) continue;
        if (layer == 0) {
          sum += load(args.table, id * H + j, args.dtype);
        } else if (args.bias[layer] != nullptr) {
          sum += load(args.bias[layer], j, args.dtype);
        }
        to[j] = activate(args.activation, sum);
      }
      block_barrier();  // the layer above reads it
    }
    const float* top = states + ((args.layers - 1) * 2 + (i + 1) % 2) * H;
    for (int64_t v = warp; v < args.V; v += kWarps) {
      const float sum = dot(args.W_out, v, top, H, args.dtype, lane);
      if (lane == 0) {
        logits[v] = sum + (args.b_out != nullptr ? load(args.b_out, v, args.dtype) : 0.0f);
      }
    }
    block_barrier();
    Best best = {-INFINITY, 0x7fffffff};
    for (int v = threadIdx.x; v < args.V; v += kThreads) {
      const Best here = {logits[v], v};
      if (before(here, best)) best = here;
    }
    best = best_of_warp(best);
    if (lane == 0) bests[warp] = best;
    block_barrier();
    if (threadIdx.x == 0) {
      for (int w = 1; w < kWarps; ++w) {
        if (before(bests[w], best)) best = bests[w];
      }
      int drawn = best.at;
      if (args.temperature > 0.0f && best.value == best.value) {
        // The first v whose share, with those of all before it, exceeds u. One thread adds in the
        // order of v, so that the draw does not depend on how the sum is divided; V is some
        // hundred.
        float total = 0.0f;
        for (int64_t v = 0; v < args.V; ++v) {
          logits[v] = expf((logits[v] - best.value) / args.temperature);
          total += logits[v];
        }
        const float wanted = args.uniforms[i * args.S + s] * total;
        float running = 0.0f;
        for (int64_t v = 0; v < args.V; ++v) {
          running += logits[v];
          if (running > wanted) {
            drawn = static_cast<int>(v);
            break;
          }
        }
      }
      args.out[i * args.S + s] = drawn;
      *character = drawn;
    }
    block_barrier();
  }
  for (int64_t i = threadIdx.x; i < args.layers * H; i += kThreads) {
    args.state[(i / H * args.S + s) * H + i % H] = states[(i / H * 2 + args.n % 2) * H + i % H];
  }
}

}  // namespace
}  // namespace charrnn_fast::cuda

extern "C" const char* charrnn_fast_cuda_generate(const charrnn_fast::cuda::GenerateArgs* args,
                                                  void* stream) {
  using namespace charrnn_fast::cuda;
  if (args->layers < 1 || args->layers > kMaxGenerateLayers)
    return "too many layers to generate with";
  const int64_t bytes =
      (args->layers * 2 * args->H + args->V) * static_cast<int64_t>(sizeof(float)) +
      kWarps * static_cast<int64_t>(sizeof(Best)) + static_cast<int64_t>(sizeof(int));
  if (bytes > 200 * 1024) return "the states and logits of a stream exceed shared memory";
  return launch(generate, dim3(static_cast<unsigned>(args->S)), kThreads, static_cast<int>(bytes),
                false, stream, *args);
}
