// The cells: what a hidden unit makes of its sums in a step, and of the gradient of h in backward.
//
// All other code needs only the numbers of sizes_of(). A cell is given its sums as vectors of
// units. Forward has two halves, as what a gated cell does last waits for activations itself:
// begin() updates c and returns what end() makes h of; they leave in saved[] what backward() wants.
// backward() turns dh, the gradient of h, into deltas, the gradients of the sums; `carry` is what
// goes on elementwise to the step before: dc of an LSTM, dh*z of a GRU.
#pragma once

#include "activations-inl.h"
#include "format-inl.h"
#include "rnn.h"

namespace charrnn_fast {
namespace {

template <Cell activation>
struct Elman {
  static constexpr CellSizes kSizes = sizes_of(activation);
  static constexpr bool kReadsBefore = false;  // in backward: h (or c) of the step before
  static constexpr bool kCarries = false;
  static constexpr bool kAddsCarry = false;  // the carry is part of dh, not of dc
  static constexpr int kRotation = 0;        // of the rows of W_ih: see sum_of_row()
  static constexpr int kSavedAtEnd = -1;     // what of saved[] end() leaves

  template <typename Sum>
  using Midway = Vec<Sum>;
  template <typename Sum>
  static ALWAYS_INLINE Midway<Sum> begin(const Vec<Sum>* sums, Vec<Sum>&, Vec<Sum>*) {
    return sums[0];
  }
  template <typename Sum>
  static ALWAYS_INLINE Vec<Sum> end(Midway<Sum> sum, Vec<Sum>, Vec<Sum>*) {
    return activate<activation, Sum>(sum);
  }
  // y stands for what is saved.
  template <typename Sum>
  static ALWAYS_INLINE void backward(Vec<Sum> dh, const Vec<Sum>* y, Vec<Sum>, Vec<Sum>, Vec<Sum>&,
                                     Vec<Sum>* delta) {
    delta[0] = activate_backward<activation, Sum>(dh, y[0]);
  }
};

// Sums i f g o, and so are the gates saved.
struct Lstm {
  static constexpr CellSizes kSizes = sizes_of(Cell::kLstm);
  static constexpr bool kReadsBefore = true;
  static constexpr bool kCarries = true;
  static constexpr bool kAddsCarry = false;
  static constexpr int kRotation = 0;
  static constexpr int kSavedAtEnd = -1;

  template <typename Sum>
  struct Midway {
    Vec<Sum> c, o;
  };
  template <typename Sum>
  static ALWAYS_INLINE Midway<Sum> begin(const Vec<Sum>* sums, Vec<Sum>& c, Vec<Sum>* saved) {
    const Vec<Sum> i = activate<Cell::kSigmoid, Sum>(sums[0]);
    const Vec<Sum> f = activate<Cell::kSigmoid, Sum>(sums[1]);
    const Vec<Sum> g = activate<Cell::kTanh, Sum>(sums[2]);
    const Vec<Sum> o = activate<Cell::kSigmoid, Sum>(sums[3]);
    c = multiply_add(f, c, i * g);
    saved[0] = i, saved[1] = f, saved[2] = g, saved[3] = o;
    return {c, o};
  }
  template <typename Sum>
  static ALWAYS_INLINE Vec<Sum> end(const Midway<Sum>& at, Vec<Sum>, Vec<Sum>*) {
    return at.o * activate<Cell::kTanh, Sum>(at.c);
  }
  template <typename Sum>
  static ALWAYS_INLINE void backward(Vec<Sum> dh, const Vec<Sum>* saved, Vec<Sum> c,
                                     Vec<Sum> c_before, Vec<Sum>& dc, Vec<Sum>* delta) {
    const Vec<Sum> one = broadcast(Sum{1});
    const Vec<Sum> i = saved[0], f = saved[1], g = saved[2], o = saved[3];
    const Vec<Sum> t = activate<Cell::kTanh, Sum>(c);
    const Vec<Sum> d = multiply_add(dh * o, multiply_add(-t, t, one), dc);
    delta[0] = d * g * (i * (one - i));
    delta[1] = d * c_before * (f * (one - f));
    delta[2] = d * i * multiply_add(-g, g, one);
    delta[3] = dh * t * (o * (one - o));
    dc = d * f;
  }
};

// Sums n_x r z n_h. Saved are r, z, n and n_h.
//
// 1 - z from a rounded z would lose its digits where z is near one, and with long memory it is:
// so the smaller one of z and 1 - z is computed and saved, which tells the other to full precision;
// the sign bit says that it is 1 - z.
struct Gru {
  static constexpr CellSizes kSizes = sizes_of(Cell::kGru);
  static constexpr bool kReadsBefore = true;
  static constexpr bool kCarries = true;
  static constexpr bool kAddsCarry = true;
  static constexpr int kRotation = 2;
  static constexpr int kSavedAtEnd = 2;

  template <typename Sum>
  struct Midway {
    Vec<Sum> n_sum, z;  // as it is saved
  };
  template <typename Sum>
  static ALWAYS_INLINE Midway<Sum> begin(const Vec<Sum>* sums, Vec<Sum>&, Vec<Sum>* saved) {
    const Vec<Sum> r = activate<Cell::kSigmoid, Sum>(sums[1]);
    const Vec<Sum> e = exp_of_minus_magnitude<Sum>(sums[2]);
    const Vec<Sum> smaller = e / (broadcast(Sum{1}) + e);
    saved[0] = r, saved[1] = select<Sum>(sums[2] < Vec<Sum>{}, smaller, -smaller);
    saved[3] = sums[3];
    return {multiply_add(r, sums[3], sums[0]), saved[1]};
  }
  template <typename Sum>
  static ALWAYS_INLINE Vec<Sum> end(const Midway<Sum>& at, Vec<Sum> h, Vec<Sum>* saved) {
    const Vec<Sum> n = saved[2] = activate<Cell::kTanh, Sum>(at.n_sum);
    const Vec<Bits<Sum>> z_is_smaller = bit_cast<Vec<Bits<Sum>>>(at.z) >= 0;
    const Vec<Sum> from = select<Sum>(z_is_smaller, n, h), to = select<Sum>(z_is_smaller, h, n);
    return multiply_add(magnitude<Sum>(at.z), to - from, from);
  }
  template <typename Sum>
  static ALWAYS_INLINE void backward(Vec<Sum> dh, const Vec<Sum>* saved, Vec<Sum>,
                                     Vec<Sum> h_before, Vec<Sum>& carry, Vec<Sum>* delta) {
    const Vec<Sum> one = broadcast(Sum{1});
    const Vec<Sum> r = saved[0], n = saved[2], n_h = saved[3];
    const Vec<Bits<Sum>> z_is_smaller = bit_cast<Vec<Bits<Sum>>>(saved[1]) >= 0;
    const Vec<Sum> smaller = magnitude<Sum>(saved[1]), larger = one - smaller;
    dh += carry;
    const Vec<Sum> dn = dh * select<Sum>(z_is_smaller, larger, smaller) * multiply_add(-n, n, one);
    delta[0] = dn;
    delta[1] = dn * n_h * (r * (one - r));
    delta[2] = dh * (h_before - n) * (smaller * larger);
    delta[3] = dn * r;
    // dh z, without a rounded z.
    carry = multiply_add(dh, saved[1], select<Sum>(z_is_smaller, Vec<Sum>{}, dh));
  }
};

// call(cell) with the cell of this name.
template <typename Call>
auto with_cell(Cell cell, const Call& call) {
  switch (cell) {
    case Cell::kRelu:
      return call(Elman<Cell::kRelu>{});
    case Cell::kSigmoid:
      return call(Elman<Cell::kSigmoid>{});
    case Cell::kLstm:
      return call(Lstm{});
    case Cell::kGru:
      return call(Gru{});
    case Cell::kTanh:
      break;
  }
  return call(Elman<Cell::kTanh>{});
}

template <typename CellType>
constexpr int kGates = CellType::kSizes.gates;
template <typename CellType>
constexpr int kSums = CellType::kSizes.sums;
// The first sum of the window that h W_hh' is added to.
template <typename CellType>
constexpr int kFirstOfState = kSums<CellType> - kGates<CellType>;
template <typename CellType>
constexpr bool kHasState = CellType::kSizes.has_state;
// Whether a step reads h before elementwise, beside the product.
template <typename CellType>
constexpr bool kReadsH = CellType::kReadsBefore && !kHasState<CellType>;
// Of what is saved: the numbers that lie side by side; c follows them.
template <typename CellType>
constexpr int kSavedGates = CellType::kSizes.saved - (kHasState<CellType> ? 1 : 0);

// The block of H rows of W_ih, and of b_ih, that belongs to a sum.
template <typename CellType>
constexpr int input_block(int sum) {
  return (sum + CellType::kRotation) % kGates<CellType>;
}

// Where the saved gates of unit j lie in a row: in groups of as many units as the widest vector
// holds, gate after gate, so that a tile writes whole cache lines in a row, and every ISA reads
// what another one wrote.
struct SavedPlace {
  int64_t first;   // of the first gate
  int64_t stride;  // from one gate to the next
};
template <typename CellType, typename Sum>
ALWAYS_INLINE SavedPlace saved_place(int64_t j, int64_t H) {
  constexpr int64_t kGroup = 64 / sizeof(Sum);
  const int64_t group = j / kGroup * kGroup;
  const int64_t left = H - group;
  return {group * kSavedGates<CellType> + (j - group), left < kGroup ? left : kGroup};
}

// One row of what a step reads and writes, by pointers to its first unit. Null: not there.
template <typename scalar>
struct ForwardRow {
  scalar* y;
  scalar* saved;
  scalar* cells;
};

// A vector of units, n of which exist, from unit j on: the first half of their step. at_c is where
// their c lies.
template <typename CellType, typename scalar>
ALWAYS_INLINE auto begin_units(const Vec<SumOf<scalar>>* sums, const ForwardRow<scalar>& row,
                               SumOf<scalar>* at_c, int64_t j, int64_t n, int64_t H) {
  using Sum = SumOf<scalar>;
  Vec<Sum> c = {};
  if constexpr (kHasState<CellType>) c = load(at_c);
  [[maybe_unused]] Vec<Sum> saved[CellType::kSizes.saved + 1];
  const auto midway = CellType::template begin<Sum>(sums, c, saved);
  if constexpr (kHasState<CellType>) {
    store(at_c, c);
    if (row.cells != nullptr) store_lanes(row.cells + j, c, n);
  }
  if constexpr (CellType::kSizes.saved > 0) {
    if (row.saved == nullptr) return midway;
    const SavedPlace place = saved_place<CellType, Sum>(j, H);
#pragma GCC unroll 8
    for (int g = 0; g < kSavedGates<CellType>; ++g) {
      if (g == CellType::kSavedAtEnd) continue;
      store_lanes(row.saved + place.first + g * place.stride, saved[g], n);
    }
    if constexpr (kHasState<CellType>) {
      store_lanes(row.saved + kSavedGates<CellType> * H + j, c, n);
    }
  }
  return midway;
}

// The second half.
template <typename CellType, typename scalar>
ALWAYS_INLINE void end_units(const typename CellType::template Midway<SumOf<scalar>>& midway,
                             Vec<SumOf<scalar>> h_before, const ForwardRow<scalar>& row, int64_t j,
                             int64_t n, int64_t H) {
  using Sum = SumOf<scalar>;
  constexpr int kSaved = CellType::kSavedAtEnd;
  [[maybe_unused]] Vec<Sum> saved[CellType::kSizes.saved + 1];
  store_lanes(row.y + j, CellType::template end<Sum>(midway, h_before, saved), n);
  if constexpr (kSaved >= 0) {
    if (row.saved == nullptr) return;
    const SavedPlace place = saved_place<CellType, Sum>(j, H);
    store_lanes(row.saved + place.first + kSaved * place.stride, saved[kSaved], n);
  }
}

template <typename CellType, typename scalar>
ALWAYS_INLINE void forward_units(const Vec<SumOf<scalar>>* sums, Vec<SumOf<scalar>> h_before,
                                 const ForwardRow<scalar>& row, SumOf<scalar>* at_c, int64_t j,
                                 int64_t n, int64_t H) {
  end_units<CellType>(begin_units<CellType>(sums, row, at_c, j, n, H), h_before, row, j, n, H);
}

// The same, backward. y of Elman cells only.
template <typename scalar>
struct BackwardRow {
  const scalar* y;
  const scalar* saved;
  const scalar* before;  // h (GRU) or c (LSTM) of the step before
  const scalar* dcells;
  SumOf<scalar>* carry;
  scalar* delta;  // [sums][H]
};

template <typename CellType, typename scalar>
ALWAYS_INLINE void backward_units(Vec<SumOf<scalar>> dh, const BackwardRow<scalar>& row, int64_t j,
                                  int64_t n, int64_t H) {
  using Sum = SumOf<scalar>;
  Vec<Sum> saved[CellType::kSizes.saved + 1], delta[kSums<CellType>];
  Vec<Sum> c = {}, before = {}, carry = {};
  if constexpr (CellType::kSizes.saved == 0) {
    saved[0] = load_lanes(row.y + j, n);
  } else {
    const SavedPlace place = saved_place<CellType, Sum>(j, H);
#pragma GCC unroll 8
    for (int g = 0; g < kSavedGates<CellType>; ++g) {
      saved[g] = load_lanes(row.saved + place.first + g * place.stride, n);
    }
  }
  if constexpr (CellType::kReadsBefore) before = load_lanes(row.before + j, n);
  if constexpr (CellType::kCarries) carry = load(row.carry + j);
  if constexpr (kHasState<CellType>) {
    c = load_lanes(row.saved + kSavedGates<CellType> * H + j, n);
    if (row.dcells != nullptr) carry += load_lanes(row.dcells + j, n);
  }
  CellType::template backward<Sum>(dh, saved, c, before, carry, delta);
  if constexpr (CellType::kCarries) store(row.carry + j, carry);
#pragma GCC unroll 8
  for (int s = 0; s < kSums<CellType>; ++s) store_lanes(row.delta + s * H + j, delta[s], n);
}

}  // namespace
}  // namespace charrnn_fast
