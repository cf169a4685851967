// Which design serves a layer on a device. No device is asked; the numbers come in.
#include <algorithm>

#include "rnn_cuda.h"

namespace charrnn_fast::cuda {
namespace {

// The model. It decides speed only, and no GPU has confirmed it yet: docs/cuda.md has the same
// arithmetic.
constexpr double kStepCycles =
    300;  // a block's step beside its products: barrier, activation, latency
constexpr double kGridCycles = 2500;    // meeting at a grid barrier, and L2 latency after it
constexpr double kStagingCycles = 700;  // bringing states of some sequences into shared memory
constexpr double kLaunchCycles =
    9000;  // a matrix product and an elementwise kernel, one after the other
constexpr double kSharedBytesPerCycle = 128;
constexpr double kTensorCoreRate =
    512;  // multiply-adds a cycle and multiprocessor, as small products get

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Multiply-adds in float32 a cycle and multiprocessor.
double float_lanes(const DeviceLimits& limits) {
  return limits.compute_capability == 75 || limits.compute_capability == 80 ? 64 : 128;
}

int block_bytes(const Tile& tile, int rows) {
  return 2 * rows * tile.width() * 4 + (rows + 1) / 2 * 16 + tile.weight_bytes();
}

int block_tile(int64_t H, Dtype dtype, const DeviceLimits& limits, int rows) {
  for (int i = 0; i < kBlockTileCount; ++i) {
    const Tile& tile = kBlockTiles[i];
    if (tile.width() < H || (tile.packed && dtype == Dtype::kFloat32)) continue;
    // float16 beyond the registers: packed weights come later in the table, and need less shared
    // memory.
    if (!tile.packed && dtype != Dtype::kFloat32 && tile.weight_bytes() > 0) continue;
    if (block_bytes(tile, rows) <= limits.shared_per_block) return i;
  }
  return -1;
}

LaunchPlan refuse(Design design) { return {design, -1, 0, 0, 0, 0, false, nullptr}; }

// Cycles of a thread block for one product W s of one sequence.
double product_cycles(const Tile& tile, const DeviceLimits& limits) {
  const double weights = static_cast<double>(tile.outputs) * tile.quads * 4 * kThreads;
  const double multiply = weights * (tile.packed ? 2 : 1) / float_lanes(limits);
  const double warps = kThreads / 32;
  // Each warp reads the state, 32 lanes at a time, and shuffles about once an output.
  const double shared = warps * (tile.width() * 4 / kSharedBytesPerCycle + tile.outputs + 3) +
                        tile.weight_bytes() / kSharedBytesPerCycle;
  return std::max(multiply, shared);
}

double block_cycles(const LaunchPlan& plan, int64_t D, const DeviceLimits& limits) {
  const double waves = ceil_div(plan.blocks * D, limits.multiprocessors);
  return waves * (kStepCycles + plan.rows * product_cycles(kBlockTiles[plan.tile], limits));
}

double grid_cycles(const LaunchPlan& plan, int64_t D, const DeviceLimits& limits) {
  return (plan.together ? 1 : D) *
         (kGridCycles + ceil_div(plan.rows, kStagedRows) * kStagingCycles +
          plan.rows * product_cycles(kGridTiles[plan.tile], limits));
}

double step_cycles(int64_t H, int64_t B, int64_t D, Dtype dtype, const DeviceLimits& limits) {
  const double rate = dtype == Dtype::kFloat32 ? 0.6 * float_lanes(limits) : kTensorCoreRate;
  const double multiply = static_cast<double>(H) * H * B / (rate * limits.multiprocessors);
  return D * std::max(kLaunchCycles, multiply + kLaunchCycles / 3);
}

}  // namespace

LaunchPlan plan_design(Design design, int64_t H, int64_t B, int64_t D, Dtype dtype,
                       const DeviceLimits& limits) {
  LaunchPlan plan = refuse(design);
  const bool has_registers = limits.registers_per_sm >= kThreads * 255;
  switch (design) {
    case Design::kBlock: {
      // One sequence a block while multiprocessors are free, then more.
      int rows =
          static_cast<int>(std::min<int64_t>(ceil_div(B * D, limits.multiprocessors), kMaxRows));
      int tile = -1;
      if (has_registers) {
        while (rows > 0 && (tile = block_tile(H, dtype, limits, rows)) < 0) rows /= 2;
      }
      if (tile < 0) return plan;
      plan.tile = tile;
      plan.rows = rows;
      plan.blocks = static_cast<int>(ceil_div(B, rows));
      plan.blocks_in_group = 1;
      plan.shared_bytes = block_bytes(kBlockTiles[tile], rows);
      plan.together = true;
      plan.reason = "W_hh fits into a block: each runs all steps of its sequences";
      return plan;
    }
    case Design::kGrid: {
      if (!limits.cooperative || !has_registers) return plan;
      for (int i = 0; i < kGridTileCount; ++i) {
        const Tile& tile = kGridTiles[i];
        if (tile.width() < H) continue;
        plan.blocks_in_group = static_cast<int>(ceil_div(H, tile.block_outputs()));
        plan.shared_bytes = kStagedRows * tile.width() * 4 + tile.weight_bytes();
        if (plan.blocks_in_group > limits.multiprocessors ||
            plan.shared_bytes > limits.shared_per_block) {
          continue;
        }
        // A block of 255 registers a thread has a multiprocessor for itself, and all must be
        // resident.
        plan.together = plan.blocks_in_group * D <= limits.multiprocessors;
        const int64_t free = limits.multiprocessors / (plan.together ? D : 1);
        const int64_t most = std::min<int64_t>(free / plan.blocks_in_group, B);
        plan.tile = i;
        plan.rows = static_cast<int>(ceil_div(B, most));
        plan.blocks = static_cast<int>(ceil_div(B, plan.rows)) * plan.blocks_in_group;
        plan.reason = "W_hh is divided over the multiprocessors, which meet at a barrier each step";
        return plan;
      }
      return plan;
    }
    case Design::kStep:
      plan.reason = "a matrix product each step";
      return plan;
  }
  return plan;
}

double plan_cycles(const LaunchPlan& plan, int64_t H, int64_t B, int64_t D, Dtype dtype,
                   const DeviceLimits& limits) {
  switch (plan.design) {
    case Design::kBlock:
      return block_cycles(plan, D, limits);
    case Design::kGrid:
      return grid_cycles(plan, D, limits);
    case Design::kStep:
      break;
  }
  return step_cycles(H, B, D, dtype, limits);
}

LaunchPlan plan_recurrence(int64_t H, int64_t B, int64_t D, Dtype dtype,
                           const DeviceLimits& limits) {
  LaunchPlan best = plan_design(Design::kStep, H, B, D, dtype, limits);
  for (Design design : {Design::kGrid, Design::kBlock}) {
    const LaunchPlan plan = plan_design(design, H, B, D, dtype, limits);
    if (plan.reason != nullptr &&
        plan_cycles(plan, H, B, D, dtype, limits) < plan_cycles(best, H, B, D, dtype, limits)) {
      best = plan;
    }
  }
  return best;
}

size_t recurrence_workspace(const LaunchPlan& plan, int64_t B, int64_t H, int64_t D) {
  if (plan.design != Design::kGrid) return 0;
  const int64_t groups = plan.blocks / plan.blocks_in_group;
  return static_cast<size_t>(D * groups * kCounterBytes + 2 * D * B * H * 4);
}

}  // namespace charrnn_fast::cuda
