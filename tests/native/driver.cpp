// Runs the kernels, without torch, on random sizes, strides, orders and teams, and holds them to:
//   - no access outside a buffer: every buffer ends at an inaccessible page, or begins after one;
//   - the formulas, written naively in double;
//   - the same bits for every team and split, and for a sequence alone as among others;
//   - nothing written that is not theirs: gaps between rows, rows outside every sequence;
//   - indices of 64 bits: some rows lie gigabytes apart;
//   - the modes of floating-point arithmetic as they were, and no invalid operation from sound
//   input.
// Usage: driver [cases] [seed] [isa ...]
//        driver overrun N: reads one byte past buffer N, and must die of it (N past the last: 2)
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "buffers.h"
#include "case.h"
#include "generate_case.h"
#include "kernels/rnn.h"
#include "layer_case.h"
#include "linear_case.h"

namespace charrnn_fast::native {
namespace {

int run_driver(int argc, char** argv) {
  if (argc == 3 && std::strcmp(argv[1], "overrun") == 0) {
    overrun = std::atoi(argv[2]);
    run_overrun();
    return 0;
  }
  const int64_t cases = argc > 1 ? std::atoll(argv[1]) : 200;
  const uint64_t seed = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0;
  for (const Isa* const* isa = isas(); *isa; ++isa) {
    bool chosen = argc <= 3;
    for (int i = 3; i < argc; ++i) chosen |= std::strcmp(argv[i], (*isa)->name) == 0;
    if (!chosen) continue;
    if (!(*isa)->supported()) {
      std::printf("%s: not supported by this CPU\n", (*isa)->name);
      continue;
    }
    for (int64_t i = 0; i < cases; ++i) {
      generator.seed(seed * 1000003 + static_cast<uint64_t>(i));
      current = std::string((*isa)->name) + ", seed " + std::to_string(seed) + ", case " +
                std::to_string(i);
      const auto run = [i](const auto& kernels) {
        if (i < 2)
          run_few_units_case(kernels);
        else if (i % 8 < 6)
          run_layer_case(kernels);
        else if (i % 16 < 14)
          run_generate_case(kernels);
        else
          run_linear_case(kernels);
      };
      if ((*isa)->bf16 && i > 1 && i % 4 < 2)
        run_layer_case(*(*isa)->bf16);
      else if (i % 2)
        run(*(*isa)->f64);
      else
        run(*(*isa)->f32);
    }
    std::printf("%s: %ld cases\n", (*isa)->name, static_cast<long>(cases));
  }
  return 0;
}

}  // namespace
}  // namespace charrnn_fast::native

int main(int argc, char** argv) { return charrnn_fast::native::run_driver(argc, argv); }
