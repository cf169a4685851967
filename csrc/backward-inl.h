// Backward of one direction of one layer: delta first, step by step; then dx, dh0 and the weights'
// gradients as products over rows. Who needs no rows of other threads does so in chunks of steps,
// whose rows are still in the cache then.

// Rows of a chunk, of each part.
template <typename scalar>
constexpr int64_t kBackwardRows = 2 * kOuterRows<scalar>;

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
  // Of the first part, where they are of the same type.
  static constexpr bool kSumsAreResults = std::is_same_v<Sum, scalar>;

  Panels<Sum> hidden;  // columns of W_hh, of dW_hh
  Panels<Sum> inputs;  // columns of W_ih, of dW_ih
  int parts;
  WeightSums<Sum> sums[kMostParts];

  // Members that share the hidden units are one group. Else there may be as many groups as parts,
  // each of which has its own one, and needs no rows of the others.
  int groups;
  Team group;
  int first_part, last_part;  // of the group
  Range slots;                // of those
  DeltaRows<scalar> delta;

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
      : hidden(args.H), inputs(args.I), parts(gradient_parts(args.seq.B, args.seq.N, args.H)) {
    const Sequences& seq = args.seq;
    const bool by_batch = args.split == Split::kBatch;
    groups = by_batch && team.size % parts == 0 ? parts : 1;
    group = subteam(team, groups);
    first_part = team.rank / group.size * (parts / groups);
    last_part = first_part + parts / groups;
    slots = {first_slot_of_part(seq, first_part, parts), first_slot_of_part(seq, last_part, parts)};
    const bool apart = by_batch && args.H * (args.H + args.I) <= kPackedByAll;
    packers = subteam(team, apart ? team.size : 1);

    Arena arena(base);
    const bool dense = args.dW_ih != nullptr && args.ids == nullptr;
    const bool tokens = args.dW_ih != nullptr && args.ids != nullptr;
    for (int part = 0; part < parts; ++part) {
      const auto take = [&](scalar* result, int64_t n) -> Sum* {
        if constexpr (kSumsAreResults) {
          if (part == 0) return result;
        }
        return result != nullptr ? arena.take<Sum>(n) : nullptr;
      };
      sums[part] = {take(dense ? args.dW_ih : nullptr, args.H * args.I),
                    take(args.dW_hh, args.H * args.H), take(args.db, args.H),
                    tokens ? arena.take<double>(args.I * args.H) : nullptr, nullptr};
      arena.next_page();
    }
    arena.take_each(team.size / packers.size, team.rank / packers.size, [&] {
      const int64_t rows = packed_rows<scalar>(args.H);
      const int64_t of_input = args.dx != nullptr ? rows * inputs.padded_columns() : 0;
      recurrent = arena.take<PackedOf<scalar>>(rows * hidden.padded_columns());
      input = arena.take<PackedOf<scalar>>(of_input);
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
  // A single step reads W_hh for dh0 only.
  const bool reads_recurrent = length_of(args.seq, 0) > 1 || args.dh0 != nullptr;
  const Range mine = share(reads_recurrent ? space.hidden.count : 0, team);
  const int64_t rows = packed_rows<scalar>(args.H);
  for (int64_t p = mine.first; p < mine.last; ++p) {
    pack_rows<scalar>([&](int64_t k) { return args.W_hh + k * args.H; }, args.H, space.hidden, p,
                      space.recurrent + space.hidden.first_column(p) * rows);
  }
  const Range also = share(args.dx != nullptr ? space.inputs.count : 0, team);
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

// delta of a sequence's last step, in a range of columns.
template <Activation activation, typename scalar>
void backward_start(const scalar* dy, const scalar* dh_n, const scalar* y, scalar* delta,
                    int64_t first, int64_t last) {
  using Sum = SumOf<scalar>;
  constexpr int L = kLanes<Sum>;
  for (int64_t j = first; j < last; j += L) {
    const int64_t n = last - j < L ? last - j : L;
    const Vec<Sum> g = load_lanes(dy + j, n) + load_lanes(dh_n + j, n);
    store_lanes(delta + j, activate_backward<activation, Sum>(g, load_lanes(y + j, n)), n);
  }
}

// delta of slots [slots.first, slots.last), at most kBlockSlots of them, at some steps, in the
// columns of some panels.
template <Activation activation, typename scalar>
void backward_block(const BackwardArgs<scalar>& args, const BackwardSpace<scalar>& space,
                    Range steps, Range slots, Range mine, const Team* others) {
  const Panels<SumOf<scalar>>& panels = space.hidden;
  const Sequences& seq = args.seq;
  const int64_t first = panels.first_column(mine.first);
  const int64_t end = panels.first_column(mine.last);
  const int64_t last = end < args.H ? end : args.H;

  StepWalk walk(seq, slots.first, slots.last, !args.reverse, steps);
  const scalar* next[kBlockSlots];
  const scalar* init[kBlockSlots];
  scalar* delta[kBlockSlots];
  const scalar* y[kBlockSlots];
  TileArgs<scalar> product = {.a = next, .K = args.H, .init = init, .out = delta, .y = y};
  const int64_t direction = args.reverse ? 1 : -1;
  product.a_step = product.out_step = direction * space.delta.slots * args.H;
  product.y_step = direction * seq.B * args.ldy;
  product.init_step = args.dy != nullptr ? direction * seq.B * args.lddy : 0;
  const int64_t rows_running = rows_of_running_tile(panels);
  bool backwards = false;  // as in forward_block
  while (walk.next()) {
    const int64_t after = args.reverse ? walk.t - 1 : walk.t + 1;
    for (int64_t i = 0; i < walk.running; ++i) {
      const int64_t row = row_of(seq, walk.t, slots.first + i);
      delta[i] = space.delta(walk.t, slots.first + i);
      y[i] = args.y + row * args.ldy;
      init[i] = args.dy != nullptr ? args.dy + row * args.lddy : space.zeros;
    }
    for (int64_t i = 0; i < walk.continuing; ++i) {
      next[i] = space.delta(after, slots.first + i);
    }
    product.steps = 1;
    if (walk.continuing == walk.running && walk.running <= rows_running) {
      product.steps = walk.steady();
      walk.run(product.steps);
    }
    for (int64_t i = mine.first; i < mine.last; ++i) {
      const int64_t p = backwards ? mine.first + mine.last - 1 - i : i;
      multiply_rows<Finish::kBackward, activation>(product, walk.continuing, panels, p,
                                                   space.recurrent);
    }
    backwards = !backwards;
    for (int64_t i = walk.continuing; i < walk.running; ++i) {
      const scalar* from_state = args.dh_n != nullptr
                                     ? args.dh_n + state_row_of(seq, slots.first + i) * args.H
                                     : space.zeros;
      backward_start<activation>(init[i], from_state, y[i], delta[i], first, last);
    }
    if (others != nullptr) wait_for_rows(*others, delta, walk.running, args.H);
  }
}

// dx = delta W_ih for the next rows of a walk.
template <typename scalar>
void backward_input(const BackwardArgs<scalar>& args, const BackwardSpace<scalar>& space,
                    RowWalk& walk, int64_t rows) {
  const scalar* delta[kChunkRows];
  const scalar* init[kChunkRows];
  scalar* dx[kChunkRows];
  TileArgs<scalar> product = {.a = delta, .K = args.H, .init = init, .out = dx};
  for (int64_t done = 0; done < rows;) {
    const int64_t count = rows - done < kChunkRows ? rows - done : kChunkRows;
    for (int64_t i = 0; i < count; ++i, walk.next()) {
      const int64_t slot = inwards(args.seq, space.slots, walk.slot - space.slots.first);
      delta[i] = space.delta(walk.t, slot);
      dx[i] = args.dx + row_of(args.seq, walk.t, slot) * args.I;
      init[i] = space.zeros;
    }
    done += count;
    for (int64_t p = 0; p < space.inputs.count; ++p) {
      multiply_rows<Finish::kStore>(product, count, space.inputs, p, space.input);
    }
  }
}

// dh0 = delta W_hh at each sequence's first step.
template <typename scalar>
void backward_state(const BackwardArgs<scalar>& args, const BackwardSpace<scalar>& space,
                    Range slots) {
  const scalar* delta[kChunkRows];
  const scalar* init[kChunkRows];
  scalar* dh0[kChunkRows];
  TileArgs<scalar> product = {.a = delta, .K = args.H, .init = init, .out = dh0};
  for (int64_t done = slots.first; done < slots.last;) {
    const int64_t count = slots.last - done < kChunkRows ? slots.last - done : kChunkRows;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t slot = done + i;
      delta[i] = space.delta(first_step(args.seq, slot, args.reverse), slot);
      dh0[i] = args.dh0 + state_row_of(args.seq, slot) * args.H;
      init[i] = space.zeros;
    }
    done += count;
    for (int64_t p = 0; p < space.hidden.count; ++p) {
      multiply_rows<Finish::kStore>(product, count, space.hidden, p, space.recurrent);
    }
  }
}

// out[j] += sum of rows[k][j], for j in a range. A few rows are summed, then their sums, which
// rounds less.
template <typename scalar>
void add_rows(const scalar* const* rows, int64_t K, Range columns, SumOf<scalar>* out) {
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
      store(out + j + i * L, load(out + j + i * L) + total[i]);
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
    store_lanes(out + j, load_lanes(out + j, n) + total, n);
  }
}

// dW_ih, dW_hh and db of the units in a range are sums over rows, taken in the order in which delta
// is computed: zero first.
template <typename scalar>
void zero_weights(const BackwardArgs<scalar>& args, const WeightSums<SumOf<scalar>>& sums,
                  Range units) {
  const int64_t count = units.last - units.first;
  const auto zero = [&](SumOf<scalar>* p, int64_t columns) {
    if (p != nullptr) std::memset(p + units.first * columns, 0, count * columns * sizeof(*p));
  };
  zero(sums.dW_ih, args.I);
  zero(sums.dW_hh, args.H);
  zero(sums.db, 1);
  if (sums.table != nullptr) std::memset(sums.seen, 0, args.I * sizeof(bool));
}

// Then the next rows of a walk: a multiple of kOuterRows, or what is left.
template <typename scalar>
void add_weights(const BackwardArgs<scalar>& args, const BackwardSpace<scalar>& space,
                 const WeightSums<SumOf<scalar>>& sums, Range units, RowWalk& walk, int64_t total) {
  constexpr int64_t kRows = kOuterRows<scalar>;
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
      if (walk.t == first_step(args.seq, walk.slot, args.reverse)) {
        y_previous[k] =
            args.h0 != nullptr ? args.h0 + state_row_of(args.seq, walk.slot) * args.H : space.zeros;
      } else {
        const int64_t before = args.reverse ? walk.t + 1 : walk.t - 1;
        y_previous[k] = args.y + row_of(args.seq, before, walk.slot) * args.ldy;
      }
      if (sums.table != nullptr) {
        const int64_t id = args.ids[row];
        double* entry = sums.table + id * args.H;
        if (sums.seen[id]) {
          for (int64_t j = units.first; j < units.last; ++j) entry[j] += as_sum(delta[k][j]);
        } else {
          for (int64_t j = units.first; j < units.last; ++j) entry[j] = as_sum(delta[k][j]);
          sums.seen[id] = true;
        }
      }
    }
    if (sums.db != nullptr) add_rows(delta, K, units, sums.db);
    if (sums.dW_ih == nullptr && sums.dW_hh == nullptr) continue;
    const OuterProducts<scalar> products(delta, K, units, space.packed);
    if (sums.dW_ih != nullptr) products.add(x, space.inputs, sums.dW_ih);
    if (sums.dW_hh != nullptr) products.add(y_previous, space.hidden, sums.dW_hh);
  }
}

// Whether any id in [first, last) was seen.
template <typename scalar>
bool any_seen(const BackwardSpace<scalar>& space, int64_t first, int64_t last) {
  bool any = false;
  for (int part = 0; part < space.parts; ++part) {
    for (int64_t v = first; v < last; ++v) any |= space.sums[part].seen[v];
  }
  return any;
}

// dW_ih of the units in a range out of the tables of all parts.
template <typename scalar>
void store_tables(const BackwardArgs<scalar>& args, const BackwardSpace<scalar>& space,
                  Range units) {
  constexpr int64_t kIds = 64 / sizeof(scalar);  // a cache line of dW_ih
  constexpr int64_t kUnits = 128, kBlock = Transpose<scalar>::kBlock;
  alignas(64) scalar rows[kIds][kUnits];
  for (int64_t first = units.first; first < units.last; first += kUnits) {
    const int64_t count = units.last - first < kUnits ? units.last - first : kUnits;
    std::memset(args.dW_ih + first * args.I, 0, count * args.I * sizeof(scalar));
    for (int64_t v = 0; v < args.I; v += kIds) {
      const int64_t ids = args.I - v < kIds ? args.I - v : kIds;
      if (!any_seen(space, v, v + ids)) continue;
      for (int64_t i = 0; i < ids; ++i) {
        double sum[kUnits] = {};
        for (int part = 0; part < space.parts; ++part) {
          if (!space.sums[part].seen[v + i]) continue;
          const double* entry = space.sums[part].table + (v + i) * args.H + first;
          for (int64_t j = 0; j < count; ++j) sum[j] += entry[j];
        }
        for (int64_t j = 0; j < count; ++j) rows[i][j] = rounded<scalar>(sum[j]);
      }
      scalar* out = args.dW_ih + first * args.I + v;
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
  }
}

// And at last the sums of all parts together, as the results.
template <typename scalar>
void combine_parts(const BackwardArgs<scalar>& args, const BackwardSpace<scalar>& space,
                   Range units) {
  using Sum = SumOf<scalar>;
  constexpr int L = kLanes<Sum>;
  const auto combine = [&](Sum* WeightSums<Sum>::* sums, int64_t columns, scalar* result) {
    if (space.sums[0].*sums == nullptr) return;
    for (int64_t j = units.first * columns, end = units.last * columns; j < end; j += L) {
      const int64_t n = end - j < L ? end - j : L;
      Vec<Sum> sum = load_lanes(space.sums[0].*sums + j, n);
      for (int part = 1; part < space.parts; ++part) {
        sum += load_lanes(space.sums[part].*sums + j, n);
      }
      store_lanes(result + j, sum, n);
    }
  };
  if (space.parts > 1 || !space.kSumsAreResults) {
    combine(&WeightSums<Sum>::dW_ih, args.I, args.dW_ih);
    combine(&WeightSums<Sum>::dW_hh, args.H, args.dW_hh);
    combine(&WeightSums<Sum>::db, 1, args.db);
  }
  if (space.sums[0].table != nullptr) store_tables(args, space, units);
}

// The rows of a part, on their way into its sums.
struct RowsOfPart {
  RowsOfPart(const Sequences& seq, int part, int parts, bool down)
      : slots{first_slot_of_part(seq, part, parts), first_slot_of_part(seq, part + 1, parts)},
        walk(seq, slots, down) {}

  Range slots;
  RowWalk walk;
  int64_t summable = 0;  // whose delta is known, and which are not yet summed
};

template <Activation activation, typename scalar>
void backward_all(const BackwardArgs<scalar>& args, const Team& team) {
  const BackwardSpace<scalar> space(args, team, args.workspace);
  const Sequences& seq = args.seq;
  const Team& group = space.group;
  prepare_backward(args, space);

  const bool hidden = args.split == Split::kHidden;
  const Range panels = hidden ? share(space.hidden.count, team) : Range{0, space.hidden.count};
  const Range slots = hidden ? space.slots : share(space.slots, group);
  const int64_t n = slots.last - slots.first;
  const int64_t blocks = (n + kBlockSlots - 1) / kBlockSlots;

  const bool weights = args.dW_ih != nullptr || args.dW_hh != nullptr || args.db != nullptr;
  const Range units = share(args.H, group);
  static_assert(BackwardSpace<scalar>::kMostParts == 2);
  RowsOfPart rows[] = {{seq, 0, space.parts, !args.reverse},
                       {seq, space.parts - 1, space.parts, !args.reverse}};
  for (int part = space.first_part; weights && part < space.last_part; ++part) {
    zero_weights(args, space.sums[part], units);
  }
  RowWalk input_rows(seq, space.slots, !args.reverse);

  const int64_t T = length_of(seq, space.slots.first);
  const int64_t at_once =
      kBackwardRows<scalar> * (space.last_part - space.first_part) / (n > 0 ? n : 1);
  const int64_t chunk = group.size > 1 ? T : at_once > 1 ? at_once : 1;
  for (int64_t done = 0; done < T; done += chunk) {
    const int64_t end = done + chunk < T ? done + chunk : T;
    const Range steps = args.reverse ? Range{done, end} : Range{T - end, T - done};
    for (int64_t i = 0; i < blocks; ++i) {
      const Range block = {slots.first + i * n / blocks, slots.first + (i + 1) * n / blocks};
      backward_block<activation>(args, space, steps, block, panels, hidden ? &team : nullptr);
    }
    wait_for(group);
    if (args.dx != nullptr) {
      const Range mine = share(rows_in(seq, space.slots, steps), group);
      if (group.size > 1) input_rows.seek(mine.first);
      backward_input(args, space, input_rows, mine.last - mine.first);
    }
    for (int part = space.first_part; weights && part < space.last_part; ++part) {
      RowsOfPart& of_part = rows[part];
      of_part.summable += rows_in(seq, of_part.slots, steps);
      const int64_t now =
          end == T ? of_part.summable : of_part.summable / kOuterRows<scalar> * kOuterRows<scalar>;
      add_weights(args, space, space.sums[part], units, of_part.walk, now);
      of_part.summable -= now;
    }
  }
  if (args.dh0 != nullptr) backward_state(args, space, hidden ? share(seq.B, team) : slots);
  if (weights) {
    if (space.groups > 1) wait_for(team);
    combine_parts(args, space, share(args.H, team));
  }
}

template <typename scalar>
void backward(const BackwardArgs<scalar>& args, const Team& team) {
  switch (args.activation) {
    case Activation::kTanh:
      return backward_all<Activation::kTanh>(args, team);
    case Activation::kRelu:
      return backward_all<Activation::kRelu>(args, team);
    case Activation::kSigmoid:
      return backward_all<Activation::kSigmoid>(args, team);
  }
}
