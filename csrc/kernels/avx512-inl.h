// The vectors of AVX-512 (F, BW, DQ, VL): 32 registers of 16 floats.
#pragma once

#include <immintrin.h>

#include "isa-prologue.h"
#include "tanh-table-inl.h"

namespace charrnn_fast {
namespace {

constexpr int kVectorBytes = 64;
constexpr int kTileRows = 6;  // 6 rows x 4 vectors: 24 accumulators
constexpr int kTileVectors = 4;
constexpr int kTermsAtOnce = 1;  // of a product, in one round of its loop

ALWAYS_INLINE __m512 multiply_add(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
ALWAYS_INLINE __m512d multiply_add(__m512d a, __m512d b, __m512d c) {
  return _mm512_fmadd_pd(a, b, c);
}

// A mask of all lanes gives the instruction without a mask, whose header makes g++ 12 warn of a
// variable never set.
constexpr __mmask16 kAll = 0xFFFF;

// Of a NaN and a number the second operand.
#define CHARRNN_FAST_MINIMUM
ALWAYS_INLINE __m512 minimum(__m512 a, __m512 b) { return _mm512_maskz_min_ps(kAll, a, b); }
ALWAYS_INLINE __m512d minimum(__m512d a, __m512d b) { return _mm512_maskz_min_pd(0xFF, a, b); }
ALWAYS_INLINE __m512 maximum(__m512 a, __m512 b) { return _mm512_maskz_max_ps(kAll, a, b); }
ALWAYS_INLINE __m512d maximum(__m512d a, __m512d b) { return _mm512_maskz_max_pd(0xFF, a, b); }

#define CHARRNN_FAST_MASKED_LOAD
ALWAYS_INLINE __m512 masked_load(const float* p, int64_t n) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
}
ALWAYS_INLINE __m512d masked_load(const double* p, int64_t n) {
  return _mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << n) - 1), p);
}
#define CHARRNN_FAST_MASKED_STORE
ALWAYS_INLINE void masked_store(float* p, __m512 v, int64_t n) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), v);
}
ALWAYS_INLINE void masked_store(double* p, __m512d v, int64_t n) {
  _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << n) - 1), v);
}

// tanh by one of 32 polynomials, whose coefficients are looked up in registers: half the time of
// one with a division, and closer, within 1.5 ulp. The sums are paired, as the next step of a
// recurrence waits for the result.
#define CHARRNN_FAST_TANH
ALWAYS_INLINE __m512 tanh_by_pieces(__m512 x) {
  const __m512i sign = _mm512_set1_epi32(static_cast<int>(0x80000000u));
  const __m512 magnitude = _mm512_castsi512_ps(_mm512_castps_si512(x) & ~sign);
  // In this order a NaN stays, and whatever is looked up for it makes a NaN.
  const __m512 z = minimum(_mm512_set1_ps(kTanhSaturates), magnitude);
  const __m512i piece = _mm512_maskz_srli_epi32(
      kAll, _mm512_castps_si512(z + _mm512_set1_ps(kTanhOffset)), kTanhShift);
  const auto look_up = [&](const float* row) __attribute__((always_inline)) {
    return _mm512_permutex2var_ps(_mm512_load_ps(row), piece, _mm512_load_ps(row + 16));
  };
  const __m512 t = z - look_up(kTanhPieces[0]);
  const __m512 square = t * t;
  const __m512 low = multiply_add(t, look_up(kTanhPieces[2]), look_up(kTanhPieces[1]));
  const __m512 middle = multiply_add(t, look_up(kTanhPieces[4]), look_up(kTanhPieces[3]));
  const __m512 high = multiply_add(square, look_up(kTanhPieces[5]), middle);
  const __m512 y = multiply_add(square, high, low);
  // y | (sign & x)
  return _mm512_castsi512_ps(
      _mm512_ternarylogic_epi32(_mm512_castps_si512(y), _mm512_castps_si512(x), sign, 0xF8));
}

// The sums of the lanes of n <= 16 vectors, in the first n lanes: of each vector its halves are
// added, then the halves of that, and so on; and two vectors at once.
#define CHARRNN_FAST_SUMS_OF_LANES
template <int n>
ALWAYS_INLINE __m512 sums_of_lanes(const __m512* v) {
  // Four vectors to their quarters: in quarter q the sums of v[first + stride * q].
  const auto quarters = [&](int first, int stride) __attribute__((always_inline)) {
    __m512 half[2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const int at = first + 2 * i * stride;
      const __m512 a = at < n ? v[at] : __m512{}, b = at + stride < n ? v[at + stride] : __m512{};
      half[i] = _mm512_maskz_shuffle_f32x4(kAll, a, b, 0x44) +
                _mm512_maskz_shuffle_f32x4(kAll, a, b, 0xEE);
    }
    return _mm512_maskz_shuffle_f32x4(kAll, half[0], half[1], 0x88) +
           _mm512_maskz_shuffle_f32x4(kAll, half[0], half[1], 0xDD);
  };
  const auto pairs = [&](__m512 a, __m512 b) __attribute__((always_inline)) {
    return _mm512_maskz_shuffle_ps(kAll, a, b, 0x44) + _mm512_maskz_shuffle_ps(kAll, a, b, 0xEE);
  };
  // Lane 4q + p is that of v[4q + p]; what lies in the lanes from n on is not wanted.
  const __m512 low = pairs(quarters(0, 4), quarters(1, 4));
  const __m512 high = n > 2 ? pairs(quarters(2, 4), quarters(3, 4)) : low;
  return _mm512_maskz_shuffle_ps(kAll, low, high, 0x88) +
         _mm512_maskz_shuffle_ps(kAll, low, high, 0xDD);
}

// A block of sixteen rows, `stride` apart: column k of it goes to target + k * target_stride.
#define CHARRNN_FAST_TRANSPOSE
ALWAYS_INLINE void transpose_lanes(const float* source, int64_t stride, float* target,
                                   int64_t target_stride) {
  __m512 part[4][4];  // [i][m]: in its quarter q, column 4q + m of rows 4i to 4i + 3
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const float* p = source + 4 * i * stride;
    const __m512 a = _mm512_loadu_ps(p), b = _mm512_loadu_ps(p + stride);
    const __m512 c = _mm512_loadu_ps(p + 2 * stride), d = _mm512_loadu_ps(p + 3 * stride);
    const __m512 ab_low = _mm512_maskz_unpacklo_ps(kAll, a, b),
                 ab_high = _mm512_maskz_unpackhi_ps(kAll, a, b);
    const __m512 cd_low = _mm512_maskz_unpacklo_ps(kAll, c, d),
                 cd_high = _mm512_maskz_unpackhi_ps(kAll, c, d);
    part[i][0] = _mm512_maskz_shuffle_ps(kAll, ab_low, cd_low, 0x44);
    part[i][1] = _mm512_maskz_shuffle_ps(kAll, ab_low, cd_low, 0xEE);
    part[i][2] = _mm512_maskz_shuffle_ps(kAll, ab_high, cd_high, 0x44);
    part[i][3] = _mm512_maskz_shuffle_ps(kAll, ab_high, cd_high, 0xEE);
  }
#pragma GCC unroll 4
  for (int m = 0; m < 4; ++m) {
    const __m512 even = _mm512_maskz_shuffle_f32x4(kAll, part[0][m], part[1][m], 0x88);
    const __m512 odd = _mm512_maskz_shuffle_f32x4(kAll, part[0][m], part[1][m], 0xDD);
    const __m512 even2 = _mm512_maskz_shuffle_f32x4(kAll, part[2][m], part[3][m], 0x88);
    const __m512 odd2 = _mm512_maskz_shuffle_f32x4(kAll, part[2][m], part[3][m], 0xDD);
    float* q = target + m * target_stride;
    _mm512_storeu_ps(q, _mm512_maskz_shuffle_f32x4(kAll, even, even2, 0x88));
    _mm512_storeu_ps(q + 4 * target_stride, _mm512_maskz_shuffle_f32x4(kAll, odd, odd2, 0x88));
    _mm512_storeu_ps(q + 8 * target_stride, _mm512_maskz_shuffle_f32x4(kAll, even, even2, 0xDD));
    _mm512_storeu_ps(q + 12 * target_stride, _mm512_maskz_shuffle_f32x4(kAll, odd, odd2, 0xDD));
  }
}

}  // namespace
}  // namespace charrnn_fast
