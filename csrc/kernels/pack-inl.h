// The packing of a product's operands.
#pragma once

#include "format-inl.h"
#include "tile-inl.h"

namespace charrnn_fast {
namespace {

// Moves a block of kBlock x kBlock scalars from rows `source_stride` apart to columns.
template <typename scalar>
struct Transpose {
  static constexpr int kBlock = 1;
  static ALWAYS_INLINE void run(const scalar* source, int64_t, scalar* target, int64_t) {
    *target = *source;
  }
};

template <>
struct Transpose<float> {
  static constexpr int kBlock = 4;
  static ALWAYS_INLINE void run(const float* source, int64_t source_stride, float* target,
                                int64_t target_stride) {
    typedef float Four __attribute__((vector_size(16)));
    Four a, b, c, d;
    std::memcpy(&a, source, 16);
    std::memcpy(&b, source + source_stride, 16);
    std::memcpy(&c, source + 2 * source_stride, 16);
    std::memcpy(&d, source + 3 * source_stride, 16);
    const Four ab_low = SHUFFLE4(a, b, 0, 4, 1, 5), ab_high = SHUFFLE4(a, b, 2, 6, 3, 7);
    const Four cd_low = SHUFFLE4(c, d, 0, 4, 1, 5), cd_high = SHUFFLE4(c, d, 2, 6, 3, 7);
    a = SHUFFLE4(ab_low, cd_low, 0, 1, 4, 5);
    b = SHUFFLE4(ab_low, cd_low, 2, 3, 6, 7);
    c = SHUFFLE4(ab_high, cd_high, 0, 1, 4, 5);
    d = SHUFFLE4(ab_high, cd_high, 2, 3, 6, 7);
    std::memcpy(target, &a, 16);
    std::memcpy(target + target_stride, &b, 16);
    std::memcpy(target + 2 * target_stride, &c, 16);
    std::memcpy(target + 3 * target_stride, &d, 16);
  }
};

// Transposes K columns of W, whose rows lie ld apart: `source` is the first of n rows. The result
// is K rows, `stride` apart, filled up to whole vectors with zeros.
template <typename scalar>
void pack_transposed_rows(const scalar* source, int64_t ld, int64_t K, int64_t n, scalar* target,
                          int64_t stride) {
  constexpr int64_t kBlock = Transpose<scalar>::kBlock;
  constexpr int64_t kLine =
      64 / sizeof(scalar);  // a cache line of a row of W is used up before it is left
  const int64_t filled = (n + kLanes<scalar> - 1) / kLanes<scalar> * kLanes<scalar>;
  const int64_t whole = n / kBlock * kBlock;
  int64_t done = 0, packed = 0;  // `done` columns are packed for k < `packed`
#ifdef CHARRNN_FAST_TRANSPOSE
  if constexpr (sizeof(scalar) == 4) {
    constexpr int64_t L = kLanes<scalar>;
    packed = K / kLine * kLine;
    for (; done + L <= n; done += L) {
      for (int64_t k = 0; k < packed; k += L) {
        transpose_lanes(source + done * ld + k, ld, target + k * stride + done, stride);
      }
    }
  }
#endif
  // Where all columns are packed, those lines are not gone through once more.
  for (int64_t line = done == filled ? packed : 0; line < K; line += kLine) {
    const int64_t end = line + kLine < K ? line + kLine : K;
    for (int64_t j = line < packed ? done : 0; j < whole; j += kBlock) {
      int64_t k = line;
      for (; k + kBlock <= end; k += kBlock) {
        Transpose<scalar>::run(source + j * ld + k, ld, target + k * stride + j, stride);
      }
      for (; k < end; ++k) {
        for (int64_t i = j; i < j + kBlock; ++i) target[k * stride + i] = source[i * ld + k];
      }
    }
    for (int64_t k = line; k < end; ++k) {
      for (int64_t j = whole; j < n; ++j) target[k * stride + j] = source[j * ld + k];
      for (int64_t j = n; j < filled; ++j) target[k * stride + j] = 0;
    }
  }
}

// Columns of W that are packed for one gate after the other, so that a line of a panel stays in L1
// until all its gates are there.
constexpr int64_t kPackedAtOnce = 64;

// Packs W, [gates * columns, K] as PyTorch keeps weights, in some panels of the product a W': each
// is [packed_rows(K)][width] vectors. block(g) is the block of rows of W that gate g of a panel
// takes.
template <typename scalar, typename BlockOf>
void pack_transposed(const scalar* W, int64_t K, const Panels<SumOf<scalar>>& panels,
                     int64_t first_panel, int64_t last_panel, PackedOf<scalar>* packed,
                     const BlockOf& block) {
  constexpr int L = kLanes<PackedOf<scalar>>;
  for (int64_t p = first_panel; p < last_panel; ++p) {
    PackedOf<scalar>* const panel = packed + packed_place<scalar>(panels, p, K);
    const int64_t stride = panels.width(p) * L;
    for (int64_t k = 0; k < K; k += kPackedAtOnce) {
      const int64_t terms = K - k < kPackedAtOnce ? K - k : kPackedAtOnce;
      for (int g = 0; g < panels.gates; ++g) {
        const int64_t row = block(g) * panels.columns + panels.first_column(p);
        pack_transposed_rows(W + row * K + k, K, terms, panels.used_columns(p),
                             panel + k / kTerms<scalar> * stride + g * L, stride);
      }
    }
  }
}
template <typename scalar>
void pack_transposed(const scalar* W, int64_t K, const Panels<SumOf<scalar>>& panels,
                     int64_t first_panel, int64_t last_panel, PackedOf<scalar>* packed) {
  pack_transposed(W, K, panels, first_panel, last_panel, packed, [](int g) { return g; });
}

// Packs K rows of `columns` for one panel of the product a b; row(k) finds them. The result is
// [packed_rows(K)][width] vectors.
template <typename scalar, typename RowOf>
ALWAYS_INLINE void pack_rows(const RowOf& row, int64_t K, const Panels<SumOf<scalar>>& panels,
                             int64_t panel, PackedOf<scalar>* target) {
  constexpr int L = kLanes<PackedOf<scalar>>;
  const int width = panels.width(panel);
  const int64_t last = panels.used_columns(panel) - (width - 1) * L;
  const int64_t first_column = panels.first_column(panel);
  for (int64_t k = 0; k < packed_rows<scalar>(K); ++k) {
    const auto of_terms = rows_of_terms<scalar>(row, k, K);
    for (int p = 0; p < width - 1; ++p) {
      store(target + p * L, load_terms(of_terms, first_column + p * L, L));
    }
    target += (width - 1) * L;
    store(target, load_terms(of_terms, first_column + (width - 1) * L, last));
    target += L;
  }
}

}  // namespace
}  // namespace charrnn_fast
