// The epilogues of a tile, a row at a time, in registers.
//
// An epilogue says where the accumulators begin (init), what of its operands to prefetch while the
// product is summed, how many cache lines of a row that is, and what to store. `total` holds the P
// vectors of one row of the tile.
#pragma once

#include "cells-inl.h"
#include "format-inl.h"

namespace charrnn_fast {
namespace {

// Cache lines of n vectors side by side, and their prefetching.
constexpr int kLineVectors = kVectorBytes < 64 ? 64 / kVectorBytes : 1;
constexpr int lines_of(int n) { return (n + kLineVectors - 1) / kLineVectors; }
template <int n, int to_write, typename Element>
ALWAYS_INLINE void prefetch_vectors(const Element* p, int64_t lanes) {
#pragma GCC unroll 8
  for (int i = 0; i < n; i += kLineVectors) __builtin_prefetch(p + i * lanes, to_write);
}

// out = init + a b. With `sums`, rows of init and out hold that many sums of every unit, vector by
// vector, in whole vectors: a panel of all gates fills the first of them.
template <int sums = 0>
struct Store {
  static constexpr bool kRecurrence = false;
  static constexpr bool kHalves = false;     // finish() is begin() and end()
  static constexpr bool kPadded = sums > 0;  // rows of init are whole vectors
  static constexpr bool kInitFirst = false;  // a chain begins with init
  static constexpr bool kPrefetchesAtOnce = false;
  // Where column c of the panels lies: in init at kInitScale * c + kInitShift vectors.
  static constexpr int kInitScale = sums > 0 ? sums : 1, kInitShift = 0;
  static constexpr int kOutScale = kInitScale;
  static constexpr bool kAbreast = sums == 0;  // a tile may take several panels side by side
  static constexpr int kOfUnit = 1;            // vectors of a panel for one of units
  // Whether there are tiles of P vectors.
  template <int P>
  static constexpr bool takes() {
    return sums == 1 ? P <= kTileVectors : sums > 1 ? P > 2 : true;
  }

  template <int P, typename Args>
  static ALWAYS_INLINE int lines(const Args&) {
    return 2 * lines_of(P);
  }
  template <int P, typename Args>
  static ALWAYS_INLINE void prefetch(const Args& args, int64_t row, int64_t) {
    constexpr int L = Args::kLanesOfSum;
    prefetch_vectors<P, 0>(args.init[row] + args.init_column, L);
    prefetch_vectors<P, 1>(args.out[row] + args.column, L);
  }

  template <int P, typename Args, typename V>
  static ALWAYS_INLINE void finish(const Args& args, int64_t row, int64_t, const V* total) {
    constexpr int L = Args::kLanesOfSum;
    auto* to = args.out[row] + args.column;
    const int64_t last_lanes = args.columns - (P - 1) * L;
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) store_lanes(to + p * L, total[p], p < P - 1 ? L : last_lanes);
  }
};

// A step of a cell: the sums of its units from those of the input, which init points at, and from
// the product of h before with W_hh'.
template <typename CellType>
struct ForwardOf {
  static constexpr bool kRecurrence = true;
  static constexpr bool kHalves = kGates<CellType> > 1;
  // Terms far below init would be lost one by one, at every step of a gated cell's long memory.
  static constexpr bool kInitFirst = kSums<CellType> == 1;
  static constexpr bool kPadded = true;
  static constexpr bool kPrefetchesAtOnce = false;
  static constexpr int kInitScale = kSums<CellType>, kInitShift = kFirstOfState<CellType>;
  static constexpr int kOutScale = 1;
  static constexpr bool kAbreast = true;
  static constexpr int kOfUnit = kGates<CellType>;
  template <int P>
  static constexpr bool takes() {
    return kGates<CellType> == 1 ? P <= kTileVectors : P == kGates<CellType>;
  }

  template <int P, typename Args>
  static ALWAYS_INLINE int lines(const Args& args) {
    constexpr int kOfTraining = kSavedGates<CellType> + kHasState<CellType> + 1;
    const bool training = CellType::kSizes.saved > 0 && args.saved != nullptr;
    return lines_of(P) + (training ? kOfTraining : 0);
  }
  template <int P, typename Args>
  static ALWAYS_INLINE void prefetch(const Args& args, int64_t row, int64_t s) {
    constexpr int L = Args::kLanesOfSum;
    prefetch_vectors<P, 0>(args.init[row] + s * args.init_step + args.init_column, L);
    if constexpr (CellType::kSizes.saved > 0) {
      if (args.saved == nullptr) return;
      const auto place = saved_place<CellType, typename Args::Sum>(args.column, args.H);
      auto* saved = args.saved[row] + s * args.saved_step;
#pragma GCC unroll 8
      for (int g = 0; g < kSavedGates<CellType>; ++g) {
        __builtin_prefetch(saved + place.first + g * place.stride, 1);
      }
      if constexpr (kHasState<CellType>) {
        __builtin_prefetch(saved + kSavedGates<CellType> * args.H + args.column, 1);
      }
      __builtin_prefetch(args.out[row] + s * args.out_step + args.column, 1);
    }
  }

  template <typename Args>
  static ALWAYS_INLINE ForwardRow<typename Args::Scalar> row_of_step(const Args& args, int64_t row,
                                                                     int64_t s) {
    ForwardRow<typename Args::Scalar> at = {
        .y = args.out[row] + s * args.out_step, .saved = nullptr, .cells = nullptr};
    if constexpr (kHasState<CellType>) {
      if (args.cells != nullptr) at.cells = args.cells[row] + s * args.cells_step;
    }
    if constexpr (CellType::kSizes.saved > 0) {
      if (args.saved != nullptr) at.saved = args.saved[row] + s * args.saved_step;
    }
    return at;
  }

  // The halves of finish(), for vector u of the units.
  template <typename Args, typename V>
  static ALWAYS_INLINE auto begin(const Args& args, int64_t row, int64_t s, const V* total, int u,
                                  int64_t n) {
    constexpr int L = Args::kLanesOfSum;
    const int64_t j = args.column + u * L;
    V sums[kSums<CellType>];
    if constexpr (kFirstOfState<CellType> > 0) {
      const auto* projected = args.projected[row] + s * args.init_step + j * kSums<CellType>;
#pragma GCC unroll 8
      for (int k = 0; k < kFirstOfState<CellType>; ++k) sums[k] = load(projected + k * L);
    }
#pragma GCC unroll 8
    for (int g = 0; g < kGates<CellType>; ++g) {
      sums[kFirstOfState<CellType> + g] = total[u * kGates<CellType> + g];
    }
    typename Args::Sum* c = nullptr;
    if constexpr (kHasState<CellType>) c = args.carry[row] + j;
    return begin_units<CellType>(sums, row_of_step(args, row, s), c, j, n, args.H);
  }
  template <typename Args>
  static ALWAYS_INLINE void end(const Args& args, int64_t row, int64_t s, const auto& midway, int u,
                                int64_t n) {
    const int64_t j = args.column + u * Args::kLanesOfSum;
    Vec<typename Args::Sum> h = {};
    if constexpr (kReadsH<CellType>) h = load_lanes(args.a[row] + s * args.a_step + j, n);
    end_units<CellType>(midway, h, row_of_step(args, row, s), j, n, args.H);
  }

  template <int P, typename Args, typename V>
  static ALWAYS_INLINE void finish(const Args& args, int64_t row, int64_t s, const V* total) {
    constexpr int L = Args::kLanesOfSum;
    constexpr int kUnits = P / kGates<CellType>;  // vectors of units; several of one gate only
    const int64_t last_lanes = args.columns - (kUnits - 1) * L;
#pragma GCC unroll 8
    for (int u = 0; u < kUnits; ++u) {
      const int64_t n = u < kUnits - 1 ? L : last_lanes;
      end(args, row, s, begin(args, row, s, total, u, n), u, n);
    }
  }
};

// A step of a cell backward: init points at dy, the product is that of the deltas of the step after
// with W_hh, and together they are dh.
template <typename CellType>
struct BackwardOf {
  static constexpr bool kRecurrence = true;
  static constexpr bool kHalves = false;
  static constexpr bool kInitFirst = kSums<CellType> == 1;
  static constexpr bool kPadded = false;
  static constexpr bool kPrefetchesAtOnce = true;
  static constexpr int kInitScale = 1, kInitShift = 0, kOutScale = 1;
  static constexpr bool kAbreast = true;
  static constexpr int kOfUnit = 1;
  template <int P>
  static constexpr bool takes() {
    return P <= kTileVectors;
  }

  template <int P, typename Args>
  static ALWAYS_INLINE int lines(const Args&) {
    constexpr int kOperands =
        CellType::kSizes.saved == 0 ? 1 : kSavedGates<CellType> + kHasState<CellType> + 1;
    return lines_of(P) * (1 + kOperands + kSums<CellType>);
  }
  template <int P, typename Args>
  static ALWAYS_INLINE void prefetch(const Args& args, int64_t row, int64_t s) {
    using Sum = typename Args::Sum;
    constexpr int L = Args::kLanesOfSum;
    const auto* init = args.init[row] + s * args.init_step + args.column;
    auto* out = args.out[row] + s * args.out_step + args.column;
#pragma GCC unroll 8
    for (int p = 0; p < P; p += kLineVectors) {
      __builtin_prefetch(init + p * L);
      if constexpr (CellType::kSizes.saved == 0) {
        __builtin_prefetch(args.y[row] + s * args.y_step + args.column + p * L);
      } else {
        const auto* saved = args.saved[row] + s * args.saved_step;
        const auto place = saved_place<CellType, Sum>(args.column + p * L, args.H);
#pragma GCC unroll 8
        for (int g = 0; g < kSavedGates<CellType>; ++g) {
          __builtin_prefetch(saved + place.first + g * place.stride);
        }
        if constexpr (kHasState<CellType>) {
          __builtin_prefetch(saved + kSavedGates<CellType> * args.H + args.column + p * L);
        }
        __builtin_prefetch(args.before[row] + s * args.before_step + args.column + p * L);
      }
#pragma GCC unroll 8
      for (int g = 0; g < kSums<CellType>; ++g) __builtin_prefetch(out + g * args.H + p * L, 1);
    }
  }

  template <int P, typename Args, typename V>
  static ALWAYS_INLINE void finish(const Args& args, int64_t row, int64_t s, const V* total) {
    using scalar = typename Args::Scalar;
    constexpr int L = Args::kLanesOfSum;
    BackwardRow<scalar> at = {.y = nullptr,
                              .saved = nullptr,
                              .before = nullptr,
                              .dcells = nullptr,
                              .carry = nullptr,
                              .delta = args.out[row] + s * args.out_step};
    if constexpr (CellType::kSizes.saved == 0) {
      at.y = args.y[row] + s * args.y_step;
    } else {
      at.saved = args.saved[row] + s * args.saved_step;
    }
    if constexpr (CellType::kReadsBefore) at.before = args.before[row] + s * args.before_step;
    if constexpr (CellType::kCarries) at.carry = args.carry[row];
    if constexpr (kHasState<CellType>) {
      if (args.cells != nullptr) at.dcells = args.cells[row] + s * args.cells_step;
    }
    const int64_t last_lanes = args.columns - (P - 1) * L;
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
      backward_units<CellType>(total[p], at, args.column + p * L, p < P - 1 ? L : last_lanes,
                               args.H);
    }
  }
};

}  // namespace
}  // namespace charrnn_fast
