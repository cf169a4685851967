// The plan for a table of real devices, and what every plan must hold.
#include <cstring>

#include "problem.h"

namespace charrnn_fast::cuda {
namespace {

// Limits from NVIDIA's programming guide, table of compute capabilities; multiprocessors from data
// sheets.
struct Device {
  const char* name;
  DeviceLimits limits;
};
const Device kDevices[] = {
    {"T4", {40, 75, 65536, 65536, true}},      {"A100", {108, 80, 166912, 65536, true}},
    {"L4", {58, 89, 101376, 65536, true}},     {"H100", {132, 90, 232448, 65536, true}},
    {"B200", {148, 100, 232448, 65536, true}},
};

}  // namespace

void plans(bool print) {
  for (const Device& device : kDevices) {
    for (int dtype = 0; dtype < 3; ++dtype) {
      for (int64_t H :
           {1,   2,   31,  32,  33,  100, 128,  150,  192,  200,  224,  225,  240,  256,
            300, 384, 448, 512, 640, 768, 1000, 1024, 1280, 1536, 2000, 2048, 2049, 4096}) {
        for (int64_t B : {1, 2, 8, 32, 64, 100, 256, 5000}) {
          for (int64_t D : {1, 2}) {
            ++checks;
            const Dtype type = static_cast<Dtype>(dtype);
            const LaunchPlan plan = plan_recurrence(H, B, D, type, device.limits);
            const std::string where = std::string("plan ") + device.name + " " + kDtypes[dtype] +
                                      " H=" + std::to_string(H) + " B=" + std::to_string(B) +
                                      " D=" + std::to_string(D);
            const auto require = [&](bool holds, const char* what) {
              if (!holds) fail(where + ": " + what);
            };
            require(plan.reason != nullptr, "no reason");
            require(plan.shared_bytes <= device.limits.shared_per_block, "too much shared memory");
            if (plan.design == Design::kStep) continue;
            require(H <= kMaxHidden, "H is too large");
            const Tile& tile =
                plan.design == Design::kBlock ? kBlockTiles[plan.tile] : kGridTiles[plan.tile];
            require(tile.width() >= H, "the tile is too narrow");
            require(!tile.packed || type != Dtype::kFloat32, "float32 in 16 bits");
            require(plan.rows >= 1, "no rows");
            if (plan.design == Design::kBlock) {
              require(plan.rows <= kMaxRows, "too many rows");
              require(static_cast<int64_t>(plan.blocks) * plan.rows >= B, "sequences are left out");
              require(static_cast<int64_t>(plan.blocks - 1) * plan.rows < B,
                      "a block without sequences");
            } else {
              const int groups = plan.blocks / plan.blocks_in_group;
              require(plan.blocks % plan.blocks_in_group == 0, "a broken group");
              require(plan.blocks_in_group * tile.block_outputs() >= H, "outputs are left out");
              require(static_cast<int64_t>(groups) * plan.rows >= B, "sequences are left out");
              require(static_cast<int64_t>(groups - 1) * plan.rows < B,
                      "a group without sequences");
              require(plan.blocks * (plan.together ? D : 1) <= device.limits.multiprocessors,
                      "blocks that are not resident");
            }
            DeviceLimits alone = device.limits;
            alone.cooperative = false;
            require(plan_recurrence(H, B, D, type, alone).design != Design::kGrid,
                    "a cooperative launch that the device does not have");
          }
        }
      }
    }
  }
  // What is wanted of the designs, device by device.
  const auto design = [](const char* name, int64_t H, int64_t B, Dtype dtype) {
    for (const Device& device : kDevices) {
      if (std::strcmp(device.name, name) == 0) {
        return plan_recurrence(H, B, 1, dtype, device.limits).design;
      }
    }
    return Design::kStep;
  };
  const struct {
    const char* device;
    int64_t H, B;
    Dtype dtype;
    Design expected;
  } table[] = {
      {"T4", 128, 32, Dtype::kFloat32, Design::kBlock},
      {"T4", 224, 32, Dtype::kFloat32, Design::kBlock},
      {"T4", 512, 8, Dtype::kFloat32, Design::kGrid},
      {"T4", 2048, 8, Dtype::kFloat32, Design::kStep},
      {"A100", 64, 256, Dtype::kFloat32, Design::kBlock},
      {"A100", 256, 32, Dtype::kFloat32, Design::kBlock},
      {"A100", 300, 8, Dtype::kFloat32, Design::kGrid},
      {"A100", 300, 8, Dtype::kBFloat16, Design::kBlock},
      {"A100", 512, 16, Dtype::kFloat32, Design::kGrid},
      {"A100", 2048, 256, Dtype::kBFloat16, Design::kStep},
      {"L4", 224, 8, Dtype::kFloat32, Design::kBlock},
      {"H100", 288, 8, Dtype::kFloat32, Design::kBlock},
      {"H100", 416, 8, Dtype::kBFloat16, Design::kBlock},
      {"H100", 1024, 8, Dtype::kFloat32, Design::kGrid},
      {"H100", 1024, 256, Dtype::kBFloat16, Design::kStep},
      {"B200", 1024, 8, Dtype::kFloat32, Design::kGrid},
  };
  for (const auto& row : table) {
    ++checks;
    const Design found = design(row.device, row.H, row.B, row.dtype);
    if (found != row.expected) {
      fail(std::string("plan ") + row.device + " H=" + std::to_string(row.H) +
           " B=" + std::to_string(row.B) + " is " + kDesigns[static_cast<int>(found)]);
    }
  }
  if (!print) return;
  for (int dtype : {0, 2}) {
    for (const Device& device : kDevices) {
      std::printf("%s %s\n", device.name, kDtypes[dtype]);
      for (int64_t H : {64, 128, 200, 224, 256, 320, 384, 448, 512, 768, 1024, 1536, 2048}) {
        std::printf("  H=%-5lld", static_cast<long long>(H));
        for (int64_t B : {1, 8, 32, 64, 128, 256}) {
          const LaunchPlan plan =
              plan_recurrence(H, B, 1, static_cast<Dtype>(dtype), device.limits);
          std::printf(" %s", kDesigns[static_cast<int>(plan.design)]);
          if (plan.design != Design::kStep) std::printf("(%dx%d)", plan.blocks, plan.rows);
        }
        std::printf("\n");
      }
    }
  }
}

// docs/cuda.md states what is assumed, and the formulas.
void rooflines() {
  constexpr double kL2BytesPerCycle = 40;  // of each multiprocessor
  const struct {
    const char* name;
    double gigahertz, lanes;  // multiply-adds a cycle and multiprocessor
  } clocks[] = {{"A100", 1.41, 64}, {"H100", 1.98, 128}};
  std::printf(
      "| H | B | A100: design | floor | expected | cuDNN | H100: design | floor | expected | cuDNN "
      "|\n|---|---|---|---|---|---|---|---|---|---|\n");
  for (int64_t H : {64, 200, 512, 1024, 2048}) {
    for (int64_t B : {1, 32, 256}) {
      std::printf("| %lld | %lld |", static_cast<long long>(H), static_cast<long long>(B));
      for (const auto& clock : clocks) {
        const auto named = [&](const Device& d) { return std::strcmp(d.name, clock.name) == 0; };
        const DeviceLimits limits =
            std::find_if(std::begin(kDevices), std::end(kDevices), named)->limits;
        const auto microseconds = [&](double cycles) { return cycles / clock.gigahertz / 1000; };
        const auto time_of = [&](const LaunchPlan& plan) {
          return microseconds(plan_cycles(plan, H, B, 1, Dtype::kFloat32, limits));
        };
        const LaunchPlan plan = plan_recurrence(H, B, 1, Dtype::kFloat32, limits);
        std::string design = kDesigns[static_cast<int>(plan.design)];
        double floats = 2.0 * B * H;  // in and out
        if (plan.design == Design::kGrid) {
          floats += B * H + 1.0 * plan.blocks * plan.rows * H;  // states written, and read by all
        } else if (plan.design == Design::kStep) {
          floats += 1.0 * H * H + 4.0 * B * H;
        }
        if (plan.design != Design::kStep) {
          design += " " + std::to_string(plan.blocks) + " x " + std::to_string(plan.rows);
        }
        const double floor =
            std::max(1.0 * H * H * B / clock.lanes, 4 * floats / kL2BytesPerCycle) /
            limits.multiprocessors;
        std::printf(" %s | %.2g | %.3g |", design.c_str(), microseconds(floor), time_of(plan));
        if (H <= 384) {
          std::printf(" ? |");
        } else {
          std::printf(" %.3g |",
                      time_of(plan_design(Design::kStep, H, B, 1, Dtype::kFloat32, limits)));
        }
      }
      std::printf("\n");
    }
  }
}

}  // namespace charrnn_fast::cuda
