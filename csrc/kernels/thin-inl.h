// Products of few rows with weights that nothing else needs packed: a b, with b read where it lies.
//
// Determinism: the chains over k are those of a tile of packed weights (tile-inl.h).
#pragma once

#include "format-inl.h"
#include "sequences-inl.h"
#include "tile-inl.h"

namespace charrnn_fast {
namespace {

// The most rows for which packing b takes longer than reading it once for every four rows.
template <typename scalar>
constexpr int64_t kThinRows = 16 / kTerms<scalar>;

// Sums in registers: a power of two.
constexpr int kThinSums = kTileRows * kTileVectors >= 16 ? 16 : 8;

template <typename scalar>
struct ThinArgs {
  const scalar* const* a;  // rows of K
  const scalar* b;         // [K, columns]
  scalar* const* out;      // rows of columns
  int64_t K, columns;
  int64_t first_row;                 // of b, for the first term; after the last one follows row 0
  const SumOf<scalar>* const* init;  // rows that out begins with; or null
};

// The terms of some packed rows, of R rows, from first_row on, and P vectors of columns. The first
// ones begin the sums, the others are added to out.
template <int R, int P, typename scalar>
__attribute__((noinline)) void thin_tile(const ThinArgs<scalar>& args, int64_t first_row,
                                         Range packed, int64_t column) {
  using Sum = SumOf<scalar>;
  constexpr int L = kLanes<Sum>;
  const int64_t columns = args.columns;
  const int64_t left = args.columns - column - (P - 1) * L;
  const int64_t last_lanes = left < L ? left : L;
  // Branch-free, and the product is stepped from k to k.
  const scalar* const first_of_b = args.b + args.first_row * args.columns;
  const int64_t before_row_0 = args.K - args.first_row, all_of_b = args.K * args.columns;
  const auto row_of_b = [=](int64_t k) {
    return first_of_b + (k * columns - (k < before_row_0 ? 0 : all_of_b));
  };
  Vec<Sum> sum[R * P];
#pragma GCC unroll 16
  for (int i = 0; i < R * P; ++i) sum[i] = Vec<Sum>{};
  const auto multiply = [&](int64_t k, int n) __attribute__((always_inline)) {
    const auto of_terms = rows_of_terms<scalar>(row_of_b, k, args.K);
    Vec<PackedOf<scalar>> a[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) a[r] = broadcast_terms(args.a[first_row + r], k, n);
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) {
      const auto b = load_terms(of_terms, column + p * L, p < P - 1 ? L : last_lanes);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sum[r * P + p] = multiply_add(a[r], b, sum[r * P + p]);
    }
  };
  const int64_t whole = args.K / kTerms<scalar>;
  int64_t k = packed.first;
  for (; k < packed.last && k < whole; ++k) multiply(k, kTerms<scalar>);
  if (k < packed.last) multiply(k, 1);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 16
    for (int p = 0; p < P; ++p) {
      const int64_t lanes = p < P - 1 ? L : last_lanes;
      scalar* out = args.out[first_row + r] + column + p * L;
      Vec<Sum> total = sum[r * P + p];
      if (packed.first > 0) {
        total = load_lanes(out, lanes) + total;
      } else if (args.init != nullptr) {
        total = load_lanes(args.init[first_row + r] + column + p * L, lanes) + total;
      }
      store_lanes(out, total, lanes);
    }
  }
}

// All columns in a range of vectors.
template <int R, int P, typename scalar>
void thin_rows(const ThinArgs<scalar>& args, int64_t first_row, Range packed, Range vectors) {
  constexpr int L = kLanes<SumOf<scalar>>;
  for (; vectors.first + P <= vectors.last; vectors.first += P) {
    thin_tile<R, P>(args, first_row, packed, vectors.first * L);
  }
  if constexpr (P > 1) thin_rows<R, P / 2>(args, first_row, packed, vectors);
}

// The product of any number of rows; a team divides the columns.
template <typename scalar>
void multiply_thin(const ThinArgs<scalar>& args, int64_t rows, const Team& team) {
  constexpr int64_t L = kLanes<SumOf<scalar>>;
  const Range vectors = share((args.columns + L - 1) / L, team);
  const int64_t count = packed_rows<scalar>(args.K);
  for (Range packed = {0, 0}; packed.first < count; packed.first = packed.last) {
    const int64_t left = count - packed.first;
    packed.last = packed.first + (left < kChainTerms<scalar> ? left : kChainTerms<scalar>);
    int64_t row = 0;
    for (; row + 4 <= rows; row += 4) thin_rows<4, kThinSums / 4>(args, row, packed, vectors);
    if (row + 2 <= rows) {
      thin_rows<2, kThinSums / 2>(args, row, packed, vectors);
      row += 2;
    }
    if (row < rows) thin_rows<1, kThinSums>(args, row, packed, vectors);
  }
}

}  // namespace
}  // namespace charrnn_fast
