// What every CPU of the architecture has: 128-bit vectors, multiply and add rounded apart.
#pragma once

#include "isa-prologue.h"

namespace charrnn_fast {
namespace {

constexpr int kVectorBytes = 16;
constexpr int kTileRows = 4;  // 4 rows x 2 vectors: 8 accumulators of 16 registers
constexpr int kTileVectors = 2;
constexpr int kTermsAtOnce = 1;  // of a product, in one round of its loop

template <typename V>
ALWAYS_INLINE V multiply_add(V a, V b, V c) {
  return a * b + c;
}

}  // namespace
}  // namespace charrnn_fast
