// Forward of sequences of one step. They use each weight once a row: too seldom for packing it. The
// terms of a sum lie in the lanes of a vector instead, as the rows of W do in memory.
//
// Determinism: a sequence of one step is always computed here, whatever the rest of the batch and
// the number of threads. The sums of longer sequences run in another order.
#pragma once

#include "cells-inl.h"
#include "format-inl.h"
#include "sequences-inl.h"

namespace charrnn_fast {
namespace {

template <typename scalar>
struct FewTraits {
  typedef scalar type __attribute__((vector_size(16)));
};
template <typename scalar>
using Few = typename FewTraits<scalar>::type;
template <typename scalar>
constexpr int kFew = 16 / static_cast<int>(sizeof(scalar));

// Halves of a vector added until so few lanes are left.
template <typename scalar, int bytes = kVectorBytes, typename V>
ALWAYS_INLINE Few<scalar> folded(V v) {
  if constexpr (bytes == 16) {
    return v;
  } else {
    typedef scalar Half __attribute__((vector_size(bytes / 2)));
    struct Halves {
      Half low, high;
    };
    const auto halves = bit_cast<Halves>(v);
    return folded<scalar, bytes / 2>(halves.low + halves.high);
  }
}

// The sum of the lanes of each of kFew vectors.
ALWAYS_INLINE Few<float> sums_of_few(const Vec<float>* v) {
  const Few<float> a = folded<float>(v[0]), b = folded<float>(v[1]);
  const Few<float> c = folded<float>(v[2]), d = folded<float>(v[3]);
  const Few<float> ab = SHUFFLE4(a, b, 0, 4, 1, 5) + SHUFFLE4(a, b, 2, 6, 3, 7);
  const Few<float> cd = SHUFFLE4(c, d, 0, 4, 1, 5) + SHUFFLE4(c, d, 2, 6, 3, 7);
  return SHUFFLE4(ab, cd, 0, 1, 4, 5) + SHUFFLE4(ab, cd, 2, 3, 6, 7);
}
ALWAYS_INLINE Few<double> sums_of_few(const Vec<double>* v) {
  const Few<double> a = folded<double>(v[0]), b = folded<double>(v[1]);
  return Few<double>{a[0], b[0]} + Few<double>{a[1], b[1]};
}

// The sum of the lanes of each of n vectors, all in the same order. out has room for whole vectors.
template <int n, typename Sum>
ALWAYS_INLINE void store_sums_of_lanes(const Vec<Sum>* v, Sum* out) {
#ifdef CHARRNN_FAST_SUMS_OF_LANES
  if constexpr (sizeof(Sum) == 4) {
    constexpr int L = kLanes<Sum>;
    store(out, sums_of_lanes<(n < L ? n : L)>(v));
    if constexpr (n > L) store_sums_of_lanes<n - L, Sum>(v + L, out + L);
    return;
  }
#endif
  constexpr int F = kFew<Sum>;
#pragma GCC unroll 16
  for (int i = 0; i < n; i += F) {
    Vec<Sum> few[F];
#pragma GCC unroll 4
    for (int j = 0; j < F; ++j) few[j] = i + j < n ? v[i + j] : Vec<Sum>{};
    const Few<Sum> sums = sums_of_few(few);
    std::memcpy(out + i, &sums, sizeof(sums));
  }
}

// Columns of a tile, and its rows, which fill as many registers with sums as a tile of tile-inl.h.
// A row alone wants more columns, as a core wants about eight chains of multiply-adds at once.
constexpr int kOneStepColumns = 4;
constexpr int kOneStepRows = kTileRows * kTileVectors / kOneStepColumns;
constexpr int kColumnsOfOneRow = 8;

// Rows and columns that are computed together, if the cell has one sum.
constexpr int64_t kOneStepBlock = 96;
constexpr int64_t kOneStepWidth = 16 * kOneStepColumns;

// Terms of a sum that are added at once, so that those columns' weights stay in L1 while the rows
// pass by.
template <typename scalar>
constexpr int64_t kOneStepTerms = 2048 / sizeof(scalar);

// K terms cut into pieces as even as possible.
template <typename scalar>
struct Pieces {
  int64_t K, count, size;

  explicit Pieces(int64_t terms)
      : K(terms), count((K + kOneStepTerms<scalar> - 1) / kOneStepTerms<scalar>), size(0) {
    constexpr int64_t kLine = 64 / sizeof(scalar);
    if (count > 0) size = (K + count * kLine - 1) / (count * kLine) * kLine;
  }
  Range operator[](int64_t i) const {
    if (i < 0 || i >= count) return {0, 0};
    return {i * size, (i + 1) * size < K ? (i + 1) * size : K};
  }
};

// Some terms of some columns of some rows: sums = bias + x W_ih' + h W_hh', or with a column of
// W_ih for x.
template <typename scalar>
struct OneStep {
  const scalar* const* x;  // rows of I; null when ids are given
  const int64_t* ids;      // of each row
  const scalar* const* h;  // rows of H; null: zeros
  SumOf<scalar>* const* sums;
  const scalar *W_ih = nullptr, *W_hh = nullptr;  // rows of the first column and those after it
  int64_t I, H;
  Range of_x = {0, 0}, of_h = {0, 0};   // the terms
  const SumOf<scalar>* bias = nullptr;  // of the first column and those after it; null: in sums
  int64_t column = 0;                   // of sums
};

// The sums of R rows, from first_row on, and C columns. Their initial values are added at the end:
// a chain that began with a large one would round every term to its precision.
template <int R, int C, typename scalar>
__attribute__((noinline)) void one_step_tile(const OneStep<scalar>& args, int64_t first_row) {
  using Sum = SumOf<scalar>;
  constexpr int64_t L = kLanes<scalar>;
  Vec<Sum> sum[R * C];
#pragma GCC unroll 32
  for (int i = 0; i < R * C; ++i) sum[i] = Vec<Sum>{};
  const auto add_terms = [&](const scalar* const* rows, const scalar* W, int64_t K,
                             Range terms) __attribute__((always_inline)) {
    // Of the next columns' weights each tile prefetches a row, as the first one to read them would
    // have to wait for all. An address, as there may be none; a prefetch beyond memory does
    // nothing.
    constexpr bool kLooksAhead = R == kOneStepRows && C == kOneStepColumns;
    const auto ahead =
        reinterpret_cast<uintptr_t>(W) + (C + first_row / R % C) * K * sizeof(scalar);
    const scalar *a[R], *b[C];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) a[r] = rows[first_row + r];
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) b[c] = W + c * K;
    const auto multiply = [&](int64_t k, int64_t lanes) __attribute__((always_inline)) {
      Vec<PackedOf<scalar>> factor[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) factor[r] = load_along(a[r] + k, lanes);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) {
        const Vec<PackedOf<scalar>> weight = load_along(b[c] + k, lanes);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          sum[r * C + c] = multiply_add(factor[r], weight, sum[r * C + c]);
        }
      }
    };
    int64_t k = terms.first;
    for (; k + L <= terms.last; k += L) {
      if constexpr (kLooksAhead) {
        __builtin_prefetch(reinterpret_cast<const void*>(ahead + k * sizeof(scalar)), 0, 2);
      }
      multiply(k, L);
    }
    if (k < terms.last) multiply(k, terms.last - k);
  };
  if (args.of_x.last > 0) add_terms(args.x, args.W_ih, args.I, args.of_x);
  if (args.of_h.last > 0) add_terms(args.h, args.W_hh, args.H, args.of_h);

  Sum out[R * C + kLanes<Sum>];
  store_sums_of_lanes<R * C, Sum>(sum, out);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    Sum* const to = args.sums[first_row + r] + args.column;
    Sum initial[C];
    std::memcpy(initial, args.bias != nullptr ? args.bias : to, sizeof(initial));
    if (args.bias != nullptr && args.ids != nullptr) {
      const scalar* column = args.W_ih + args.ids[first_row + r];
      for (int c = 0; c < C; ++c) initial[c] += as_sum(column[c * args.I]);
    }
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) out[r * C + c] += initial[c];
    std::memcpy(to, out + r * C, sizeof(initial));
  }
}

// The sums of all rows, C columns.
template <int C, typename scalar>
void one_step_columns(const OneStep<scalar>& args, int64_t rows) {
  constexpr int R = kOneStepRows;
  int64_t row = 0;
  if constexpr (C <= kOneStepColumns) {
    for (; row + R <= rows; row += R) one_step_tile<R, C>(args, row);
    if constexpr (R > 4) {
      for (; row + 4 <= rows; row += 4) one_step_tile<4, C>(args, row);
    }
    if constexpr (R > 2) {
      for (; row + 2 <= rows; row += 2) one_step_tile<2, C>(args, row);
    }
  }
  for (; row < rows; ++row) one_step_tile<1, C>(args, row);
}

// The biases of one sum of units [first, last), zero beyond the last one that exists.
template <typename CellType, typename scalar>
void add_biases(const ForwardArgs<scalar>& args, int sum, int64_t first, int64_t last,
                SumOf<scalar>* bias) {
  const int64_t of_x = input_block<CellType>(sum) * args.H;
  const int64_t of_h = (sum - kFirstOfState<CellType>)*args.H;
  for (int64_t j = first; j < last; ++j) {
    SumOf<scalar> b = 0;
    if (j < args.H && args.b_ih != nullptr) {
      if (sum < kGates<CellType>) b += as_sum(args.b_ih[of_x + j]);
      if (sum >= kFirstOfState<CellType>) b += as_sum(args.b_hh[of_h + j]);
    }
    bias[j - first] = b;
  }
}

// The sums of some units of some rows, of x and h as OneStep has them, in columns of rows of sums.
template <typename CellType, typename scalar>
void one_step_sums(const ForwardArgs<scalar>& args, OneStep<scalar> step, int sum, int64_t from,
                   int64_t units, int64_t rows, int64_t first_column) {
  using Sum = SumOf<scalar>;
  constexpr int C = kOneStepColumns;
  const bool of_input = sum < kGates<CellType>, of_state = sum >= kFirstOfState<CellType>;
  const scalar* W_ih = args.W_ih + (input_block<CellType>(sum) * args.H + from) * args.I;
  const scalar* W_hh = args.W_hh + ((sum - kFirstOfState<CellType>)*args.H + from) * args.H;
  if (!of_input) step.x = nullptr, step.ids = nullptr;
  const Pieces<scalar> of_x(step.x != nullptr ? args.I : 0);
  const Pieces<scalar> of_h(of_state && step.h != nullptr ? args.H : 0);
  // The last piece of x and the first one of h are added at once.
  const int64_t of_x_alone = of_x.count > 1 ? of_x.count - 1 : 0;
  const int64_t sweeps = of_x_alone + (of_h.count > 1 ? of_h.count : 1);
  for (int64_t column = 0; column < units;) {
    const int64_t left = units - column;
    const int64_t width = rows == 1 && left >= kColumnsOfOneRow ? kColumnsOfOneRow
                          : left >= C                           ? C
                                                                : 1;
    Sum bias[kColumnsOfOneRow] = {};
    add_biases<CellType>(args, sum, from + column, from + column + width, bias);
    step.column = first_column + column;
    step.bias = bias;
    step.W_ih = of_input ? W_ih + column * args.I : nullptr;
    step.W_hh = of_state ? W_hh + column * args.H : nullptr;
    for (int64_t i = 0; i < sweeps; ++i) {
      step.of_x = of_x[i];
      step.of_h = of_h[i - of_x_alone];
      if (width == kColumnsOfOneRow) {
        one_step_columns<kColumnsOfOneRow>(step, rows);
      } else if (width == C) {
        one_step_columns<C>(step, rows);
      } else {
        one_step_columns<1>(step, rows);
      }
      step.bias = nullptr;
    }
    column += width;
  }
}

// Slots [slots.first, slots.last), of one step each, all from a state or all from zeros. Members
// divide the units, however the call is split: there is no barrier.
template <typename CellType, typename scalar>
void forward_one_step(const ForwardArgs<scalar>& args, Range slots, bool from_state,
                      const Team& team) {
  using Sum = SumOf<scalar>;
  constexpr int L = kLanes<Sum>;
  constexpr int64_t kLine = 64 / sizeof(scalar);
  // Units at once: whole tiles and whole vectors of them.
  constexpr int64_t kUnits = kSums<CellType> == 1 ? kOneStepWidth : kOneStepWidth / 2;
  static_assert(kUnits % L == 0);
  constexpr int64_t kWidth = kUnits * kSums<CellType>;
  const Range lines = share((args.H + kLine - 1) / kLine, team);
  const int64_t first = lines.first * kLine;
  const int64_t last = lines.last * kLine < args.H ? lines.last * kLine : args.H;
  if (first >= last) return;
  const scalar *x[kOneStepBlock], *h[kOneStepBlock];
  int64_t ids[kOneStepBlock];
  Sum buffer[kOneStepBlock][kWidth + L];
  Sum* sums[kOneStepBlock];
  for (int64_t i = 0; i < kOneStepBlock; ++i) sums[i] = buffer[i];
  const OneStep<scalar> step = {.x = args.ids == nullptr ? x : nullptr,
                                .ids = args.ids != nullptr ? ids : nullptr,
                                .h = from_state ? h : nullptr,
                                .sums = sums,
                                .I = args.I,
                                .H = args.H};
  const int64_t n = slots.last - slots.first;
  const int64_t blocks = (n + kOneStepBlock - 1) / kOneStepBlock;
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t begin = slots.first + b * n / blocks;
    const int64_t count = slots.first + (b + 1) * n / blocks - begin;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = row_of(args.seq, 0, begin + i);
      if (args.ids == nullptr) {
        x[i] = args.x + row * args.ldx;
      } else {
        ids[i] = args.ids[row];
      }
      if (from_state) h[i] = args.h0 + start_row_of(args.seq, begin + i) * args.H;
    }
    for (int64_t from = first; from < last; from += kUnits) {
      const int64_t units = last - from < kUnits ? last - from : kUnits;
      for (int s = 0; s < kSums<CellType>; ++s) {
        one_step_sums<CellType>(args, step, s, from, units, count, s * kUnits);
      }
      for (int64_t i = 0; i < count; ++i) {
        const int64_t row = row_of(args.seq, 0, begin + i);
        const int64_t start = start_row_of(args.seq, begin + i);
        const int64_t end = end_row_of(args.seq, begin + i);
        const ForwardRow<scalar> out = {
            .y = args.y + row * args.ldy,
            .saved = args.saved != nullptr ? args.saved + row * CellType::kSizes.saved * args.H
                                           : nullptr,
            .cells = args.cells != nullptr ? args.cells + row * args.ldcells : nullptr};
        for (int64_t j = 0; j < units; j += L) {
          const int64_t lanes = units - j < L ? units - j : L;
          Vec<Sum> of_unit[kSums<CellType>], h_before = {};
          Sum c[L];
#pragma GCC unroll 4
          for (int s = 0; s < kSums<CellType>; ++s) {
            of_unit[s] = load_lanes(buffer[i] + s * kUnits + j, lanes);
          }
          if constexpr (kReadsH<CellType>) {
            if (from_state) h_before = load_lanes(h[i] + from + j, lanes);
          }
          if constexpr (kHasState<CellType>) {
            const scalar* c0 = state_or<scalar>(args.c0, start, args.H, nullptr);
            store(c, c0 != nullptr ? load_lanes(c0 + from + j, lanes) : Vec<Sum>{});
          }
          forward_units<CellType>(of_unit, h_before, out, c, from + j, lanes, args.H);
          if constexpr (kHasState<CellType>) {
            if (end >= 0) store_lanes(args.c_n + end * args.H + from + j, load(c), lanes);
          }
        }
        if (end < 0) continue;
        std::memcpy(args.h_n + end * args.H + from, out.y + from, units * sizeof(scalar));
      }
    }
  }
}

template <typename CellType, typename scalar>
void forward_one_step(const ForwardArgs<scalar>& args, Range slots, const Team& team) {
  const auto from_state = [&](int64_t slot) {
    return args.h0 != nullptr && start_row_of(args.seq, slot) >= 0;
  };
  while (slots.first < slots.last) {
    const bool state = from_state(slots.first);
    int64_t end = slots.first + 1;
    if (args.seq.start_row == nullptr) end = slots.last;
    while (end < slots.last && from_state(end) == state) ++end;
    forward_one_step<CellType>(args, {slots.first, end}, state, team);
    slots.first = end;
  }
}

}  // namespace
}  // namespace charrnn_fast
