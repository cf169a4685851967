// The gradients of the weights: sums over rows, which backward-inl.h has computed delta of.
#pragma once

#include "backward-space-inl.h"
#include "cells-inl.h"
#include "outer-inl.h"
#include "sequences-inl.h"

namespace charrnn_fast {
namespace {

// The rows of a part: which have been summed, and how many are ready to be.
struct RowsOfPart {
  RowsOfPart(const Sequences& seq, int part, int parts, bool down)
      : slots{first_slot_of_part(seq, part, parts), first_slot_of_part(seq, part + 1, parts)},
        walk(seq, slots, down) {}

  Range slots;
  RowWalk walk;
  int64_t summable = 0;  // rows whose delta is known, and which are not yet summed
  bool first = true;     // no row has been summed
};

// out[j] += sum of rows[k][j], for j in a range; with `first` out is uninitialised. Blocked: a few
// rows are summed, then their sums, which rounds less.
template <typename scalar, typename Out>
void add_rows(const scalar* const* rows, int64_t K, Range columns, Out* out, bool first) {
  using Sum = SumOf<scalar>;
  constexpr int L = kLanes<Sum>;
  constexpr int kVectors = 8;
  constexpr int64_t kRows = 16;
  int64_t j = columns.first;
  for (; j + kVectors * L <= columns.last; j += kVectors * L) {  // a few whole cache lines a row
    Vec<Sum> total[kVectors] = {};
    for (int64_t k = 0; k < K;) {
      Vec<Sum> sum[kVectors] = {};
      for (const int64_t end = K - k < kRows ? K : k + kRows; k < end; ++k) {
#pragma GCC unroll 8
        for (int i = 0; i < kVectors; ++i) sum[i] += load_lanes(rows[k] + j + i * L, L);
      }
#pragma GCC unroll 8
      for (int i = 0; i < kVectors; ++i) total[i] += sum[i];
    }
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) {
      Out* to = out + j + i * L;
      store_lanes(to, first ? total[i] : load_lanes(to, L) + total[i], L);
    }
  }
  for (; j < columns.last; j += L) {
    const int64_t n = columns.last - j < L ? columns.last - j : L;
    Vec<Sum> total = {};
    for (int64_t k = 0; k < K;) {
      Vec<Sum> sum = {};
      for (const int64_t end = K - k < kRows ? K : k + kRows; k < end; ++k) {
        sum += load_lanes(rows[k] + j, n);
      }
      total += sum;
    }
    store_lanes(out + j, first ? total : load_lanes(out + j, n) + total, n);
  }
}

// The row of h before a step.
template <typename CellType, typename scalar>
const scalar* h_before(const BackwardArgs<scalar>& args,
                       const BackwardSpace<CellType, scalar>& space, int64_t t, int64_t slot) {
  if (t == first_step(args.seq, slot, args.reverse)) {
    return state_or<scalar>(args.h0, start_row_of(args.seq, slot), args.H, space.zeros);
  }
  return args.y + row_of(args.seq, args.reverse ? t + 1 : t - 1, slot) * args.ldy;
}

// dW_ih, dW_hh and db of the units in a range are sums over rows, taken in the order in which delta
// is computed. Adds the next rows of a part: a multiple of kOuterRows, or what is left.
template <typename CellType, typename scalar>
void add_weights(const BackwardArgs<scalar>& args, const BackwardSpace<CellType, scalar>& space,
                 const WeightSums<SumOf<scalar>>& sums, Range units, RowsOfPart& part,
                 int64_t total) {
  constexpr int64_t kRows = kOuterRows<scalar>;
  RowWalk& walk = part.walk;
  if (part.first && sums.table != nullptr) std::memset(sums.seen, 0, args.I * sizeof(bool));
  if (units.first == units.last) return;
  const scalar* delta[kRows];
  const scalar* x[kRows];
  const scalar* y_previous[kRows];
  for (int64_t done = 0; done < total;) {
    const int64_t K = total - done < kRows ? total - done : kRows;
    done += K;
    for (int64_t k = 0; k < K; ++k, walk.next()) {
      const int64_t row = row_of(args.seq, walk.t, walk.slot);
      delta[k] = space.delta(walk.t, walk.slot);
      if (sums.dW_ih != nullptr) x[k] = args.x + row * args.ldx;
      y_previous[k] = h_before(args, space, walk.t, walk.slot);
      if (sums.table != nullptr) {
        const int64_t id = args.ids[row];
        double* entry = sums.table + id * space.K;
        for (int g = 0; g < kGates<CellType>; ++g) {
          const int64_t first = g * args.H + units.first, last = g * args.H + units.last;
          if (sums.seen[id]) {
            for (int64_t j = first; j < last; ++j) entry[j] += as_sum(delta[k][j]);
          } else {
            for (int64_t j = first; j < last; ++j) entry[j] = as_sum(delta[k][j]);
          }
        }
        sums.seen[id] = true;
      }
    }
    for (int s = 0; sums.db != nullptr && s < kSums<CellType>; ++s) {
      add_rows(delta, K, {s * args.H + units.first, s * args.H + units.last}, sums.db, part.first);
    }
    const auto add = [&](auto* dW_ih, auto* dW_hh) {
      if (sums.dW_ih == nullptr && sums.dW_hh == nullptr) return;
      constexpr int G = kGates<CellType>;
      const OuterProducts<scalar> products(delta, K, units, kSums<CellType>, args.H, space.packed,
                                           part.first);
      if (sums.dW_ih != nullptr) {
        products.add(x, 0, G, space.inputs, dW_ih, [](int s) { return input_block<CellType>(s); });
      }
      if (sums.dW_hh != nullptr) {
        products.add(y_previous, kFirstOfState<CellType>, G, space.hidden, dW_hh,
                     [](int g) { return g; });
      }
    };
    if (space.kSumsAreResults || !space.direct) {
      add(sums.dW_ih, sums.dW_hh);
    } else {
      add(args.dW_ih, args.dW_hh);
    }
    part.first = false;
  }
}

// Whether any id in [first, last) was seen.
template <typename CellType, typename scalar>
bool any_seen(const BackwardSpace<CellType, scalar>& space, int64_t first, int64_t last) {
  bool any = false;
  for (int part = 0; part < space.parts; ++part) {
    for (int64_t v = first; v < last; ++v) any |= space.sums[part].seen[v];
  }
  return any;
}

// dW_ih of the units in a range out of the tables of all parts.
template <typename CellType, typename scalar>
void store_tables(const BackwardArgs<scalar>& args, const BackwardSpace<CellType, scalar>& space,
                  Range units) {
  constexpr int64_t kIds = 64 / sizeof(scalar);  // a cache line of dW_ih
  constexpr int64_t kUnits = 128, kBlock = Transpose<scalar>::kBlock;
  alignas(64) scalar rows[kIds][kUnits];
  const auto store_units = [&](int g, int64_t first, int64_t count) {
    scalar* const dW_ih = args.dW_ih + (input_block<CellType>(g) * args.H + first) * args.I;
    std::memset(dW_ih, 0, count * args.I * sizeof(scalar));
    for (int64_t v = 0; v < args.I; v += kIds) {
      const int64_t ids = args.I - v < kIds ? args.I - v : kIds;
      if (!any_seen(space, v, v + ids)) continue;
      for (int64_t i = 0; i < ids; ++i) {
        double sum[kUnits] = {};
        for (int part = 0; part < space.parts; ++part) {
          if (!space.sums[part].seen[v + i]) continue;
          const double* entry = space.sums[part].table + (v + i) * space.K + g * args.H + first;
          for (int64_t j = 0; j < count; ++j) sum[j] += entry[j];
        }
        for (int64_t j = 0; j < count; ++j) rows[i][j] = rounded<scalar>(sum[j]);
      }
      scalar* out = dW_ih + v;
      int64_t i = 0;
      for (; i + kBlock <= ids; i += kBlock) {
        int64_t j = 0;
        for (; j + kBlock <= count; j += kBlock) {
          Transpose<scalar>::run(&rows[i][j], kUnits, out + j * args.I + i, args.I);
        }
        for (; j < count; ++j) {
          for (int64_t k = i; k < i + kBlock; ++k) out[j * args.I + k] = rows[k][j];
        }
      }
      for (; i < ids; ++i) {
        for (int64_t j = 0; j < count; ++j) out[j * args.I + i] = rows[i][j];
      }
    }
  };
  for (int g = 0; g < kGates<CellType>; ++g) {
    for (int64_t first = units.first; first < units.last; first += kUnits) {
      store_units(g, first, units.last - first < kUnits ? units.last - first : kUnits);
    }
  }
}

// And at last the sums of all parts together, as the results.
template <typename CellType, typename scalar>
void combine_parts(const BackwardArgs<scalar>& args, const BackwardSpace<CellType, scalar>& space,
                   Range units) {
  using Sum = SumOf<scalar>;
  constexpr int L = kLanes<Sum>;
  // Numbers [from, from + count) of the sums, to a result.
  const auto combine = [&](Sum* WeightSums<Sum>::* sums, int64_t from, int64_t count,
                           scalar* result) {
    for (int64_t j = 0; j < count; j += L) {
      const int64_t n = count - j < L ? count - j : L;
      Vec<Sum> sum = load_lanes(space.sums[0].*sums + from + j, n);
      for (int part = 1; part < space.parts; ++part) {
        sum += load_lanes(space.sums[part].*sums + from + j, n);
      }
      store_lanes(result + j, sum, n);
    }
  };
  const int64_t H = args.H, n = units.last - units.first;
  for (int g = 0; g < kGates<CellType>; ++g) {
    const int64_t first = g * H + units.first;
    if (!space.direct && space.sums[0].dW_ih != nullptr) {
      combine(&WeightSums<Sum>::dW_ih, first * args.I, n * args.I, args.dW_ih + first * args.I);
    }
    if (!space.direct && space.sums[0].dW_hh != nullptr) {
      combine(&WeightSums<Sum>::dW_hh, first * H, n * H, args.dW_hh + first * H);
    }
    if (args.db_ih != nullptr) {
      scalar* db = args.db_ih + input_block<CellType>(g) * H + units.first;
      combine(&WeightSums<Sum>::db, first, n, db);
    }
    if (args.db_hh != nullptr) {
      combine(&WeightSums<Sum>::db, first + kFirstOfState<CellType> * H, n, args.db_hh + first);
    }
  }
  if (space.sums[0].table != nullptr) store_tables(args, space, units);
}

}  // namespace
}  // namespace charrnn_fast
