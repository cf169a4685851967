// The format of bfloat16 (see format-inl.h), for an ISA with dot products of pairs of them.
//
// Memory holds bfloat16, and every sum is a float, of two products at a time. Rounded to bfloat16,
// to nearest even, are the states (as y holds them and W_hh multiplies them), the deltas, and the
// final gradients. Denormals are flushed to zero, in products and in stores.
#pragma once

#include <immintrin.h>

#ifndef CHARRNN_FAST_VECTORS
#define CHARRNN_FAST_VECTORS "avx512-inl.h"  // parsed alone
#endif
#include "format-inl.h"
#include "rnn.h"

namespace charrnn_fast {
namespace {

// Two terms side by side, the first one in the lower half.
template <>
struct Format<bfloat16> {
  typedef float Sum;
  typedef uint32_t Packed;
  static constexpr int kTerms = 2;
};

ALWAYS_INLINE Vec<float> multiply_add(Vec<uint32_t> a, Vec<uint32_t> b, Vec<float> c) {
  return _mm512_dpbf16_ps(c, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}

ALWAYS_INLINE Vec<uint32_t> broadcast_terms(const bfloat16* row, int64_t packed_row, int terms) {
  int32_t two = 0;
  std::memcpy(&two, row + 2 * packed_row, terms * sizeof(*row));
  return reinterpret_cast<Vec<uint32_t>>(_mm512_set1_epi32(two));
}

ALWAYS_INLINE Vec<uint32_t> load_along(const bfloat16* p, int64_t n) {
  const __m512i bits =
      n == 32 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi16((uint32_t{1} << n) - 1, p);
  return reinterpret_cast<Vec<uint32_t>>(bits);
}

typedef uint16_t SixteenBits __attribute__((vector_size(32)));

ALWAYS_INLINE __mmask16 first_lanes(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }

// The bits of the first n numbers, each in the lower half of its lane; the other lanes are zero.
ALWAYS_INLINE Vec<uint32_t> load_bits(const bfloat16* p, int64_t n) {
  SixteenBits bits;
  if (n == 16) {
    std::memcpy(&bits, p, sizeof(bits));
  } else {
    bits = reinterpret_cast<SixteenBits>(_mm256_maskz_loadu_epi16(first_lanes(n), p));
  }
  return __builtin_convertvector(bits, Vec<uint32_t>);
}

ALWAYS_INLINE Vec<float> load_lanes(const bfloat16* p, int64_t n) {
  return bit_cast<Vec<float>>(load_bits(p, n) << 16);
}

ALWAYS_INLINE void store_lanes(bfloat16* p, Vec<float> v, int64_t n) {
  const __m256i bits = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v));
  if (n == 16) {
    std::memcpy(p, &bits, sizeof(bits));
  } else {
    _mm256_mask_storeu_epi16(p, first_lanes(n), bits);
  }
}

ALWAYS_INLINE float as_sum(bfloat16 value) {
  return bit_cast<float>(static_cast<uint32_t>(value.bits) << 16);
}

template <>
ALWAYS_INLINE bfloat16 rounded<bfloat16>(double value) {
  bfloat16 result;
  store_lanes(&result, Vec<float>{static_cast<float>(value)}, 1);
  return result;
}

ALWAYS_INLINE Vec<uint32_t> load_terms(const RowsOfTerms<bfloat16>& rows, int64_t column,
                                       int64_t n) {
  const Vec<uint32_t> low = load_bits(rows.row[0] + column, n);
  return rows.row[1] == nullptr ? low : low | load_bits(rows.row[1] + column, n) << 16;
}

ALWAYS_INLINE void pack_terms(const RowsOfTerms<bfloat16>& rows, int64_t column, int64_t n,
                              uint32_t* target) {
  static_assert(kTileRows <= 8);
  const auto lanes = static_cast<__mmask8>((1u << n) - 1);
  const __m128i low = _mm_maskz_loadu_epi16(lanes, rows.row[0] + column);
  const __m128i high = rows.row[1] == nullptr ? _mm_setzero_si128()
                                              : _mm_maskz_loadu_epi16(lanes, rows.row[1] + column);
  const __m256i two =
      _mm256_set_m128i(_mm_unpackhi_epi16(low, high), _mm_unpacklo_epi16(low, high));
  _mm256_mask_storeu_epi32(target, lanes, two);
}

// Transposes K columns of W, as the one of pack-inl.h does, to pairs.
inline void pack_transposed_rows(const bfloat16* source, int64_t ld, int64_t K, int64_t n,
                                 uint32_t* target, int64_t stride) {
  constexpr int64_t kLine = 16;  // pairs in a cache line of a row of W, used up before it is left
  const int64_t pairs = packed_rows<bfloat16>(K), whole = K / 2;
  const int64_t filled = (n + 15) / 16 * 16;
  int64_t done = 0, packed = 0;  // `done` columns are packed for `packed` pairs
  if (ld % 2 == 0) {             // a pair is moved as a float is: its bits stay what they are
    packed = whole / kLine * kLine;
    for (; done + 16 <= n; done += 16) {
      const float* rows = reinterpret_cast<const float*>(source + done * ld);
      float* columns = reinterpret_cast<float*>(target + done);
      for (int64_t k = 0; k < packed; k += kLine) {
        transpose_lanes(rows + k, ld / 2, columns + k * stride, stride);
      }
    }
  }
  for (int64_t line = 0; line < pairs; line += kLine) {
    const int64_t end = line + kLine < pairs ? line + kLine : pairs;
    for (int64_t j = line < packed ? done : 0; j < filled; ++j) {
      for (int64_t k = line; k < end; ++k) {
        uint32_t two = 0;
        if (j < n) std::memcpy(&two, source + j * ld + 2 * k, k < whole ? 4 : 2);
        target[k * stride + j] = two;
      }
    }
  }
}

// And to floats.
inline void pack_transposed_rows(const bfloat16* source, int64_t ld, int64_t K, int64_t n,
                                 float* target, int64_t stride) {
  const int64_t filled = (n + 15) / 16 * 16;
  for (int64_t k = 0; k < K; ++k) {
    for (int64_t j = 0; j < filled; ++j) {
      target[k * stride + j] = j < n ? as_sum(source[j * ld + k]) : 0;
    }
  }
}

}  // namespace
}  // namespace charrnn_fast
