// The numbers of a type in memory as the kernels see them: vectors of sums, and terms of products.
//
// This file serves the types that are summed in themselves; bfloat16-inl.h has the exception.
#pragma once

#include "vec-inl.h"

namespace charrnn_fast {
namespace {

// How numbers of a type in memory are multiplied and added up.
template <typename scalar>
struct Format {
  typedef scalar Sum;     // what products are summed in
  typedef scalar Packed;  // kTerms terms of one column of packed weights, side by side
  static constexpr int kTerms = 1;
};
template <typename scalar>
using SumOf = typename Format<scalar>::Sum;
template <typename scalar>
using PackedOf = typename Format<scalar>::Packed;
template <typename scalar>
constexpr int kTerms = Format<scalar>::kTerms;
// Rows of packed weights that hold `terms` terms.
template <typename scalar>
constexpr int64_t packed_rows(int64_t terms) {
  return (terms + kTerms<scalar> - 1) / kTerms<scalar>;
}

// A whole vector or its first n lanes; the others are zero.
template <typename scalar>
ALWAYS_INLINE Vec<SumOf<scalar>> load_lanes(const scalar* p, int64_t n) {
  return n == kLanes<scalar> ? load(p) : load_first(p, n);
}

template <typename scalar>
ALWAYS_INLINE void store_lanes(scalar* p, Vec<SumOf<scalar>> v, int64_t n) {
  if (n == kLanes<scalar>) {
    store(p, v);
  } else {
    store_first(p, v, n);
  }
}

template <typename scalar>
ALWAYS_INLINE SumOf<scalar> as_sum(scalar value) {
  return value;
}

// The number of `scalar` nearest to a value.
template <typename scalar>
ALWAYS_INLINE scalar rounded(double value) {
  return static_cast<scalar>(value);
}

// The terms of a row that one row of packed weights is multiplied with, in every lane.
template <typename scalar>
ALWAYS_INLINE Vec<PackedOf<scalar>> broadcast_terms(const scalar* row, int64_t packed_row, int) {
  return broadcast(row[packed_row]);
}

// Terms that lie along a row, as many as a vector holds or the first n; the others are zero.
template <typename scalar>
ALWAYS_INLINE Vec<PackedOf<scalar>> load_along(const scalar* p, int64_t n) {
  return load_lanes(p, n);
}

// The rows whose terms lie side by side in a packed row; null beyond the last one.
template <typename scalar>
struct RowsOfTerms {
  const scalar* row[kTerms<scalar>];
};
template <typename scalar, typename RowOf>
ALWAYS_INLINE RowsOfTerms<scalar> rows_of_terms(const RowOf& row, int64_t packed_row, int64_t K) {
  RowsOfTerms<scalar> rows;
  for (int64_t i = 0; i < kTerms<scalar>; ++i) {
    const int64_t k = packed_row * kTerms<scalar> + i;
    rows.row[i] = k < K ? row(k) : nullptr;
  }
  return rows;
}

// Their terms in the columns of a vector.
template <typename scalar>
ALWAYS_INLINE Vec<PackedOf<scalar>> load_terms(const RowsOfTerms<scalar>& rows, int64_t column,
                                               int64_t n) {
  return load_lanes(rows.row[0] + column, n);
}

// And in fewer columns, no more than kTileRows.
template <typename scalar>
ALWAYS_INLINE void pack_terms(const RowsOfTerms<scalar>& rows, int64_t column, int64_t n,
                              PackedOf<scalar>* target) {
  std::memcpy(target, rows.row[0] + column, n * sizeof(scalar));
}

}  // namespace
}  // namespace charrnn_fast

#ifdef CHARRNN_FAST_BFLOAT16
#include "bfloat16-inl.h"
#endif

#ifndef CHARRNN_FAST_PLUS_PRODUCT
namespace charrnn_fast {
namespace {

// sum + a b, in the long sums of a tile.
template <typename Sum, typename Factor>
ALWAYS_INLINE Sum plus_product(Sum sum, Factor a, Factor b) {
  return multiply_add(a, b, sum);
}

}  // namespace
}  // namespace charrnn_fast
#endif
