// Draws characters one after the other without leaving the device: a block for each stream.
#include "elements.cuh"

namespace charrnn_fast::cuda {
namespace {

constexpr int kWarps = kThreads / 32;
constexpr float kSmallestNormal = 1.17549435e-38f;

// The dot product of n numbers; every lane of the warp gets it.
__device__ float dot(const float* a, const float* b, int64_t n, int lane) {
  float sum = 0.0f;
  for (int64_t k = lane; k < n; k += 32) sum += a[k] * b[k];
#pragma unroll
  for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
  return sum;
}

// Of all scores the greatest, and the first place where it is. A NaN is greater than everything.
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

// Shared memory of a block.
struct Shared {
  Best bests[kWarps];
  float sums[kThreads];
  int character;
};

// Finds the best of V scores; all threads get it.
__device__ Best best_of(const float* scores, int V, Shared* shared) {
  Best best = {-INFINITY, 0x7fffffff};
  for (int v = threadIdx.x; v < V; v += kThreads) {
    const Best here = {scores[v], v};
    if (before(here, best)) best = here;
  }
  best = best_of_warp(best);
  if (threadIdx.x % 32 == 0) shared->bests[threadIdx.x / 32] = best;
  block_barrier();
  best = shared->bests[0];
  for (int w = 1; w < kWarps; ++w) {
    if (before(shared->bests[w], best)) best = shared->bests[w];
  }
  return best;
}

// Turns scores into the weights of a draw: exp((score - best) / temperature), zero where top_k or
// top_p leave a character out. The rules of `draw` in charrnn_fast/charlm/sample.py; instead of
// sorting, each thread looks at all of V for each character of its own. Returns where the weights
// are: both arrays may be written.
__device__ const float* weigh(const DrawArgs& args, float best, float* scores, float* weights) {
  const int V = static_cast<int>(args.V);
  for (int v = threadIdx.x; v < V; v += kThreads) {
    int64_t greater = 0;
    if (args.top_k > 0 && args.top_k < V) {
      for (int w = 0; w < V; ++w) greater += scores[w] > scores[v];
      if (greater >= args.top_k) {  // of equal scores all stay
        weights[v] = 0.0f;
        continue;
      }
    }
    weights[v] = expf((scores[v] - best) / args.temperature);
  }
  block_barrier();
  if (!(args.top_p < 1.0f)) return weights;
  for (int v = threadIdx.x; v < V; v += kThreads) {
    const float own = weights[v];
    float heavier = 0.0f, total = 0.0f;  // heavier: of those ahead of v
    bool first = true;
    for (int w = 0; w < V; ++w) {
      total += weights[w];
      if (weights[w] > own || (weights[w] == own && w < v)) {
        heavier += weights[w];
        first = false;
      }
    }
    scores[v] = heavier >= args.top_p * total && !first ? 0.0f : own;
  }
  block_barrier();
  return scores;
}

// The first character whose weight, with those of all before it, exceeds the share u of the sum.
// Each thread adds up the weights of a run of characters, then all runs: everyone's sums are the
// same, so exactly one thread finds `wanted` in its run and writes the character.
__device__ void draw(const float* weights, int V, float u, Shared* shared) {
  const int run = (V + kThreads - 1) / kThreads, runs = (V + run - 1) / run;
  const int own = threadIdx.x, first = own * run;
  const int last = first + run < V ? first + run : V;
  float sum = 0.0f;
  for (int v = first; v < last; ++v) sum += weights[v];
  shared->sums[own] = sum;
  block_barrier();
  float total = 0.0f, from = 0.0f, to = 0.0f;
  bool later = false;  // a run after this one has any weight
  for (int i = 0; i < runs; ++i) {
    if (i == own) from = total;
    total += shared->sums[i];
    if (i == own) to = total;
    later |= i > own && shared->sums[i] > 0.0f;
  }
  const float wanted = u * total;
  if (own == 0 && wanted != wanted) shared->character = 0;
  if (own >= runs || !(sum > 0.0f)) return;
  // Rounding may put `wanted` at the total itself: the last that has any weight is meant.
  if (!(from <= wanted && (wanted < to || !later))) return;
  int drawn = first;
  for (int v = first; v < last; ++v) {
    if (weights[v] > 0.0f) drawn = v;
    from += weights[v];
    if (from > wanted) break;
  }
  shared->character = drawn;
}

__global__ void __launch_bounds__(kThreads) generate(const __grid_constant__ DrawArgs args) {
  Shared* shared = reinterpret_cast<Shared*>(dynamic_shared());
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, V = static_cast<int>(args.V);
  const int64_t s = blockIdx.x, H = args.H, states = args.layers * H;
  // States before a step and after it, in turns, each [layers][H]. Only this block reads them: they
  // stay in L1.
  float* from = args.workspace + s * (2 * states + 2 * args.V);
  float* to = from + states;
  float* scores = to + states;
  float* weights = scores + args.V;

  for (int64_t i = threadIdx.x; i < states; i += kThreads) {
    from[i] = args.state[(i / H * args.S + s) * H + i % H];
  }
  if (threadIdx.x == 0) {
    const int64_t token = args.tokens[s];
    shared->character = token >= 0 && token < V ? static_cast<int>(token) : -1;
  }
  block_barrier();
  for (int64_t i = 0; i < args.N; ++i) {
    const int character = shared->character;
    for (int layer = 0; layer < args.layers; ++layer) {
      for (int64_t j = warp; j < H; j += kWarps) {
        const float* W_hh = args.W_hh + (layer * H + j) * H;
        float sum = dot(W_hh, from + layer * H, H, lane);
        if (layer == 0) {
          sum += character >= 0 ? args.table[character * H + j] : NAN;
        } else {
          const int64_t at = (layer - 1) * H + j;
          if (args.bias != nullptr) sum += args.bias[at];
          sum += dot(args.W_ih + at * H, to + (layer - 1) * H, H, lane);
        }
        if (lane == 0) to[layer * H + j] = activate(args.cell, sum);
      }
      block_barrier();  // the layer above reads it
    }
    for (int64_t v = warp; v < V; v += kWarps) {
      const float sum = dot(args.W_out + v * H, to + states - H, H, lane);
      if (lane == 0) scores[v] = args.b_out != nullptr ? sum + args.b_out[v] : sum;
    }
    block_barrier();
    const Best best = best_of(scores, V, shared);
    if (args.temperature < kSmallestNormal) {
      if (threadIdx.x == 0) shared->character = best.at;
    } else {
      const float* drawn_from = weigh(args, best.value, scores, weights);
      draw(drawn_from, V, args.uniforms[i * args.S + s], shared);
    }
    block_barrier();
    if (threadIdx.x == 0) args.drawn[i * args.S + s] = shared->character;
    float* const before_it = from;
    from = to;
    to = before_it;
  }
  for (int64_t i = threadIdx.x; i < states; i += kThreads) {
    args.state[(i / H * args.S + s) * H + i % H] = from[i];
  }
}

}  // namespace
}  // namespace charrnn_fast::cuda

extern "C" const char* charrnn_fast_cuda_generate(const charrnn_fast::cuda::DrawArgs* args,
                                                  void* stream) {
  using namespace charrnn_fast::cuda;
  if (args->V > 0x7fffffff || args->S > 0x7fffffff) return "too many characters or streams";
  return launch(generate, dim3(static_cast<unsigned>(args->S)), kThreads,
                static_cast<int>(sizeof(Shared)), false, stream, *args);
}
