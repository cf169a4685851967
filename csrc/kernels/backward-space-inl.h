// What backward of one direction of one layer works with: packed weights, where delta lies, and the
// sums that become the weights' gradients.

// Sums over the rows of one part of the sequences (see gradient_parts); null where not asked for.
template <typename Sum>
struct WeightSums {
  Sum* dW_ih;     // [H, I]
  Sum* dW_hh;     // [H, H]
  Sum* db;        // [H]
  double* table;  // for ids: dW_ih', [I, H], as far as ids were seen
  bool* seen;     // [I], each member's own of its parts
};

// Where delta lies: the rows of each group of members beside each other, so that no core fetches
// ahead what another group is about to write.
template <typename scalar>
struct DeltaRows {
  scalar* rows;
  const int64_t* step_row;  // row of each step; null: t * slots
  int64_t first_slot, slots, H;

  scalar* operator()(int64_t t, int64_t slot) const {
    const int64_t step = step_row != nullptr ? step_row[t] : t * slots;
    return rows + (step + slot - first_slot) * H;
  }
};

template <typename scalar>
struct BackwardSpace {
  using Sum = SumOf<scalar>;
  static constexpr int kMostParts = 2;
  // The first part is summed in the results, where they are of the type of sums.
  static constexpr bool kSumsAreResults = std::is_same_v<Sum, scalar>;

  Panels<Sum> hidden;  // columns of W_hh, of dW_hh
  Panels<Sum> inputs;  // columns of W_ih, of dW_ih
  int parts;
  WeightSums<Sum> sums[kMostParts];
  bool direct;  // there are none beside the results, which are summed in place or stored at once

  // Members that share the hidden units are one group. Else there may be as many groups as parts,
  // each of which has its own one, and needs no rows of the others.
  int groups;
  Team group;
  int first_part, last_part;  // of the group
  Range slots;                // of those
  DeltaRows<scalar> delta;

  // What is packed. Of sequences of one step only dh0 needs W_hh.
  bool packs_recurrent, packs_input;
  // Shared by the members that pack it.
  Team packers;
  PackedOf<scalar>* recurrent;  // W_hh in panels
  PackedOf<scalar>* input;      // W_ih in panels
  scalar* zeros;                // a row for whatever is absent

  // Each member's own:
  int64_t* step_row;         // of its group, when it is one of several and sequences are packed
  PackedOf<scalar>* packed;  // what OuterProducts packs
  size_t bytes;

  BackwardSpace(const BackwardArgs<scalar>& args, const Team& team, void* base)
      : hidden(args.H),
        inputs(args.I),
        parts(gradient_parts(args.cell, args.seq.B, args.seq.N, args.H)) {
    const Sequences& seq = args.seq;
    const bool by_batch = args.split == Split::kBatch;
    groups = by_batch && team.size % parts == 0 ? parts : 1;
    group = subteam(team, groups);
    first_part = team.rank / group.size * (parts / groups);
    last_part = first_part + parts / groups;
    slots = {first_slot_of_part(seq, first_part, parts), first_slot_of_part(seq, last_part, parts)};
    const bool apart = by_batch && args.H * (args.H + args.I) <= kPackedByAll;
    packers = subteam(team, apart ? team.size : 1);
    packs_recurrent = length_of(seq, 0) > 1 || (args.dh0 != nullptr && seq.B > kThinRows<scalar>);
    packs_input = args.dx != nullptr && seq.N > kThinRows<scalar>;

    direct = parts == 1 && (kSumsAreResults || rows_in(seq) <= kOuterRows<scalar>);

    Arena arena(base);
    const bool dense = args.dW_ih != nullptr && args.ids == nullptr;
    const bool tokens = args.dW_ih != nullptr && args.ids != nullptr;
    for (int part = 0; part < parts; ++part) {
      const auto take = [&](scalar* result, int64_t n) -> Sum* {
        if constexpr (kSumsAreResults) {
          if (part == 0) return result;
        }
        return result != nullptr ? arena.take<Sum>(direct ? 0 : n) : nullptr;
      };
      sums[part] = {take(dense ? args.dW_ih : nullptr, args.H * args.I),
                    take(args.dW_hh, args.H * args.H), take(args.db_ih, args.H),
                    tokens ? arena.take<double>(args.I * args.H) : nullptr, nullptr};
      arena.next_page();
    }
    arena.take_each(team.size / packers.size, team.rank / packers.size, [&] {
      const auto take = [&](bool wanted, const Panels<Sum>& panels) {
        const int64_t n = wanted ? packed_rows<scalar>(args.H) * panels.padded_columns() : 0;
        return arena.take<PackedOf<scalar>>(n);
      };
      recurrent = take(packs_recurrent, hidden);
      input = take(packs_input, inputs);
      zeros = arena.take<scalar>(zero_columns());
    });
    arena.take_each(team.size, team.rank, [&] {
      step_row = groups > 1 && seq.step_row != nullptr ? arena.take<int64_t>(seq.T) : nullptr;
      packed = arena.take<PackedOf<scalar>>(OuterProducts<scalar>::space(args.H));
    });
    bool* seen = tokens ? arena.take<bool>(team.size * parts * args.I) : nullptr;
    for (int part = 0; part < parts; ++part) {
      const bool own = first_part <= part && part < last_part;
      // Of another group the last member, which has units of its own however few there are.
      const int member = own ? team.rank : (part / (last_part - first_part) + 1) * group.size - 1;
      if (tokens) sums[part].seen = seen + (member * parts + part) * args.I;
    }
    bytes = arena.used();

    const Range before = {0, slots.first};
    const int64_t rows_before =
        seq.step_row != nullptr ? rows_in(seq, before, {0, seq.T}) : seq.T * slots.first;
    delta = {args.delta + rows_before * args.H, groups > 1 ? step_row : seq.step_row, slots.first,
             slots.last - slots.first, args.H};
  }

  int64_t zero_columns() const {
    const int64_t a = hidden.padded_columns(), b = inputs.padded_columns();
    return a > b ? a : b;
  }
};

template <typename scalar>
size_t backward_workspace(const BackwardArgs<scalar>& args, int team_size) {
  return BackwardSpace<scalar>(args, Team{0, team_size, nullptr, nullptr}, nullptr).bytes;
}

template <typename scalar>
void prepare_backward(const BackwardArgs<scalar>& args, const BackwardSpace<scalar>& space) {
  const Team& team = space.packers;
  if (team.rank == 0) std::memset(space.zeros, 0, space.zero_columns() * sizeof(scalar));
  const Range mine = share(space.packs_recurrent ? space.hidden.count : 0, team);
  const int64_t rows = packed_rows<scalar>(args.H);
  for (int64_t p = mine.first; p < mine.last; ++p) {
    pack_rows<scalar>([&](int64_t k) { return args.W_hh + k * args.H; }, args.H, space.hidden, p,
                      space.recurrent + space.hidden.first_column(p) * rows);
  }
  const Range also = share(space.packs_input ? space.inputs.count : 0, team);
  for (int64_t p = also.first; p < also.last; ++p) {
    pack_rows<scalar>([&](int64_t k) { return args.W_ih + k * args.I; }, args.H, space.inputs, p,
                      space.input + space.inputs.first_column(p) * rows);
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
