// What backward of one direction of one layer works with: packed weights, where delta lies, and the
// sums that become the weights' gradients.
#pragma once

#include "cells-inl.h"
#include "outer-inl.h"
#include "pack-inl.h"
#include "sequences-inl.h"
#include "thin-inl.h"
#include "tile-inl.h"

namespace charrnn_fast {
namespace {

// Sums over the rows of one part of the sequences (see gradient_parts); null where not asked for.
template <typename Sum>
struct WeightSums {
  Sum* dW_ih;     // [G*H, I]
  Sum* dW_hh;     // [G*H, H]
  Sum* db;        // [sums*H]: of the deltas of every sum
  double* table;  // for ids: dW_ih', [I, G*H] in the order of the sums, as far as ids were seen
  bool* seen;     // [I], each member's own of its parts
};

// Where delta lies: the rows of each group of members are contiguous, so that no core prefetches
// lines that another group is about to write. A thread that works in chunks of steps keeps a ring
// of the last steps, which stays in cache.
template <typename scalar>
struct DeltaRows {
  scalar* rows;
  const int64_t* step_row;  // row of each step; null: (t & ring) * slots
  int64_t ring;             // steps that are kept, a power of two, less one; -1: all
  int64_t first_slot, slots;
  int64_t width;  // of a row: all sums of every unit, [sums][H]

  scalar* operator()(int64_t t, int64_t slot) const {
    return rows + (step(t) + slot - first_slot) * width;
  }
  // From a step to the one after it in the direction of +1 or -1.
  int64_t distance(int64_t t, int64_t direction) const {
    return (step(t + direction) - step(t)) * width;
  }
  // How many of `steps` steps from t on lie as far apart as t does from the one before it.
  int64_t regular(int64_t t, int64_t steps, int64_t direction) const {
    if (step_row == nullptr && ring < 0) return steps;
    const int64_t first = distance(t - direction, direction);
    int64_t n = 1;
    while (n < steps && distance(t + (n - 1) * direction, direction) == first) ++n;
    return n;
  }

 private:
  int64_t step(int64_t t) const { return step_row != nullptr ? step_row[t] : (t & ring) * slots; }
};

// What is decided before anything is laid out: which rows are summed together and by which members,
// what is packed, and how many steps' deltas are kept.
template <typename CellType, typename scalar>
struct BackwardPlan {
  using Sum = SumOf<scalar>;
  static constexpr int kMostParts = 2;
  // The first part is summed in the results, where they are of the type of sums.
  static constexpr bool kSumsAreResults = std::is_same_v<Sum, scalar>;

  int64_t K;           // terms of a product of deltas: G*H
  Panels<Sum> hidden;  // columns of W_hh, of dW_hh
  Panels<Sum> inputs;  // columns of W_ih, of dW_ih
  int parts;
  bool direct;  // no sums beside the results, which are summed in place or stored at once

  // Members that share the hidden units are one group. Otherwise there may be a group for each
  // part, which needs no rows of another group.
  int groups;
  Team group;
  int first_part, last_part;  // of the group
  Range slots;                // of those
  int64_t chunk;              // steps that are run before what follows from their deltas
  int64_t kept;               // steps whose deltas are kept; fewer than T: a ring of them

  // Of sequences of one step only dh0 needs W_hh.
  bool packs_recurrent, packs_input;
  Team packers;  // the members that share what is packed

  BackwardPlan(const BackwardArgs<scalar>& args, const Team& team)
      : K(kGates<CellType> * args.H),
        hidden(args.H),
        inputs(args.I),
        parts(gradient_parts(args.cell, args.seq.B, args.seq.N, args.H)) {
    const Sequences& seq = args.seq;
    const bool by_batch = args.split == Split::kBatch;
    groups = by_batch && team.size % parts == 0 ? parts : 1;
    group = subteam(team, groups);
    first_part = team.rank / group.size * (parts / groups);
    last_part = first_part + parts / groups;
    slots = {first_slot_of_part(seq, first_part, parts), first_slot_of_part(seq, last_part, parts)};
    const bool apart = by_batch && K * (args.H + args.I) <= kPackedByAll;
    packers = subteam(team, apart ? team.size : 1);
    packs_recurrent = length_of(seq, 0) > 1 || (args.dh0 != nullptr && seq.B > kThinRows<scalar>);
    packs_input = args.dx != nullptr && seq.N > kThinRows<scalar>;
    direct = parts == 1 && (kSumsAreResults || rows_in(seq) <= kOuterRows<scalar>);

    // Rows of a chunk, of each part.
    constexpr int64_t kRows = kOuterRows<scalar>;
    constexpr int64_t kChunk = kSums<CellType> == 1 ? 2 * kRows : kRows;
    const auto steps_of = [&](int64_t of_slots) {
      const int64_t steps = kChunk * (last_part - first_part) / (of_slots > 0 ? of_slots : 1);
      return steps > 1 ? steps : 1;
    };
    chunk = group.size > 1 ? seq.T : steps_of(slots.last - slots.first);
    // Those of a chunk, the one before it, and those with rows that are not yet summed. Sequences
    // of their own lengths begin at steps far apart, whose deltas dh0 wants.
    kept = 1;
    const int64_t smallest = seq.B / parts;  // slots of a part
    if (group.size == 1 && seq.lengths == nullptr && smallest > 0) {
      const int64_t needed =
          steps_of(smallest * (last_part - first_part)) + (kRows + smallest - 1) / smallest + 2;
      while (kept < needed) kept *= 2;
    } else {
      kept = seq.T;
    }
  }
};

// A plan, and its memory.
template <typename CellType, typename scalar>
struct BackwardSpace : BackwardPlan<CellType, scalar> {
  using Plan = BackwardPlan<CellType, scalar>;
  using Sum = SumOf<scalar>;

  WeightSums<Sum> sums[Plan::kMostParts];
  DeltaRows<scalar> delta;
  Sum* carry;  // [B][padded H], by slot
  // Shared by the members that pack it:
  PackedOf<scalar>* recurrent;  // W_hh in panels
  PackedOf<scalar>* input;      // W_ih in panels
  Sum* zero_sums;               // a row of zeros, for operands that are absent
  scalar* zeros;                // the same memory
  // Each member's own:
  int64_t* step_row;         // of delta, when sequences differ in length
  PackedOf<scalar>* packed;  // what OuterProducts packs
  size_t bytes;

  BackwardSpace(const BackwardArgs<scalar>& args, const Team& team, void* base) : Plan(args, team) {
    const Plan& plan = *this;
    const Sequences& seq = args.seq;
    const int64_t K = plan.K;
    const int parts = plan.parts, first_part = plan.first_part, last_part = plan.last_part;
    const bool ring = plan.kept < seq.T;

    Arena arena(base);
    const bool dense = args.dW_ih != nullptr && args.ids == nullptr;
    const bool tokens = args.dW_ih != nullptr && args.ids != nullptr;
    for (int part = 0; part < parts; ++part) {
      const auto take = [&](scalar* result, int64_t n) -> Sum* {
        if constexpr (Plan::kSumsAreResults) {
          if (part == 0) return result;
        }
        return result != nullptr ? arena.take<Sum>(plan.direct ? 0 : n) : nullptr;
      };
      const bool biases = args.db_ih != nullptr || args.db_hh != nullptr;
      sums[part] = {take(dense ? args.dW_ih : nullptr, K * args.I), take(args.dW_hh, K * args.H),
                    biases ? arena.take<Sum>(kSums<CellType> * args.H) : nullptr,
                    tokens ? arena.take<double>(args.I * K) : nullptr, nullptr};
      arena.next_page();
    }
    arena.take_each(team.size / plan.packers.size, team.rank / plan.packers.size, [&] {
      const auto take = [&](bool wanted, const Panels<Sum>& panels) {
        return arena.take<PackedOf<scalar>>(wanted ? packed_size<scalar>(panels, K) : 0);
      };
      recurrent = take(plan.packs_recurrent, plan.hidden);
      input = take(plan.packs_input, plan.inputs);
      zero_sums = arena.take<Sum>(zero_columns());
      zeros = reinterpret_cast<scalar*>(zero_sums);
    });
    const int64_t width = kSums<CellType> * args.H;
    arena.next_page();
    scalar* deltas = arena.take<scalar>((ring ? plan.kept * seq.B : rows_in(seq)) * width);
    arena.next_page();
    carry = arena.take<Sum>(CellType::kCarries ? seq.B * plan.hidden.padded_columns() : 0);
    arena.take_each(team.size, team.rank, [&] {
      step_row = seq.lengths != nullptr ? arena.take<int64_t>(seq.T) : nullptr;
      packed = arena.take<PackedOf<scalar>>(
          OuterProducts<scalar>::space(args.H, kSums<CellType>, args.H));
    });
    bool* seen = tokens ? arena.take<bool>(team.size * parts * args.I) : nullptr;
    for (int part = 0; part < parts; ++part) {
      const bool own = first_part <= part && part < last_part;
      // In another group the last member: it has units however few there are.
      const int member =
          own ? team.rank : (part / (last_part - first_part) + 1) * plan.group.size - 1;
      if (tokens) sums[part].seen = seen + (member * parts + part) * args.I;
    }
    bytes = arena.used();

    const int64_t rows_before =
        ring ? plan.kept * plan.slots.first : rows_in(seq, {0, plan.slots.first}, {0, seq.T});
    delta = {deltas != nullptr ? deltas + rows_before * width : nullptr,
             step_row,
             ring ? plan.kept - 1 : -1,
             plan.slots.first,
             plan.slots.last - plan.slots.first,
             width};
  }

  // The terms of a product of deltas: of the sums that h, or the input, has part in.
  const scalar* delta_of_state(int64_t t, int64_t slot, int64_t H) const {
    return delta(t, slot) + kFirstOfState<CellType> * H;
  }

  int64_t zero_columns() const {
    const int64_t a = this->hidden.padded_columns(), b = this->inputs.padded_columns();
    return a > b ? a : b;
  }
};

template <typename scalar>
size_t backward_workspace(const BackwardArgs<scalar>& args, int team_size) {
  return with_cell(args.cell, [&](auto cell) {
    return BackwardSpace<decltype(cell), scalar>(args, Team{0, team_size, nullptr, nullptr},
                                                 nullptr)
        .bytes;
  });
}

template <typename CellType, typename scalar>
void prepare_backward(const BackwardArgs<scalar>& args,
                      const BackwardSpace<CellType, scalar>& space) {
  const Team& team = space.packers;
  if (team.rank == 0) {
    std::memset(space.zero_sums, 0, space.zero_columns() * sizeof(*space.zero_sums));
  }
  const int64_t K = space.K;
  const Range mine = share(space.packs_recurrent ? space.hidden.count : 0, team);
  for (int64_t p = mine.first; p < mine.last; ++p) {
    pack_rows<scalar>([&](int64_t k) { return args.W_hh + k * args.H; }, K, space.hidden, p,
                      space.recurrent + packed_place<scalar>(space.hidden, p, K));
  }
  // In the order of the sums.
  const auto row_of_W_ih = [&](int64_t k) {
    const int64_t row = k + CellType::kRotation * args.H;
    return args.W_ih + (row < K ? row : row - K) * args.I;
  };
  const Range also = share(space.packs_input ? space.inputs.count : 0, team);
  for (int64_t p = also.first; p < also.last; ++p) {
    pack_rows<scalar>(row_of_W_ih, K, space.inputs, p,
                      space.input + packed_place<scalar>(space.inputs, p, K));
  }
  if (space.step_row != nullptr) {
    int64_t row = 0, end = space.slots.last;
    for (int64_t t = 0; t < args.seq.T; ++t) {
      while (end > space.slots.first && length_of(args.seq, end - 1) <= t) --end;
      space.step_row[t] = row;
      row += end - space.slots.first;
    }
  }
  wait_for(team);
}

}  // namespace
}  // namespace charrnn_fast
