// Backward of one direction of one layer: the deltas first, step by step; then dx, dh0 and the
// weights' gradients as products over rows. A thread that reads no other thread's rows works in
// chunks of steps, so that delta is still in cache.
#pragma once

#include "backward-space-inl.h"
#include "backward-weights-inl.h"
#include "cells-inl.h"
#include "sequences-inl.h"
#include "thin-inl.h"
#include "tile-inl.h"

namespace charrnn_fast {
namespace {

// The deltas of sequences' last steps, in a range of units: of rows of dy and of dh_n. Carries
// begin here.
template <typename CellType, typename scalar>
void backward_start(const TileArgs<scalar>& args, int64_t row, const scalar* dh_n,
                    const scalar* dc_n, Range units) {
  using Sum = SumOf<scalar>;
  constexpr int L = kLanes<Sum>;
  const BackwardRow<scalar> at = {.y = args.y != nullptr ? args.y[row] : nullptr,
                                  .saved = args.saved != nullptr ? args.saved[row] : nullptr,
                                  .before = args.before != nullptr ? args.before[row] : nullptr,
                                  .dcells = args.cells != nullptr ? args.cells[row] : nullptr,
                                  .carry = args.carry != nullptr ? args.carry[row] : nullptr,
                                  .delta = args.out[row]};
  for (int64_t j = units.first; j < units.last; j += L) {
    const int64_t n = units.last - j < L ? units.last - j : L;
    if constexpr (CellType::kCarries) {
      store(at.carry + j, dc_n != nullptr ? load_lanes(dc_n + j, n) : Vec<Sum>{});
    }
    const Vec<Sum> dh = load_lanes(args.init[row] + j, n) + load_lanes(dh_n + j, n);
    backward_units<CellType>(dh, at, j, n, args.H);
  }
}

// delta of slots [slots.first, slots.last), at most kBlockSlots of them, at some steps, of the
// units of some panels.
template <typename CellType, typename scalar>
void backward_block(const BackwardArgs<scalar>& args, const BackwardSpace<CellType, scalar>& space,
                    Range steps, Range slots, Range mine, const Team* others) {
  using Sum = SumOf<scalar>;
  constexpr int64_t kSaved = CellType::kSizes.saved;
  constexpr bool kFromY = kSaved == 0;
  const Panels<Sum>& panels = space.hidden;
  const Sequences& seq = args.seq;
  const int64_t first = panels.first_column(mine.first);
  const int64_t end = panels.first_column(mine.last);
  const int64_t last = end < args.H ? end : args.H;

  StepWalk walk(seq, slots.first, slots.last, !args.reverse, steps);
  const scalar* next[kBlockSlots];
  const scalar* init[kBlockSlots];
  scalar* delta[kBlockSlots];
  const scalar* y[kBlockSlots];
  const scalar* before[kBlockSlots];
  scalar* saved[kBlockSlots];
  scalar* dcells[kBlockSlots];
  Sum* carry[kBlockSlots];
  TileArgs<scalar> product = {.a = next, .K = space.K, .init = init, .out = delta};
  product.H = args.H;
  const int64_t direction = args.reverse ? 1 : -1;
  const int64_t step_rows = direction * seq.step_rows;
  product.init_step = args.dy != nullptr ? step_rows * args.lddy : 0;
  if constexpr (kFromY) {
    product.y = y;
    product.y_step = step_rows * args.ldy;
  } else {
    product.saved = saved;
    product.saved_step = step_rows * kSaved * args.H;
  }
  if constexpr (CellType::kReadsBefore) {
    product.before = before;
    product.before_step = step_rows * (kHasState<CellType> ? kSaved * args.H : args.ldy);
  }
  if constexpr (CellType::kCarries) product.carry = carry;
  if (kHasState<CellType> && args.dcells != nullptr) {
    product.cells = dcells;
    product.cells_step = step_rows * args.lddcells;
  }
  if constexpr (CellType::kCarries) {
    for (int64_t i = 0; i < slots.last - slots.first; ++i) {
      carry[i] = space.carry + (slots.first + i) * panels.padded_columns();
    }
  }
  const int64_t rows_running = rows_of_running_tile(panels);
  bool backwards = false;  // as in forward_block
  while (walk.next()) {
    const int64_t after = args.reverse ? walk.t - 1 : walk.t + 1;
    for (int64_t i = 0; i < walk.running; ++i) {
      const int64_t slot = slots.first + i, row = row_of(seq, walk.t, slot);
      delta[i] = space.delta(walk.t, slot);
      init[i] = args.dy != nullptr ? args.dy + row * args.lddy : space.zeros;
      if constexpr (kFromY) {
        y[i] = args.y + row * args.ldy;
      } else {
        // Of a tile's arguments, saved is what forward writes.
        saved[i] = const_cast<scalar*>(args.saved) + row * kSaved * args.H;
      }
      if constexpr (kHasState<CellType>) {
        if (args.dcells != nullptr)
          dcells[i] = const_cast<scalar*>(args.dcells) + row * args.lddcells;
        if (walk.t == first_step(seq, slot, args.reverse)) {
          before[i] = state_or<scalar>(args.c0, start_row_of(seq, slot), args.H, space.zeros);
        } else {
          const int64_t row_before = row_of(seq, args.reverse ? walk.t + 1 : walk.t - 1, slot);
          before[i] = args.saved + (row_before * kSaved + kSavedGates<CellType>)*args.H;
        }
      } else if constexpr (CellType::kReadsBefore) {
        before[i] = h_before(args, space, walk.t, slot);
      }
    }
    for (int64_t i = 0; i < walk.continuing; ++i) {
      next[i] = space.delta_of_state(after, slots.first + i, args.H);
    }
    product.steps = 1;
    if (walk.continuing == walk.running && walk.running <= rows_running) {
      // What is before the first step of a sequence lies elsewhere.
      const int64_t steady = walk.steady() - (CellType::kReadsBefore ? 1 : 0);
      if (steady > 1) {
        product.steps = space.delta.regular(walk.t, steady, direction);
        product.a_step = product.out_step = space.delta.distance(after, direction);
        walk.run(product.steps);
      }
    }
    multiply<BackwardOf<CellType>>(product, walk.continuing, panels, mine, space.recurrent,
                                   backwards);
    backwards = !backwards;
    for (int64_t i = walk.continuing; i < walk.running; ++i) {
      const int64_t state = end_row_of(seq, slots.first + i);
      backward_start<CellType>(product, i, state_or(args.dh_n, state, args.H, space.zeros),
                               state_or<scalar>(args.dc_n, state, args.H, nullptr), {first, last});
    }
    if (others != nullptr) wait_for_rows(*others, delta, walk.running, space.delta.width);
  }
}

// Some rows of delta times packed weights: next(&row of delta, &row that the result begins with,
// &row of the result).
template <typename CellType, typename scalar, typename Next>
void multiply_delta(const BackwardSpace<CellType, scalar>& space, int64_t rows,
                    const Panels<SumOf<scalar>>& panels, const PackedOf<scalar>* packed,
                    const Next& next) {
  using Sum = SumOf<scalar>;
  const scalar* delta[kChunkRows];
  const Sum* init[kChunkRows];
  scalar* out[kChunkRows];
  TileArgs<scalar, Sum> product = {.a = delta, .K = space.K, .init = init, .out = out};
  for (int64_t done = 0; done < rows;) {
    const int64_t count = rows - done < kChunkRows ? rows - done : kChunkRows;
    for (int64_t i = 0; i < count; ++i) {
      init[i] = space.zero_sums;
      next(&delta[i], &init[i], &out[i]);
    }
    done += count;
    multiply<Store<>>(product, count, panels, {0, panels.count}, packed);
  }
}

// dx = delta_x W_ih for the next rows of a walk.
template <typename CellType, typename scalar>
void backward_input(const BackwardArgs<scalar>& args, const BackwardSpace<CellType, scalar>& space,
                    RowWalk& walk, int64_t rows) {
  using Sum = SumOf<scalar>;
  multiply_delta(
      space, rows, space.inputs, space.input, [&](const scalar** delta, const Sum**, scalar** dx) {
        const int64_t slot = inwards(args.seq, space.slots, walk.slot - space.slots.first);
        *delta = space.delta(walk.t, slot);
        *dx = args.dx + row_of(args.seq, walk.t, slot) * args.I;
        walk.next();
      });
}

// The slots from one on that have a state to start from.
inline int64_t next_with_state(const Sequences& seq, int64_t slot) {
  while (slot < seq.B && start_row_of(seq, slot) < 0) ++slot;
  return slot;
}

// dh0 = delta_h W_hh at each sequence's first step.
template <typename CellType, typename scalar>
void backward_state(const BackwardArgs<scalar>& args, const BackwardSpace<CellType, scalar>& space,
                    Range slots) {
  using Sum = SumOf<scalar>;
  int64_t rows = 0;
  for (int64_t slot = slots.first; slot < slots.last; ++slot) {
    rows += start_row_of(args.seq, slot) >= 0;
  }
  int64_t slot = slots.first;
  multiply_delta(space, rows, space.hidden, space.recurrent,
                 [&](const scalar** delta, const Sum** init, scalar** dh0) {
                   slot = next_with_state(args.seq, slot);
                   const int64_t t = first_step(args.seq, slot, args.reverse);
                   *delta = space.delta_of_state(t, slot, args.H);
                   if (CellType::kAddsCarry) {
                     *init = space.carry + slot * space.hidden.padded_columns();
                   }
                   *dh0 = args.dh0 + start_row_of(args.seq, slot) * args.H;
                   ++slot;
                 });
}

// dc0: the carry of the first step.
template <typename CellType, typename scalar>
void store_carries(const BackwardArgs<scalar>& args, const BackwardSpace<CellType, scalar>& space,
                   Range slots, Range units) {
  using Sum = SumOf<scalar>;
  constexpr int L = kLanes<Sum>;
  for (int64_t slot = slots.first; slot < slots.last; ++slot) {
    const int64_t row = start_row_of(args.seq, slot);
    if (row < 0) continue;
    const Sum* carry = space.carry + slot * space.hidden.padded_columns();
    for (int64_t j = units.first; j < units.last; j += L) {
      const int64_t n = units.last - j < L ? units.last - j : L;
      store_lanes(args.dc0 + row * args.H + j, load_lanes(carry + j, n), n);
    }
  }
}

// dx and dh0 where they are of few rows.
template <typename CellType, typename scalar>
void backward_thin(const BackwardArgs<scalar>& args, const BackwardSpace<CellType, scalar>& space,
                   const Team& team) {
  const Sequences& seq = args.seq;
  const scalar* delta[kThinRows<scalar>];
  scalar* out[kThinRows<scalar>];
  const SumOf<scalar>* init[kThinRows<scalar>];
  if (args.dx != nullptr && !space.packs_input) {
    int64_t rows = 0;
    for (RowWalk walk(seq, {0, seq.B}, false); !walk.ended(); walk.next()) {
      delta[rows] = space.delta(walk.t, walk.slot);
      out[rows++] = args.dx + row_of(seq, walk.t, walk.slot) * args.I;
    }
    multiply_thin<scalar>(
        {delta, args.W_ih, out, space.K, args.I, CellType::kRotation * args.H, nullptr}, rows,
        team);
  }
  if (args.dh0 != nullptr && !space.packs_recurrent) {
    int64_t rows = 0;
    for (int64_t slot = 0; slot < seq.B; ++slot) {
      const int64_t row = start_row_of(seq, slot);
      if (row < 0) continue;
      delta[rows] = space.delta_of_state(0, slot, args.H);
      init[rows] = space.carry + slot * space.hidden.padded_columns();
      out[rows++] = args.dh0 + row * args.H;
    }
    multiply_thin<scalar>(
        {delta, args.W_hh, out, space.K, args.H, 0, CellType::kAddsCarry ? init : nullptr}, rows,
        team);
  }
}

template <typename CellType, typename scalar>
void backward_all(const BackwardArgs<scalar>& args, const Team& team) {
  const BackwardSpace<CellType, scalar> space(args, team, args.workspace);
  const Sequences& seq = args.seq;
  const Team& group = space.group;
  prepare_backward(args, space);

  const bool hidden = args.split == Split::kHidden;
  const Range panels = hidden ? share(space.hidden.count, team) : Range{0, space.hidden.count};
  const Range slots = hidden ? space.slots : share(space.slots, group);
  const int64_t n = slots.last - slots.first;
  const int64_t blocks = (n + kBlockSlots - 1) / kBlockSlots;

  const bool weights = args.dW_ih != nullptr || args.dW_hh != nullptr || args.db_ih != nullptr ||
                       args.db_hh != nullptr;
  const Range units = share(args.H, group);
  static_assert(BackwardSpace<CellType, scalar>::kMostParts == 2);
  // Two walks over the same rows: dx is due at once, and the group divides its rows; the weights'
  // sums wait for whole blocks of kOuterRows, and the group divides their units.
  RowsOfPart rows[] = {{seq, 0, space.parts, !args.reverse},
                       {seq, space.parts - 1, space.parts, !args.reverse}};
  RowWalk input_rows(seq, space.slots, !args.reverse);

  const int64_t T = length_of(seq, space.slots.first);
  const int64_t chunk = space.chunk < T ? space.chunk : T;
  for (int64_t done = 0; done < T; done += chunk) {
    const int64_t end = done + chunk < T ? done + chunk : T;
    const Range steps = args.reverse ? Range{done, end} : Range{T - end, T - done};
    for (int64_t i = 0; i < blocks; ++i) {
      const Range block = {slots.first + i * n / blocks, slots.first + (i + 1) * n / blocks};
      backward_block(args, space, steps, block, panels, hidden ? &team : nullptr);
    }
    wait_for(group);
    if (space.packs_input) {
      const Range mine = share(rows_in(seq, space.slots, steps), group);
      if (group.size > 1) input_rows.seek(mine.first);
      backward_input(args, space, input_rows, mine.last - mine.first);
    }
    for (int part = space.first_part; weights && part < space.last_part; ++part) {
      RowsOfPart& of_part = rows[part];
      of_part.summable += rows_in(seq, of_part.slots, steps);
      const int64_t now =
          end == T ? of_part.summable : of_part.summable / kOuterRows<scalar> * kOuterRows<scalar>;
      add_weights(args, space, space.sums[part], units, of_part, now);
      of_part.summable -= now;
    }
  }
  if (args.dh0 != nullptr && space.packs_recurrent) {
    backward_state(args, space, hidden ? share(seq.B, team) : slots);
  }
  if (kHasState<CellType> && args.dc0 != nullptr) {
    const int64_t first = space.hidden.first_column(panels.first);
    const int64_t last = space.hidden.first_column(panels.last);
    store_carries(args, space, slots, {first, last < args.H ? last : args.H});
  }
  if (space.groups > 1) wait_for(team);
  if (seq.B <= kThinRows<scalar>) backward_thin(args, space, team);
  if (weights) combine_parts(args, space, share(args.H, team));
}

template <typename scalar>
void backward(const BackwardArgs<scalar>& args, const Team& team) {
  with_cell(args.cell, [&](auto cell) { backward_all<decltype(cell)>(args, team); });
}

}  // namespace
}  // namespace charrnn_fast
