// Backward of one direction of one layer: delta first, step by step; then dx, dh0 and the weights'
// gradients as products over rows. Who needs no rows of other threads does so in chunks of steps,
// whose rows are still in the cache then.

// Rows of a chunk, of each part.
template <typename scalar>
constexpr int64_t kBackwardRows = 2 * kOuterRows<scalar>;

// delta of a sequence's last step, in a range of columns.
template <Cell cell, typename scalar>
void backward_start(const scalar* dy, const scalar* dh_n, const scalar* y, scalar* delta,
                    int64_t first, int64_t last) {
  using Sum = SumOf<scalar>;
  constexpr int L = kLanes<Sum>;
  for (int64_t j = first; j < last; j += L) {
    const int64_t n = last - j < L ? last - j : L;
    const Vec<Sum> g = load_lanes(dy + j, n) + load_lanes(dh_n + j, n);
    store_lanes(delta + j, activate_backward<cell, Sum>(g, load_lanes(y + j, n)), n);
  }
}

// delta of slots [slots.first, slots.last), at most kBlockSlots of them, at some steps, in the
// columns of some panels.
template <Cell cell, typename scalar>
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
  product.y_step = direction * seq.step_rows * args.ldy;
  product.init_step = args.dy != nullptr ? direction * seq.step_rows * args.lddy : 0;
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
      multiply_rows<Finish::kBackward, cell>(product, walk.continuing, panels, p, space.recurrent);
    }
    backwards = !backwards;
    for (int64_t i = walk.continuing; i < walk.running; ++i) {
      const scalar* from_state = args.dh_n != nullptr
                                     ? args.dh_n + state_row_of(seq, slots.first + i) * args.H
                                     : space.zeros;
      backward_start<cell>(init[i], from_state, y[i], delta[i], first, last);
    }
    if (others != nullptr) wait_for_rows(*others, delta, walk.running, args.H);
  }
}

// Some rows of delta times packed weights, which are next(&row of delta, &row of the result).
template <typename scalar, typename Next>
void multiply_delta(const BackwardSpace<scalar>& space, int64_t rows,
                    const Panels<SumOf<scalar>>& panels, const PackedOf<scalar>* packed,
                    const Next& next) {
  const scalar* delta[kChunkRows];
  const scalar* init[kChunkRows];
  scalar* out[kChunkRows];
  TileArgs<scalar> product = {.a = delta, .K = space.hidden.columns, .init = init, .out = out};
  for (int64_t done = 0; done < rows;) {
    const int64_t count = rows - done < kChunkRows ? rows - done : kChunkRows;
    for (int64_t i = 0; i < count; ++i) {
      next(&delta[i], &out[i]);
      init[i] = space.zeros;
    }
    done += count;
    for (int64_t p = 0; p < panels.count; ++p) {
      multiply_rows<Finish::kStore>(product, count, panels, p, packed);
    }
  }
}

// dx = delta W_ih for the next rows of a walk.
template <typename scalar>
void backward_input(const BackwardArgs<scalar>& args, const BackwardSpace<scalar>& space,
                    RowWalk& walk, int64_t rows) {
  multiply_delta(space, rows, space.inputs, space.input, [&](const scalar** delta, scalar** dx) {
    const int64_t slot = inwards(args.seq, space.slots, walk.slot - space.slots.first);
    *delta = space.delta(walk.t, slot);
    *dx = args.dx + row_of(args.seq, walk.t, slot) * args.I;
    walk.next();
  });
}

// dh0 = delta W_hh at each sequence's first step.
template <typename scalar>
void backward_state(const BackwardArgs<scalar>& args, const BackwardSpace<scalar>& space,
                    Range slots) {
  int64_t slot = slots.first;
  multiply_delta(space, slots.last - slots.first, space.hidden, space.recurrent,
                 [&](const scalar** delta, scalar** dh0) {
                   *delta = space.delta(first_step(args.seq, slot, args.reverse), slot);
                   *dh0 = args.dh0 + state_row_of(args.seq, slot) * args.H;
                   ++slot;
                 });
}

// dx and dh0 where they are of few rows.
template <typename scalar>
void backward_thin(const BackwardArgs<scalar>& args, const BackwardSpace<scalar>& space,
                   const Team& team) {
  const Sequences& seq = args.seq;
  const scalar* delta[kThinRows<scalar>];
  scalar* out[kThinRows<scalar>];
  if (args.dx != nullptr && !space.packs_input) {
    int64_t rows = 0;
    for (RowWalk walk(seq, {0, seq.B}, false); !walk.ended(); walk.next()) {
      delta[rows] = space.delta(walk.t, walk.slot);
      out[rows++] = args.dx + row_of(seq, walk.t, walk.slot) * args.I;
    }
    multiply_thin<scalar>({delta, args.W_ih, out, args.H, args.I}, rows, team);
  }
  if (args.dh0 != nullptr && !space.packs_recurrent) {
    for (int64_t slot = 0; slot < seq.B; ++slot) {
      delta[slot] = space.delta(0, slot);
      out[slot] = args.dh0 + state_row_of(seq, slot) * args.H;
    }
    multiply_thin<scalar>({delta, args.W_hh, out, args.H, args.H}, seq.B, team);
  }
}

template <Cell cell, typename scalar>
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

  const bool weights = args.dW_ih != nullptr || args.dW_hh != nullptr || args.db_ih != nullptr;
  const Range units = share(args.H, group);
  static_assert(BackwardSpace<scalar>::kMostParts == 2);
  RowsOfPart rows[] = {{seq, 0, space.parts, !args.reverse},
                       {seq, space.parts - 1, space.parts, !args.reverse}};
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
      backward_block<cell>(args, space, steps, block, panels, hidden ? &team : nullptr);
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
  if (seq.B <= kThinRows<scalar>) backward_thin(args, space, team);
  if (weights) {
    if (space.groups > 1) wait_for(team);
    combine_parts(args, space, share(args.H, team));
  }
}

template <typename scalar>
void backward(const BackwardArgs<scalar>& args, const Team& team) {
  switch (args.cell) {
    case Cell::kTanh:
      return backward_all<Cell::kTanh>(args, team);
    case Cell::kRelu:
      return backward_all<Cell::kRelu>(args, team);
    case Cell::kSigmoid:
      return backward_all<Cell::kSigmoid>(args, team);
  }
}
