// NEON of aarch64: 32 registers of 4 floats, with fused multiply-add.
#pragma once

#include <arm_neon.h>

#include "isa-prologue.h"

namespace charrnn_fast {
namespace {

constexpr int kVectorBytes = 16;
constexpr int kTileRows = 6;  // 6 rows x 4 vectors: 24 accumulators
constexpr int kTileVectors = 4;
constexpr int kTermsAtOnce = 1;  // of a product, in one round of its loop

ALWAYS_INLINE float32x4_t multiply_add(float32x4_t a, float32x4_t b, float32x4_t c) {
  return vfmaq_f32(c, a, b);
}
ALWAYS_INLINE float64x2_t multiply_add(float64x2_t a, float64x2_t b, float64x2_t c) {
  return vfmaq_f64(c, a, b);
}

}  // namespace
}  // namespace charrnn_fast
