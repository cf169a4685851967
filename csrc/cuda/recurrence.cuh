// The persistent kernels of the recurrence: all steps in one launch, weights loaded once.
//
// Both are one skeleton for forward and backward, s_t = f(in_t, W s_before): only f, the order of
// steps and the meaning of the state differ (h, or delta). A sum over K has one order, fixed by the
// tile, so the bits of a sequence depend neither on the batch nor on the device's number of blocks.
#pragma once

#include <type_traits>

#include "elements.cuh"

namespace charrnn_fast::cuda {

// Four weights as they are kept: as float32, or packed in 16 bits each.
struct alignas(8) PackedFloat16 {
  unsigned bits[2];
};
struct alignas(8) PackedBFloat16 {
  unsigned bits[2];
};

__device__ inline float4 unpack(const float4& w) { return w; }
__device__ inline float4 unpack(const PackedFloat16& w) {
  const float2 a = unpack_float16(w.bits[0]), b = unpack_float16(w.bits[1]);
  return {a.x, a.y, b.x, b.y};
}
__device__ inline float4 unpack(const PackedBFloat16& w) {
  const float2 a = unpack_bfloat16(w.bits[0]), b = unpack_bfloat16(w.bits[1]);
  return {a.x, a.y, b.x, b.y};
}

// A thread's place in its block: lane `slice` of those that share outputs, and its first output.
template <int kTile, bool kGrid>
struct Shape {
  static constexpr Tile kT = kGrid ? kGridTiles[kTile] : kBlockTiles[kTile];
  static constexpr int kSlices = kT.slices, kOutputs = kT.outputs, kQuads = kT.quads;
  static constexpr int kGroups = kOutputs * kQuads;
  static constexpr int kHeld = kT.held;
  static constexpr int kWidth = kT.width();
  static constexpr int kBlockOutputs = kT.block_outputs();
  // After the reduction lane `slice` has the sums of outputs slice, slice + kSlices, ...
  static constexpr int kFinished = (kOutputs + kSlices - 1) / kSlices;
};

// The weights of one thread. Every index into `held` is a constant once loops are unrolled:
// registers.
template <typename S, typename Stored>
struct Weights {
  Stored held[S::kHeld] = {};
  const Stored* shared;  // [groups - held][kThreads], at this thread
};

template <typename Stored>
__device__ inline Stored load_group(const RecurrenceArgs& args, const void* W, bool transposed,
                                    int64_t j, int64_t k) {
  const auto at = [&](int i) { return transposed ? (k + i) * args.H + j : j * args.H + k + i; };
  const auto inside = [&](int i) { return j < args.H && k + i < args.H; };
  if constexpr (std::is_same_v<Stored, float4>) {
    const auto weight = [&](int i) { return inside(i) ? load(W, at(i), args.dtype) : 0.0f; };
    return {weight(0), weight(1), weight(2), weight(3)};
  } else {
    const auto weight = [&](int i) {
      return inside(i) ? static_cast<unsigned>(static_cast<const uint16_t*>(W)[at(i)]) : 0u;
    };
    return {{weight(0) | weight(1) << 16, weight(2) | weight(3) << 16}};
  }
}

// Loads rows j0, j0+1, ... of W (or of its transpose) for this thread; zeros outside.
template <typename S, typename Stored>
__device__ inline void load_weights(const RecurrenceArgs& args, const void* W, bool transposed,
                                    int64_t j0, int slice, Stored* shared,
                                    Weights<S, Stored>& weights) {
  weights.shared = shared + threadIdx.x;
  const auto load_at = [&](int c, int m) {
    return load_group<Stored>(args, W, transposed, j0 + m, (c * S::kSlices + slice) * 4);
  };
  // Were this unrolled, the compiler would have all loads in flight at once, each of them in a
  // register or two beside the 16 bits that it brings, and would spill. So columns are shifted in
  // one by one.
  static_assert(S::kHeld % S::kOutputs == 0);
#pragma unroll 1
  for (int c = 0; c < S::kHeld / S::kOutputs; ++c) {
#pragma unroll
    for (int i = 0; i < S::kHeld - S::kOutputs; ++i) {
      weights.held[i] = weights.held[i + S::kOutputs];
    }
#pragma unroll
    for (int m = 0; m < S::kOutputs; ++m) {
      weights.held[S::kHeld - S::kOutputs + m] = load_at(c, m);
    }
  }
#pragma unroll 1
  for (int i = S::kHeld; i < S::kGroups; ++i) {
    shared[(i - S::kHeld) * kThreads + threadIdx.x] = load_at(i / S::kOutputs, i % S::kOutputs);
  }
}

// Adds up `count` values over `lanes` neighbouring lanes; lane l gets the sum of value l (if l <
// count). The upper half of the values goes to the lanes with the upper bit, and so on: one shuffle
// a value in all.
template <int count, int half>
__device__ inline void fold(float* value, int lane) {
  if constexpr (half > 0) {
    const bool upper = (lane & half) != 0;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float high = i + half < count ? value[i + half] : 0.0f;
      const float keep = upper ? high : value[i];
      const float send = upper ? value[i] : high;
      value[i] = keep + shuffle_xor(send, half);
    }
    fold<half, half / 2>(value, lane);
  }
}
template <int count, int lanes>
__device__ inline float reduce(float* value, int lane) {
  constexpr int kPadded = count > 16 ? 32 : count > 8 ? 16 : count > 4 ? 8 : count > 2 ? 4 : count;
  static_assert(kPadded <= lanes);
  fold<count, kPadded / 2>(value, lane);
#pragma unroll
  for (int mask = kPadded; mask < lanes; mask *= 2) value[0] += shuffle_xor(value[0], mask);
  return value[0];
}

// W s for the outputs of this thread's lanes; result[f] is that of output slice + f * kSlices.
template <typename S, typename Stored>
__device__ inline void product(const Weights<S, Stored>& weights, const float* state, int slice,
                               float (&result)[S::kFinished]) {
  float sum[S::kOutputs];
#pragma unroll
  for (int m = 0; m < S::kOutputs; ++m) sum[m] = 0.0f;
  const float4* quad = reinterpret_cast<const float4*>(state) + slice;
  const auto add = [&](int m, const Stored& stored, const float4& s) {
    const float4 w = unpack(stored);
    sum[m] += w.x * s.x;
    sum[m] += w.y * s.y;
    sum[m] += w.z * s.z;
    sum[m] += w.w * s.w;
  };
  constexpr int kHeldQuads = S::kHeld / S::kOutputs;
#pragma unroll
  for (int c = 0; c < kHeldQuads; ++c) {
    const float4 s = quad[c * S::kSlices];
#pragma unroll
    for (int m = 0; m < S::kOutputs; ++m) add(m, weights.held[c * S::kOutputs + m], s);
  }
  // Were this unrolled, the compiler would load weights far ahead, and would run out of registers.
  const Stored* shared = weights.shared;
#pragma unroll 1
  for (int c = kHeldQuads; c < S::kQuads; ++c, shared += S::kOutputs * kThreads) {
    const float4 s = quad[c * S::kSlices];
#pragma unroll
    for (int m = 0; m < S::kOutputs; ++m) add(m, shared[m * kThreads], s);
  }
  constexpr int kFull = S::kOutputs / S::kSlices, kRest = S::kOutputs % S::kSlices;
#pragma unroll
  for (int f = 0; f < kFull; ++f) {
    result[f] = reduce<S::kSlices, S::kSlices>(sum + f * S::kSlices, slice);
  }
  if constexpr (kRest > 0) {
    result[kFull] = reduce<kRest, S::kSlices>(sum + kFull * S::kSlices, slice);
  }
}

// The steps of one direction in the order they are run.
struct Order {
  int64_t T;
  bool down;
  __device__ int64_t step(int64_t s) const { return down ? T - 1 - s : s; }
  __device__ int64_t first_step(int64_t length) const { return down ? length - 1 : 0; }
};

// What of one sequence at one step the elementwise part needs, loaded before the product that hides
// it.
template <typename S>
struct Inputs {
  int64_t at;  // of the row's first element of this direction; -1: no such row
  bool runs;
  bool starts;
  float in[S::kFinished];
  float y[S::kFinished];
};

// `j0 + slice + f * kSlices` for f = 0, 1, ... are the outputs that this lane finishes.
template <typename S, bool backward>
struct Lane {
  const RecurrenceArgs& args;
  Order order;
  int direction;
  int slice;
  int j0;

  __device__ bool has(int f) const {
    const int m = slice + f * S::kSlices;
    return m < S::kOutputs && j0 + m < args.H;
  }
  __device__ int output(int f) const { return j0 + slice + f * S::kSlices; }

  // An element of [D, B, H].
  __device__ int64_t state_at(int64_t b, int f) const {
    return (direction * args.B + b) * args.H + output(f);
  }

  __device__ Inputs<S> read(int64_t s, int64_t b, int64_t length) const {
    Inputs<S> inputs;
    inputs.at = -1;
    inputs.runs = inputs.starts = false;
    if (s >= args.T) return inputs;
    const int64_t t = order.step(s);
    inputs.runs = t < length;
    inputs.starts = t == order.first_step(length);
    if (args.step_row == nullptr || inputs.runs) {
      const int64_t row = (args.step_row != nullptr ? args.step_row[t] : t * args.B) + b;
      inputs.at = (row * args.D + direction) * args.H;
    }
    if (!inputs.runs) return inputs;
#pragma unroll
    for (int f = 0; f < S::kFinished; ++f) {
      inputs.in[f] = 0.0f;
      if (!has(f)) continue;
      if (args.in != nullptr) inputs.in[f] = load(args.in, inputs.at + output(f), args.dtype);
      if constexpr (backward) inputs.y[f] = load(args.y, inputs.at + output(f), args.dtype);
    }
    return inputs;
  }

  // Finishes output f of a sequence that runs at this step: stores it and returns the new state.
  __device__ float finish(const Inputs<S>& inputs, int f, int64_t b, float product) const {
    float value;
    if constexpr (backward) {
      // At a sequence's end nothing comes back through W_hh, only what the caller has for the last
      // state.
      if (inputs.starts) {
        product = args.initial != nullptr ? load(args.initial, state_at(b, f), args.dtype) : 0.0f;
      }
      value = activate_backward(args.cell, inputs.in[f] + product, inputs.y[f]);
    } else {
      value = activate(args.cell, inputs.in[f] + product);
    }
    store(args.out, inputs.at + output(f), args.dtype, value);
    return value;
  }

  __device__ void clear(const Inputs<S>& inputs) const {
    if (inputs.at < 0) return;
#pragma unroll
    for (int f = 0; f < S::kFinished; ++f) {
      if (has(f)) store(args.out, inputs.at + output(f), args.dtype, 0.0f);
    }
  }

  __device__ float initial_state(int64_t b, int f) const {
    if (backward || args.initial == nullptr) return 0.0f;
    return load(args.initial, state_at(b, f), args.dtype);
  }
};

// kBlock. Block (x, d) runs sequences [x * rows, x * rows + rows) of direction d. Shared memory:
//   state [2][rows][kWidth] float, double buffered; lengths [rows] int64; then the groups of
//   weights that are not held in registers.
template <int kTile, bool backward, typename Stored>
__global__ void __launch_bounds__(kThreads, 1)
    block_recurrence(const __grid_constant__ RecurrenceArgs args) {
  using S = Shape<kTile, false>;
  const int rows = args.rows;
  float* state = reinterpret_cast<float*>(dynamic_shared());
  int64_t* lengths = reinterpret_cast<int64_t*>(state + 2 * rows * S::kWidth);
  Stored* weights_at = reinterpret_cast<Stored*>(lengths + (rows + 1) / 2 * 2);

  const int direction = args.first_direction + blockIdx.y;
  const int slice = threadIdx.x % S::kSlices;
  const int j0 = static_cast<int>(threadIdx.x) / S::kSlices * S::kOutputs;
  const int64_t b0 = static_cast<int64_t>(blockIdx.x) * rows;
  const int count = static_cast<int>(args.B - b0 < rows ? args.B - b0 : rows);
  const Lane<S, backward> lane = {
      args, {args.T, (direction == 1) != backward}, direction, slice, j0};

  Weights<S, Stored> weights;
  load_weights<S, Stored>(args, direction == 0 ? args.W_hh[0] : args.W_hh[1], backward, j0, slice,
                          weights_at, weights);
  for (int i = threadIdx.x; i < 2 * rows * S::kWidth; i += kThreads) state[i] = 0.0f;
  for (int r = threadIdx.x; r < count; r += kThreads) {
    lengths[r] = length_of(args.lengths, b0 + r, args.T);
  }
  block_barrier();
  if (!backward && args.initial != nullptr) {
    for (int r = 0; r < count; ++r) {
#pragma unroll
      for (int f = 0; f < S::kFinished; ++f) {
        if (lane.has(f)) state[r * S::kWidth + lane.output(f)] = lane.initial_state(b0 + r, f);
      }
    }
    block_barrier();
  }

  // The loads for a sequence are issued while the one before it is multiplied.
  Inputs<S> next = lane.read(0, b0, lengths[0]);
  for (int64_t s = 0; s < args.T; ++s) {
    const float* before = state + (s % 2) * rows * S::kWidth;
    float* after = state + ((s + 1) % 2) * rows * S::kWidth;
    for (int r = 0; r < count; ++r) {
      const Inputs<S> inputs = next;
      const bool last = r + 1 == count;
      next = lane.read(last ? s + 1 : s, last ? b0 : b0 + r + 1, lengths[last ? 0 : r + 1]);
      float sums[S::kFinished] = {};
      if (inputs.runs) {
        product<S, Stored>(weights, before + r * S::kWidth, slice, sums);
      } else {
        lane.clear(inputs);
      }
#pragma unroll
      for (int f = 0; f < S::kFinished; ++f) {
        if (!lane.has(f)) continue;
        const int at = r * S::kWidth + lane.output(f);
        after[at] = inputs.runs ? lane.finish(inputs, f, b0 + r, sums[f]) : before[at];
      }
    }
    block_barrier();  // the new state is complete, and the old one no longer read
  }

  if (args.final == nullptr) return;
  const float* state_n = state + (args.T % 2) * rows * S::kWidth;
  for (int r = 0; r < count; ++r) {
    float sums[S::kFinished] = {};
    if (backward) product<S, Stored>(weights, state_n + r * S::kWidth, slice, sums);
#pragma unroll
    for (int f = 0; f < S::kFinished; ++f) {
      if (!lane.has(f)) continue;
      const float value = backward ? sums[f] : state_n[r * S::kWidth + lane.output(f)];
      store(args.final, lane.state_at(b0 + r, f), args.dtype, value);
    }
  }
}

// kGrid. Block x of direction d holds outputs [x % n * kBlockOutputs, ...) of group x / n, n blocks
// in a group; a group has `rows` sequences. Shared memory: [kStagedRows][kWidth] states, then
// weights. The workspace: a counter for each group, on cache lines of their own, then the states
// [2][D][B][H].
template <int kTile, bool backward>
__global__ void __launch_bounds__(kThreads, 1)
    grid_recurrence(const __grid_constant__ RecurrenceArgs args) {
  using S = Shape<kTile, true>;
  float* staged = reinterpret_cast<float*>(dynamic_shared());

  const int direction = args.first_direction + blockIdx.y;
  const int group = blockIdx.x / args.blocks_in_group;
  const int groups = gridDim.x / args.blocks_in_group;
  const int slice = threadIdx.x % S::kSlices;
  const int j0 = static_cast<int>(blockIdx.x) % args.blocks_in_group * S::kBlockOutputs +
                 static_cast<int>(threadIdx.x) / S::kSlices * S::kOutputs;
  const int64_t b0 = static_cast<int64_t>(group) * args.rows;
  const int64_t count = args.B - b0 < args.rows ? args.B - b0 : args.rows;
  const Lane<S, backward> lane = {
      args, {args.T, (direction == 1) != backward}, direction, slice, j0};

  char* const workspace = static_cast<char*>(args.workspace);
  unsigned* counter =
      reinterpret_cast<unsigned*>(workspace + (direction * groups + group) * kCounterBytes);
  float* const states = reinterpret_cast<float*>(workspace + args.D * groups * kCounterBytes);
  unsigned target = 0;
  const auto meet = [&] {
    block_barrier();  // all of this block have written
    target += args.blocks_in_group;
    grid_wait(counter, target);  // the barrier that stage() begins with keeps the others waiting
  };
  // Row b of the states that step s reads.
  const auto state_of = [&](int64_t s, int64_t b) {
    return states + (((s % 2) * args.D + direction) * args.B + b) * args.H;
  };
  // Brings sequences [first, first + n) of the states that step s reads into shared memory.
  const auto stage = [&](int64_t s, int64_t first, int n) {
    block_barrier();  // the rows staged before are no longer read
    if (args.H % 4 == 0) {
      const int quads = S::kWidth / 4, used = static_cast<int>(args.H / 4);
      for (int i = threadIdx.x; i < n * quads; i += kThreads) {
        const int r = i / quads, q = i % quads;
        float4 value = {0.0f, 0.0f, 0.0f, 0.0f};
        if (q < used) value = load_l2(reinterpret_cast<const float4*>(state_of(s, first + r)) + q);
        reinterpret_cast<float4*>(staged)[i] = value;
      }
    } else {
      for (int i = threadIdx.x; i < n * S::kWidth; i += kThreads) {
        const int r = i / S::kWidth, k = i % S::kWidth;
        staged[i] = k < args.H ? load_l2(state_of(s, first + r) + k) : 0.0f;
      }
    }
    block_barrier();
  };

  Weights<S, float4> weights;
  load_weights<S, float4>(args, direction == 0 ? args.W_hh[0] : args.W_hh[1], backward, j0, slice,
                          reinterpret_cast<float4*>(staged + kStagedRows * S::kWidth), weights);
  for (int64_t b = b0; b < b0 + count; ++b) {
#pragma unroll
    for (int f = 0; f < S::kFinished; ++f) {
      if (lane.has(f)) state_of(0, b)[lane.output(f)] = lane.initial_state(b, f);
    }
  }
  meet();

  for (int64_t s = 0; s < args.T; ++s) {
    for (int64_t first = b0; first < b0 + count; first += kStagedRows) {
      const int64_t left = b0 + count - first;
      const int n = left < kStagedRows ? static_cast<int>(left) : kStagedRows;
      Inputs<S> next = lane.read(s, first, length_of(args.lengths, first, args.T));
      stage(s, first, n);
      for (int r = 0; r < n; ++r) {
        const int64_t b = first + r;
        const float* before = staged + r * S::kWidth;
        const Inputs<S> inputs = next;
        if (r + 1 < n) next = lane.read(s, b + 1, length_of(args.lengths, b + 1, args.T));
        float sums[S::kFinished] = {};
        if (inputs.runs) {
          product<S, float4>(weights, before, slice, sums);
        } else {
          lane.clear(inputs);
        }
#pragma unroll
        for (int f = 0; f < S::kFinished; ++f) {
          if (!lane.has(f)) continue;
          state_of(s + 1, b)[lane.output(f)] =
              inputs.runs ? lane.finish(inputs, f, b, sums[f]) : before[lane.output(f)];
        }
      }
    }
    meet();
  }

  if (args.final == nullptr) return;
  for (int64_t first = b0; first < b0 + count; first += kStagedRows) {
    const int64_t left = b0 + count - first;
    const int n = left < kStagedRows ? static_cast<int>(left) : kStagedRows;
    stage(args.T, first, n);
    for (int r = 0; r < n; ++r) {
      const float* state_n = staged + r * S::kWidth;
      float sums[S::kFinished] = {};
      if (backward) product<S, float4>(weights, state_n, slice, sums);
#pragma unroll
      for (int f = 0; f < S::kFinished; ++f) {
        if (!lane.has(f)) continue;
        store(args.final, lane.state_at(first + r, f), args.dtype,
              backward ? sums[f] : state_n[lane.output(f)]);
      }
    }
  }
}

}  // namespace charrnn_fast::cuda
