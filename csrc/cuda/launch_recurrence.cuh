// Picks the instance of a persistent kernel that a plan names. Included by one file for each
// direction of differentiation, so that they compile side by side.
#pragma once

#include <type_traits>
#include <utility>

#include "recurrence.cuh"

namespace charrnn_fast::cuda {

template <int kTile, bool backward>
const char* launch_block(const LaunchPlan& plan, const RecurrenceArgs& args, dim3 grid,
                         void* stream) {
  const auto run = [&](auto kernel) {
    return launch(kernel, grid, kThreads, plan.shared_bytes, false, stream, args);
  };
  if constexpr (!kBlockTiles[kTile].packed) {
    return run(block_recurrence<kTile, backward, float4>);
  } else if (args.dtype == Dtype::kFloat16) {
    return run(block_recurrence<kTile, backward, PackedFloat16>);
  } else {
    return run(block_recurrence<kTile, backward, PackedBFloat16>);
  }
}

template <int kTile, bool backward>
const char* launch_grid(const LaunchPlan& plan, const RecurrenceArgs& args, dim3 grid,
                        void* stream) {
  return launch(grid_recurrence<kTile, backward>, grid, kThreads, plan.shared_bytes, true, stream,
                args);
}

using Launch = const char* (*)(const LaunchPlan&, const RecurrenceArgs&, dim3, void*);

template <bool backward, int... tile>
Launch block_launch(int wanted, std::integer_sequence<int, tile...>) {
  constexpr Launch kLaunches[] = {launch_block<tile, backward>...};
  return kLaunches[wanted];
}

template <bool backward, int... tile>
Launch grid_launch(int wanted, std::integer_sequence<int, tile...>) {
  constexpr Launch kLaunches[] = {launch_grid<tile, backward>...};
  return kLaunches[wanted];
}

template <bool backward>
const char* launch_recurrence(const LaunchPlan& plan, RecurrenceArgs args, void* stream) {
  Launch run;
  switch (plan.design) {
    case Design::kBlock:
      run = block_launch<backward>(plan.tile, std::make_integer_sequence<int, kBlockTileCount>());
      break;
    case Design::kGrid:
      run = grid_launch<backward>(plan.tile, std::make_integer_sequence<int, kGridTileCount>());
      break;
    default:
      return "the plan is one of steps, not of a persistent kernel";
  }
  args.rows = plan.rows;
  args.blocks_in_group = plan.blocks_in_group;
  const int launches = plan.together ? 1 : args.D;
  for (int i = 0; i < launches; ++i) {
    args.first_direction = i;
    const char* error = run(plan, args, dim3(plan.blocks, args.D / launches), stream);
    if (error != nullptr) return error;
  }
  return nullptr;
}

}  // namespace charrnn_fast::cuda
