// AVX2 with FMA: 16 registers of 8 floats.
#pragma once

#include <immintrin.h>

#include "isa-prologue.h"

namespace charrnn_fast {
namespace {

constexpr int kVectorBytes = 32;
constexpr int kTileRows = 6;  // 6 rows x 2 vectors: 12 accumulators
constexpr int kTileVectors = 2;
// Of a round of 12 products an eighth of the instructions would be counting and branching, and a
// core that shares its decoder with a busy sibling has nothing to spare.
constexpr int kTermsAtOnce = 4;

ALWAYS_INLINE __m256 multiply_add(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
ALWAYS_INLINE __m256d multiply_add(__m256d a, __m256d b, __m256d c) {
  return _mm256_fmadd_pd(a, b, c);
}

// The sum stays in its register: where a loop takes several terms at once, g++ 12 lets sums change
// theirs, which costs a move or a spill for every tenth product when all sixteen are in use.
#define CHARRNN_FAST_PLUS_PRODUCT
ALWAYS_INLINE __m256 plus_product(__m256 sum, __m256 a, __m256 b) {
  asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
  return sum;
}
ALWAYS_INLINE __m256d plus_product(__m256d sum, __m256d a, __m256d b) {
  asm("vfmadd231pd %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
  return sum;
}

// Of a NaN and a number the second operand.
#define CHARRNN_FAST_MINIMUM
ALWAYS_INLINE __m256 minimum(__m256 a, __m256 b) { return _mm256_min_ps(a, b); }
ALWAYS_INLINE __m256d minimum(__m256d a, __m256d b) { return _mm256_min_pd(a, b); }
ALWAYS_INLINE __m256 maximum(__m256 a, __m256 b) { return _mm256_max_ps(a, b); }
ALWAYS_INLINE __m256d maximum(__m256d a, __m256d b) { return _mm256_max_pd(a, b); }

// Loads only: masked stores take many times as long on some CPUs.
#define CHARRNN_FAST_MASKED_LOAD
constexpr int32_t kMask[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
ALWAYS_INLINE __m256i mask_of(int64_t n) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kMask + 8 - n));
}
ALWAYS_INLINE __m256 masked_load(const float* p, int64_t n) {
  return _mm256_maskload_ps(p, mask_of(n));
}
ALWAYS_INLINE __m256d masked_load(const double* p, int64_t n) {
  return _mm256_maskload_pd(p, mask_of(2 * n));
}

// A block of eight rows, `stride` apart: column k of it goes to target + k * target_stride.
#define CHARRNN_FAST_TRANSPOSE
ALWAYS_INLINE void transpose_lanes(const float* source, int64_t stride, float* target,
                                   int64_t target_stride) {
  __m256 part[2][4];  // [i][m]: in its half q, column 4q + m of rows 4i to 4i + 3
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const float* p = source + 4 * i * stride;
    const __m256 a = _mm256_loadu_ps(p), b = _mm256_loadu_ps(p + stride);
    const __m256 c = _mm256_loadu_ps(p + 2 * stride), d = _mm256_loadu_ps(p + 3 * stride);
    const __m256 ab_low = _mm256_unpacklo_ps(a, b), ab_high = _mm256_unpackhi_ps(a, b);
    const __m256 cd_low = _mm256_unpacklo_ps(c, d), cd_high = _mm256_unpackhi_ps(c, d);
    part[i][0] = _mm256_shuffle_ps(ab_low, cd_low, 0x44);
    part[i][1] = _mm256_shuffle_ps(ab_low, cd_low, 0xEE);
    part[i][2] = _mm256_shuffle_ps(ab_high, cd_high, 0x44);
    part[i][3] = _mm256_shuffle_ps(ab_high, cd_high, 0xEE);
  }
#pragma GCC unroll 4
  for (int m = 0; m < 4; ++m) {
    float* q = target + m * target_stride;
    _mm256_storeu_ps(q, _mm256_permute2f128_ps(part[0][m], part[1][m], 0x20));
    _mm256_storeu_ps(q + 4 * target_stride, _mm256_permute2f128_ps(part[0][m], part[1][m], 0x31));
  }
}

}  // namespace
}  // namespace charrnn_fast
