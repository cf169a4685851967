// Forward of one direction of one layer.

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

// Few ids are looked up in W_ih itself, where those of a column lie far apart.
template <typename scalar>
bool gathers_ids(const ForwardArgs<scalar>& args) {
  return args.ids != nullptr && 8 * args.seq.N < args.I;
}

template <typename scalar>
struct ForwardSpace {
  using Sum = SumOf<scalar>;

  Panels<Sum> panels;
  // Shared by the members that pack it.
  Team packers;
  PackedOf<scalar>* input;      // W_ih' in panels; unless ids are given
  Sum* table;                   // for those: W_ih' + bias, [I][padded H]
  PackedOf<scalar>* recurrent;  // W_hh' in panels
  Sum* bias;                    // b_ih + b_hh, padded
  // Each member's own: what its next steps make of x. It does not wait in y, where each element
  // would be written twice: another core that fetches ahead may take the line away in between.
  Sum* projected;  // [kChunkRows][padded H]
  size_t bytes;

  ForwardSpace(const ForwardArgs<scalar>& args, const Team& team, void* base) : panels(args.H) {
    const bool apart = args.split == Split::kBatch && args.H * (args.H + args.I) <= kPackedByAll;
    packers = subteam(team, apart ? team.size : 1);
    Arena arena(base);
    arena.take_each(team.size / packers.size, team.rank / packers.size, [&] {
      const bool tokens = args.ids != nullptr;
      input = tokens ? nullptr : arena.take<PackedOf<scalar>>(packed_size(args.I));
      table = tokens ? arena.take<Sum>(args.I * panels.padded_columns()) : nullptr;
      recurrent = arena.take<PackedOf<scalar>>(packed_size(args.H));
      bias = arena.take<Sum>(panels.padded_columns());
    });
    arena.take_each(team.size, team.rank,
                    [&] { projected = arena.take<Sum>(kChunkRows * panels.padded_columns()); });
    bytes = arena.used();
  }

  int64_t packed_size(int64_t K) const { return packed_rows<scalar>(K) * panels.padded_columns(); }
};

template <typename scalar>
size_t forward_workspace(const ForwardArgs<scalar>& args, int team_size) {
  if (slots_longer_than_one(args.seq) == 0) return 0;
  return ForwardSpace<scalar>(args, Team{0, team_size, nullptr, nullptr}, nullptr).bytes;
}

template <typename scalar>
void pack_forward(const ForwardArgs<scalar>& args, const ForwardSpace<scalar>& space) {
  const Range mine = share(space.panels.count, space.packers);
  const int64_t first = space.panels.first_column(mine.first);
  const int64_t last = space.panels.first_column(mine.last);
  add_biases(args, first, last, space.bias + first);
  pack_transposed(args.W_hh, args.H, space.panels, mine.first, mine.last, space.recurrent);
  if (args.ids == nullptr) {
    return pack_transposed(args.W_ih, args.I, space.panels, mine.first, mine.last, space.input);
  }
  if (gathers_ids(args)) return;
  constexpr int L = kLanes<SumOf<scalar>>;
  const int64_t ld = space.panels.padded_columns();
  const int64_t end = last < args.H ? last : args.H;
  pack_transposed_rows(args.W_ih + first * args.I, args.I, args.I, end - first, space.table + first,
                       ld);
  for (int64_t v = 0; v < args.I; ++v) {
    SumOf<scalar>* entry = space.table + v * ld;
    for (int64_t j = first; j < last; j += L)
      store(entry + j, load(entry + j) + load(space.bias + j));
  }
}

// x W_ih' + bias for some rows, one after the other, in the columns of some panels.
template <typename scalar>
void project(const ForwardArgs<scalar>& args, const ForwardSpace<scalar>& space, Range mine,
             const int64_t* rows, int64_t count) {
  using Sum = SumOf<scalar>;
  const Panels<Sum>& panels = space.panels;
  Sum* out[kChunkRows];
  for (int64_t i = 0; i < count; ++i) out[i] = space.projected + i * panels.padded_columns();
  if (args.ids != nullptr) {
    const int64_t first = panels.first_column(mine.first);
    const int64_t end = panels.first_column(mine.last), last = end < args.H ? end : args.H;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t id = args.ids[rows[i]];
      if (gathers_ids(args)) {
        for (int64_t j = first; j < last; ++j) {
          out[i][j] = as_sum(args.W_ih[j * args.I + id]) + space.bias[j];
        }
      } else {
        std::memcpy(out[i] + first, space.table + id * panels.padded_columns() + first,
                    (last - first) * sizeof(Sum));
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
  for (int64_t p = mine.first; p < mine.last; ++p) {
    multiply_rows<Finish::kStore>(product, count, panels, p, space.input);
  }
}

// Runs slots [slots.first, slots.last), at most kBlockSlots of them, through all steps, computing
// the columns of some panels. Between steps it waits for the team when others compute the other
// columns.
template <Cell cell, typename scalar>
void forward_block(const ForwardArgs<scalar>& args, const ForwardSpace<scalar>& space, Range slots,
                   Range mine, const Team* others) {
  using Sum = SumOf<scalar>;
  const Panels<Sum>& panels = space.panels;
  const Sequences& seq = args.seq;
  const int64_t first = panels.first_column(mine.first);
  const int64_t end = panels.first_column(mine.last);
  const int64_t last = end < args.H ? end : args.H;

  int64_t slot[kBlockSlots];
  for (int64_t i = 0; i < slots.last - slots.first; ++i) slot[i] = inwards(seq, slots, i);
  StepWalk walk(seq, slots.first, slots.last, args.reverse);
  StepWalk ahead = walk;  // runs a chunk of steps ahead, projecting
  int64_t projected = 0;  // steps projected and not yet run
  int64_t rows[kChunkRows];
  const int64_t ld_projected = panels.padded_columns();
  const Sum* from_input = nullptr;  // the next row of space.projected
  const scalar* previous[kBlockSlots];
  const Sum* init[kBlockSlots];
  scalar* current[kBlockSlots];
  TileArgs<scalar, Sum> product = {.a = previous, .K = args.H, .init = init, .out = current};
  product.a_step = product.out_step = (args.reverse ? -seq.step_rows : seq.step_rows) * args.ldy;
  const int64_t rows_running = rows_of_running_tile(panels);
  // A table's rows are read where they are, but by a tile that runs step after step.
  const bool looks_up = args.ids != nullptr && !gathers_ids(args) && rows_running == 0;
  bool backwards = false;  // through the panels: those that were read last are still in the cache
  while (walk.next()) {
    if (projected == 0 && !looks_up) {
      int64_t count = 0;
      while (count + (slots.last - slots.first) <= kChunkRows && ahead.next()) {
        for (int64_t i = 0; i < ahead.running; ++i) {
          rows[count++] = row_of(seq, ahead.t, slot[i]);
        }
        ++projected;
      }
      project(args, space, mine, rows, count);
      from_input = space.projected;
    }

    const int64_t before = args.reverse ? walk.t + 1 : walk.t - 1;
    int64_t active = walk.running;
    for (int64_t i = 0; i < walk.running; ++i) {
      const int64_t row = row_of(seq, walk.t, slot[i]);
      current[i] = args.y + row * args.ldy;
      init[i] =
          looks_up ? space.table + args.ids[row] * ld_projected : from_input + i * ld_projected;
    }
    for (int64_t i = 0; i < walk.continuing; ++i) {
      previous[i] = args.y + row_of(seq, before, slot[i]) * args.ldy;
    }
    if (args.h0 == nullptr) {
      active = walk.continuing;
    } else {
      for (int64_t i = walk.continuing; i < walk.running; ++i) {
        previous[i] = args.h0 + state_row_of(seq, slot[i]) * args.H;
      }
    }
    product.steps = 1;
    if (walk.continuing == walk.running && walk.running <= rows_running) {
      const int64_t steady = walk.steady();
      product.steps = steady < projected ? steady : projected;
      walk.run(product.steps);
    }
    if (!looks_up) {
      projected -= product.steps;
      product.init_step = walk.running * ld_projected;
      from_input += product.steps * product.init_step;
    }
    for (int64_t i = mine.first; i < mine.last; ++i) {
      const int64_t p = backwards ? mine.first + mine.last - 1 - i : i;
      multiply_rows<Finish::kActivate, cell>(product, active, panels, p, space.recurrent);
    }
    backwards = !backwards;
    if (active < walk.running) {  // sequences that start from zeros
      activate_rows<cell>(init + active, current + active, walk.running - active, first, last);
    }
    if (others != nullptr) wait_for_rows(*others, current, walk.running, args.H);
  }
  for (int64_t i = slots.first; i < slots.last; ++i) {
    const scalar* y = args.y + row_of(seq, last_step(seq, i, args.reverse), i) * args.ldy;
    std::memcpy(args.h_n + state_row_of(seq, i) * args.H + first, y + first,
                (last - first) * sizeof(scalar));
  }
}

template <Cell cell, typename scalar>
void forward_all(const ForwardArgs<scalar>& args, const Team& team) {
  const int64_t longer = slots_longer_than_one(args.seq);
  if (longer < args.seq.B) forward_one_step<cell>(args, {longer, args.seq.B}, team);
  if (longer == 0) return;
  const ForwardSpace<scalar> space(args, team, args.workspace);
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
    forward_block<cell>(args, space, block, panels, hidden ? &team : nullptr);
  }
}

template <typename scalar>
void forward(const ForwardArgs<scalar>& args, const Team& team) {
  switch (args.cell) {
    case Cell::kTanh:
      return forward_all<Cell::kTanh>(args, team);
    case Cell::kRelu:
      return forward_all<Cell::kRelu>(args, team);
    case Cell::kSigmoid:
      return forward_all<Cell::kSigmoid>(args, team);
  }
}
