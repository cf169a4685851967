// Forward of one direction of one layer.
#pragma once

#include "cells-inl.h"
#include "one-step-inl.h"
#include "pack-inl.h"
#include "sequences-inl.h"
#include "tile-inl.h"

namespace charrnn_fast {
namespace {

// Whether none of n numbers is infinite or NaN.
template <typename scalar>
bool all_finite(const scalar* p, int64_t n) {
  using Sum = SumOf<scalar>;
  constexpr int64_t L = kLanes<Sum>, kVectors = 8;
  Vec<Sum> sums[kVectors] = {};  // of each number times zero
  int64_t i = 0;
  for (; i + kVectors * L <= n; i += kVectors * L) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sums[v] += load_lanes(p + i + v * L, L) * Vec<Sum>{};
  }
  for (; i < n; i += L) sums[0] += load_lanes(p + i, n - i < L ? n - i : L) * Vec<Sum>{};
  for (int v = 1; v < kVectors; ++v) sums[0] += sums[v];
  for (int lane = 0; lane < L; ++lane) {
    if (sums[0][lane] != 0) return false;
  }
  return true;
}

// Few ids are looked up in W_ih itself, whose columns are strided; many in a transposed table.
template <typename scalar>
bool gathers_ids(const ForwardArgs<scalar>& args) {
  return args.ids != nullptr && 8 * args.seq.N < args.I;
}

template <typename CellType, typename scalar>
struct ForwardSpace {
  using Sum = SumOf<scalar>;

  Panels<Sum> panels;
  int64_t width;       // of a row of all sums: those of each vector of units side by side
  int64_t chunk_rows;  // see kChunkRows; a step of a block fits in any case
  // Shared by the members that pack it.
  Team packers;
  PackedOf<scalar>* input;      // W_ih' in panels; unless ids are given
  Sum* table;                   // for those: W_ih' + biases, [I][width]
  PackedOf<scalar>* recurrent;  // W_hh' in panels
  Sum* bias;                    // [width]: b_ih, b_hh, or their sum
  scalar* zeros;                // [H], for sequences that start from zeros among others
  // Each member's own: the projections of its next steps. Kept in y, each element would be written
  // twice, and another core's prefetcher may take the cache line away in between.
  Sum* projected;  // [chunk_rows][width]
  Sum* c;          // [kBlockSlots][padded H]: of a block's slots
  size_t bytes;

  ForwardSpace(const ForwardArgs<scalar>& args, const Team& team, void* base)
      : panels(args.H, kGates<CellType>), width(panels.padded_columns() * kSums<CellType>) {
    const int64_t weights = kGates<CellType> * args.H * (args.H + args.I);
    const bool apart = args.split == Split::kBatch && weights <= kPackedByAll;
    packers = subteam(team, apart ? team.size : 1);
    chunk_rows = kChunkRows;
    if (kSums<CellType> > 1 && width > 0) {
      chunk_rows = kChunkSums / width;
      const int64_t least = args.seq.B < kBlockSlots ? args.seq.B : kBlockSlots;
      if (chunk_rows < least) chunk_rows = least;
      if (chunk_rows > kChunkRows) chunk_rows = kChunkRows;
    }
    Arena arena(base);
    arena.take_each(team.size / packers.size, team.rank / packers.size, [&] {
      const bool tokens = args.ids != nullptr;
      input = tokens ? nullptr : arena.take<PackedOf<scalar>>(packed_size<scalar>(panels, args.I));
      table = tokens ? arena.take<Sum>(args.I * width) : nullptr;
      recurrent = arena.take<PackedOf<scalar>>(packed_size<scalar>(panels, args.H));
      bias = arena.take<Sum>(width);
      zeros = args.seq.start_row != nullptr ? arena.take<scalar>(args.H) : nullptr;
    });
    arena.take_each(team.size, team.rank, [&] {
      projected = arena.take<Sum>(chunk_rows * width);
      c = kHasState<CellType> ? arena.take<Sum>(kBlockSlots * panels.padded_columns()) : nullptr;
    });
    bytes = arena.used();
  }

  // The first of the sums of the units of a panel in a row of all.
  int64_t sums_of(int64_t panel) const { return panels.first_column(panel) * kSums<CellType>; }
};

template <typename scalar>
size_t forward_workspace(const ForwardArgs<scalar>& args, int team_size) {
  if (slots_longer_than_one(args.seq) == 0) return 0;
  return with_cell(args.cell, [&](auto cell) {
    return ForwardSpace<decltype(cell), scalar>(args, Team{0, team_size, nullptr, nullptr}, nullptr)
        .bytes;
  });
}

template <typename CellType, typename scalar>
void pack_forward(const ForwardArgs<scalar>& args, const ForwardSpace<CellType, scalar>& space) {
  constexpr int L = kLanes<SumOf<scalar>>;
  const Range mine = share(space.panels.count, space.packers);
  const int64_t first = space.panels.first_column(mine.first);
  const int64_t last = space.panels.first_column(mine.last);
  for (int64_t j = first; j < last; j += L) {
    for (int s = 0; s < kSums<CellType>; ++s) {
      add_biases<CellType>(args, s, j, j + L, space.bias + j * kSums<CellType> + s * L);
    }
  }
  if (space.zeros != nullptr && space.packers.rank == 0) {
    std::memset(space.zeros, 0, args.H * sizeof(scalar));
  }
  pack_transposed(args.W_hh, args.H, space.panels, mine.first, mine.last, space.recurrent);
  const auto block = [](int g) { return input_block<CellType>(g); };
  if (args.ids == nullptr) {
    return pack_transposed(args.W_ih, args.I, space.panels, mine.first, mine.last, space.input,
                           block);
  }
  if (gathers_ids(args)) return;
  const int64_t ld = space.width;
  const int64_t end = last < args.H ? last : args.H;
  // All units of one gate at once, or each vector of them for every gate.
  const int64_t at_once = kSums<CellType> == 1 ? end - first : L;
  for (int64_t j = first; j < end; j += at_once) {
    const int64_t n = end - j < at_once ? end - j : at_once;
    for (int g = 0; g < kGates<CellType>; ++g) {
      pack_transposed_rows(args.W_ih + (block(g) * args.H + j) * args.I, args.I, args.I, n,
                           space.table + j * kSums<CellType> + g * L, ld);
    }
  }
  for (int64_t v = 0; v < args.I; ++v) {
    SumOf<scalar>* entry = space.table + v * ld;
    for (int64_t j = first * kSums<CellType>; j < last * kSums<CellType>; j += L) {
      const bool of_state_alone =
          kFirstOfState<CellType> > 0 && j / L % kSums<CellType> >= kGates<CellType>;
      const auto bias = load(space.bias + j);
      store(entry + j, of_state_alone ? bias : load(entry + j) + bias);
    }
  }
}

// The sums of the input and the biases for some rows, one after the other, of the units of some
// panels.
template <typename CellType, typename scalar>
void project(const ForwardArgs<scalar>& args, const ForwardSpace<CellType, scalar>& space,
             Range mine, const int64_t* rows, int64_t count) {
  using Sum = SumOf<scalar>;
  constexpr int64_t L = kLanes<Sum>;
  const Panels<Sum>& panels = space.panels;
  Sum* out[kChunkRows];
  for (int64_t i = 0; i < count; ++i) out[i] = space.projected + i * space.width;
  if (args.ids != nullptr) {
    const int64_t first = panels.first_column(mine.first);
    const int64_t last = panels.first_column(mine.last);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t id = args.ids[rows[i]];
      if (gathers_ids(args)) {
        for (int64_t j = first; j < last; ++j) {
          const int64_t at = j / L * L * kSums<CellType> + j % L;
          for (int s = 0; s < kSums<CellType>; ++s) {
            Sum sum = space.bias[at + s * L];
            if (s < kGates<CellType> && j < args.H) {
              const int64_t row = input_block<CellType>(s) * args.H + j;
              sum = as_sum(args.W_ih[row * args.I + id]) + sum;
            }
            out[i][at + s * L] = sum;
          }
        }
      } else {
        const int64_t from = space.sums_of(mine.first), to = space.sums_of(mine.last);
        std::memcpy(out[i] + from, space.table + id * space.width + from,
                    (to - from) * sizeof(Sum));
      }
    }
    return;
  }
  const scalar* x[kChunkRows];
  const Sum* bias[kChunkRows];
  for (int64_t i = 0; i < count; ++i) {
    x[i] = args.x + rows[i] * args.ldx;
    bias[i] = space.bias;
  }
  TileArgs<scalar, Sum, Sum> product = {.a = x, .K = args.I, .init = bias, .out = out};
  multiply<Store<kSums<CellType>>>(product, count, panels, mine, space.input);
}

// A step of rows that start from zeros: their sums are those of the input alone.
template <typename CellType, typename scalar>
void forward_from_zeros(const TileArgs<scalar, SumOf<scalar>>& args, Range rows, Range units) {
  constexpr int L = kLanes<SumOf<scalar>>;
  for (int64_t i = rows.first; i < rows.last; ++i) {
    const ForwardRow<scalar> out = {.y = args.out[i],
                                    .saved = args.saved != nullptr ? args.saved[i] : nullptr,
                                    .cells = args.cells != nullptr ? args.cells[i] : nullptr};
    for (int64_t j = units.first; j < units.last; j += L) {
      const int64_t n = units.last - j < L ? units.last - j : L;
      Vec<SumOf<scalar>> sums[kSums<CellType>];
#pragma GCC unroll 4
      for (int s = 0; s < kSums<CellType>; ++s) {
        sums[s] = load(args.init[i] + j * kSums<CellType> + s * L);
      }
      SumOf<scalar>* c = kHasState<CellType> ? args.carry[i] + j : nullptr;
      forward_units<CellType>(sums, Vec<SumOf<scalar>>{}, out, c, j, n, args.H);
    }
  }
}

// The sums of the input for the slots of a block: made for a chunk of steps at once, which runs
// ahead of the recurrence, and used one step after the other.
template <typename CellType, typename scalar>
class ProjectionAhead {
 public:
  // `walk` is that of the recurrence, before its first step; slot[i] the slot of its row i.
  ProjectionAhead(const ForwardArgs<scalar>& args, const ForwardSpace<CellType, scalar>& space,
                  Range panels, const int64_t* slot, int64_t slots, const StepWalk& walk)
      : args_(args), space_(space), panels_(panels), slot_(slot), slots_(slots), walk_(walk) {}

  // Makes the next chunk when the last one is used up.
  void make() {
    if (steps > 0) return;
    int64_t rows[kChunkRows];
    int64_t count = 0;
    while (count + slots_ <= space_.chunk_rows && walk_.next()) {
      for (int64_t i = 0; i < walk_.running; ++i)
        rows[count++] = row_of(args_.seq, walk_.t, slot_[i]);
      ++steps;
    }
    project(args_, space_, panels_, rows, count);
    next_ = space_.projected;
  }
  // The sums of row i of the next step.
  const SumOf<scalar>* row(int64_t i) const { return next_ + i * space_.width; }
  // Passes over n steps, `distance` scalars apart.
  void use(int64_t n, int64_t distance) {
    steps -= n;
    next_ += n * distance;
  }

  int64_t steps = 0;  // that are made and not yet used

 private:
  const ForwardArgs<scalar>& args_;
  const ForwardSpace<CellType, scalar>& space_;
  Range panels_;
  const int64_t* slot_;
  int64_t slots_;
  StepWalk walk_;
  const SumOf<scalar>* next_ = nullptr;
};

// Runs slots [slots.first, slots.last), at most kBlockSlots of them, through all steps, computing
// the units of some panels. Between steps it waits for the team when others compute the other
// units.
template <typename CellType, typename scalar>
void forward_block(const ForwardArgs<scalar>& args, const ForwardSpace<CellType, scalar>& space,
                   Range slots, Range mine, const Team* others) {
  using Sum = SumOf<scalar>;
  constexpr int64_t kSaved = CellType::kSizes.saved;
  const Panels<Sum>& panels = space.panels;
  const Sequences& seq = args.seq;
  const int64_t first = panels.first_column(mine.first);
  const int64_t end = panels.first_column(mine.last);
  const int64_t last = end < args.H ? end : args.H;

  int64_t slot[kBlockSlots];
  Sum* c[kBlockSlots];
  for (int64_t i = 0; i < slots.last - slots.first; ++i) {
    slot[i] = inwards(seq, slots, i);
    if constexpr (kHasState<CellType>) {
      c[i] = space.c + i * panels.padded_columns();
      const scalar* c0 = state_or<scalar>(args.c0, start_row_of(seq, slot[i]), args.H, nullptr);
      for (int64_t j = first; j < last; j += kLanes<Sum>) {
        const int64_t n = last - j < kLanes<Sum> ? last - j : kLanes<Sum>;
        store(c[i] + j, c0 != nullptr ? load_lanes(c0 + j, n) : Vec<Sum>{});
      }
    }
  }
  if constexpr (kFirstOfState<CellType> > 0) {
    // Sums that the input has no part in; projections leave them as they are.
    for (int64_t i = 0; args.ids == nullptr && i < space.chunk_rows; ++i) {
      for (int64_t p = mine.first; p < mine.last; ++p) {
        constexpr int64_t L = kLanes<Sum>;
        const int64_t at = space.sums_of(p) + kGates<CellType> * L;
        store(space.projected + i * space.width + at, load(space.bias + at));
      }
    }
  }
  StepWalk walk(seq, slots.first, slots.last, args.reverse);
  ProjectionAhead projection(args, space, mine, slot, slots.last - slots.first, walk);
  const scalar* previous[kBlockSlots];
  const Sum* init[kBlockSlots];
  scalar* current[kBlockSlots];
  scalar* saved[kBlockSlots];
  scalar* cells[kBlockSlots];
  TileArgs<scalar, Sum> product = {.a = previous, .K = args.H, .init = init, .out = current};
  product.H = args.H;
  product.projected = init;
  product.carry = c;
  const int64_t step_rows = args.reverse ? -seq.step_rows : seq.step_rows;
  product.a_step = product.out_step = step_rows * args.ldy;
  if (args.saved != nullptr) {
    product.saved = saved;
    product.saved_step = step_rows * kSaved * args.H;
  }
  if (args.cells != nullptr) {
    product.cells = cells;
    product.cells_step = step_rows * args.ldcells;
  }
  const int64_t rows_running = rows_of_running_tile(panels);
  // A table's rows are read where they are, but by a tile that runs step after step.
  const bool looks_up = args.ids != nullptr && !gathers_ids(args) && rows_running == 0;
  bool backwards = false;  // through the panels: those that were read last are still in the cache
  while (walk.next()) {
    if (!looks_up) projection.make();
    const int64_t before = args.reverse ? walk.t + 1 : walk.t - 1;
    int64_t active = walk.running;
    for (int64_t i = 0; i < walk.running; ++i) {
      const int64_t row = row_of(seq, walk.t, slot[i]);
      current[i] = args.y + row * args.ldy;
      if (args.saved != nullptr) saved[i] = args.saved + row * kSaved * args.H;
      if (args.cells != nullptr) cells[i] = args.cells + row * args.ldcells;
      init[i] = looks_up ? space.table + args.ids[row] * space.width : projection.row(i);
    }
    for (int64_t i = 0; i < walk.continuing; ++i) {
      previous[i] = args.y + row_of(seq, before, slot[i]) * args.ldy;
    }
    if (args.h0 == nullptr) {
      active = walk.continuing;
    } else {
      for (int64_t i = walk.continuing; i < walk.running; ++i) {
        previous[i] = state_or<scalar>(args.h0, start_row_of(seq, slot[i]), args.H, space.zeros);
      }
    }
    product.steps = 1;
    if (walk.continuing == walk.running && walk.running <= rows_running) {
      const int64_t steady = walk.steady();
      product.steps = steady < projection.steps ? steady : projection.steps;
      walk.run(product.steps);
    }
    if (!looks_up) {
      product.init_step = walk.running * space.width;
      projection.use(product.steps, product.init_step);
    }
    multiply<ForwardOf<CellType>>(product, active, panels, mine, space.recurrent, backwards);
    backwards = !backwards;
    forward_from_zeros<CellType>(product, {active, walk.running}, {first, last});
    if (others != nullptr) wait_for_rows(*others, current, walk.running, args.H);
  }
  for (int64_t i = 0; i < slots.last - slots.first; ++i) {
    const int64_t state = end_row_of(seq, slot[i]);
    if (state < 0) continue;
    const scalar* y =
        args.y + row_of(seq, last_step(seq, slot[i], args.reverse), slot[i]) * args.ldy;
    std::memcpy(args.h_n + state * args.H + first, y + first, (last - first) * sizeof(scalar));
    if constexpr (kHasState<CellType>) {
      for (int64_t j = first; j < last; j += kLanes<Sum>) {
        const int64_t n = last - j < kLanes<Sum> ? last - j : kLanes<Sum>;
        store_lanes(args.c_n + state * args.H + j, load(c[i] + j), n);
      }
    }
  }
}

template <typename CellType, typename scalar>
void forward_all(const ForwardArgs<scalar>& args, const Team& team) {
  const int64_t longer = slots_longer_than_one(args.seq);
  if (longer < args.seq.B) forward_one_step<CellType>(args, {longer, args.seq.B}, team);
  if (longer == 0) return;
  const ForwardSpace<CellType, scalar> space(args, team, args.workspace);
  pack_forward(args, space);
  wait_for(space.packers);
  const bool hidden = args.split == Split::kHidden;
  const Range all_panels = {0, space.panels.count};
  const Range panels = hidden ? share(space.panels.count, team) : all_panels;
  const Range slots = hidden ? Range{0, longer} : share(longer, team);
  const int64_t blocks = (slots.last - slots.first + kBlockSlots - 1) / kBlockSlots;
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t n = slots.last - slots.first;
    const Range block = {slots.first + i * n / blocks, slots.first + (i + 1) * n / blocks};
    forward_block(args, space, block, panels, hidden ? &team : nullptr);
  }
}

template <typename scalar>
void forward(const ForwardArgs<scalar>& args, const Team& team) {
  with_cell(args.cell, [&](auto cell) { forward_all<decltype(cell)>(args, team); });
}

}  // namespace
}  // namespace charrnn_fast
