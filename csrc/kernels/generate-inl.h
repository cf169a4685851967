// Generation: characters drawn one after the other, each from the scores that the one before gave.

// Streams that draw together: a running sum waits for each addition, so several go side by side.
constexpr int kDrawTogether = 4;

template <typename scalar>
struct GenerateSpace {
  Panels<scalar> hidden;  // columns of the recurrent products
  Panels<scalar> scores;  // columns of the head
  int64_t layers, block;
  scalar* table;      // [V][padded H]: W_ih' + bias of the first layer
  scalar* input;      // [layers - 1] of W_ih' in panels
  scalar* recurrent;  // [layers] of W_hh' in panels
  scalar* bias;       // [layers][padded H]: b_ih + b_hh
  scalar* head;       // W_out' in panels
  scalar* head_bias;  // [padded V]
  scalar* states;     // [2][layers][block][padded H]: before a step and after it, in turns
  scalar* logits;     // [block][padded V], -infinity beyond V
  double* weights;    // [kDrawTogether][padded V]: of some streams' characters, zero beyond V
  scalar* totals;     // [kDrawTogether][padded V]: their running sums
  size_t bytes;

  GenerateSpace(const GenerateArgs<scalar>& args, void* base)
      : hidden(args.H),
        scores(args.V),
        layers(args.layers),
        block(args.S < kBlockSlots ? args.S : kBlockSlots) {
    const int64_t H = hidden.padded_columns(), V = scores.padded_columns();
    Arena arena(base);
    table = arena.take<scalar>(args.V * H);
    input = arena.take<scalar>((layers - 1) * args.H * H);
    recurrent = arena.take<scalar>(layers * args.H * H);
    bias = arena.take<scalar>(layers * H);
    head = arena.take<scalar>(args.H * V);
    head_bias = arena.take<scalar>(V);
    states = arena.take<scalar>(2 * layers * block * H);
    logits = arena.take<scalar>(block * V);
    weights = arena.take<double>(kDrawTogether * V);
    totals = arena.take<scalar>(kDrawTogether * V);
    bytes = arena.used();
  }

  scalar* state(int64_t step, int64_t layer, int64_t stream) const {
    return states + ((step % 2 * layers + layer) * block + stream) * hidden.padded_columns();
  }
};

template <typename scalar>
size_t generate_workspace(const GenerateArgs<scalar>& args) {
  return GenerateSpace<scalar>(args, nullptr).bytes;
}

template <typename scalar>
void pack_generate(const GenerateArgs<scalar>& args, const GenerateSpace<scalar>& space) {
  const Panels<scalar>& hidden = space.hidden;
  const int64_t padded = hidden.padded_columns();
  for (int64_t layer = 0; layer < args.layers; ++layer) {
    scalar* bias = space.bias + layer * padded;
    for (int64_t j = 0; j < padded; ++j) {
      scalar b = 0;
      if (j < args.H && args.b_ih != nullptr) b += args.b_ih[layer][j];
      if (j < args.H && args.b_hh != nullptr) b += args.b_hh[layer][j];
      bias[j] = b;
    }
    pack_transposed(args.W_hh[layer], args.H, hidden, 0, hidden.count,
                    space.recurrent + layer * args.H * padded);
    if (layer > 0) {
      pack_transposed(args.W_ih[layer], args.H, hidden, 0, hidden.count,
                      space.input + (layer - 1) * args.H * padded);
    }
  }
  for (int64_t j = 0; j < padded; ++j) {
    for (int64_t v = 0; v < args.V; ++v) {
      space.table[v * padded + j] = j < args.H ? args.W_ih[0][j * args.V + v] + space.bias[j] : 0;
    }
  }
  pack_transposed(args.W_out, args.H, space.scores, 0, space.scores.count, space.head);
  const int64_t width = space.scores.padded_columns();
  for (int64_t v = 0; v < width; ++v) {
    space.head_bias[v] = v < args.V && args.b_out != nullptr ? args.b_out[v] : 0;
  }
  for (int64_t i = 0; i < space.block * width; ++i) {
    space.logits[i] = -std::numeric_limits<scalar>::infinity();
  }
  for (int64_t i = 0; i < kDrawTogether * width; ++i) space.weights[i] = 0;
}

// All columns of a product, b in panels.
template <Finish finish, Cell cell = Cell::kRelu, typename scalar>
void multiply(TileArgs<scalar>& product, int64_t rows, const Panels<scalar>& panels,
              const scalar* packed) {
  for (int64_t p = 0; p < panels.count; ++p) {
    multiply_rows<finish, cell>(product, rows, panels, p, packed);
  }
}

// The first of the greatest; a NaN is greater than everything.
template <typename scalar>
int64_t greatest(const scalar* x, int64_t n) {
  int64_t best = 0;
  for (int64_t i = 1; i < n && x[best] == x[best]; ++i) {
    if (x[i] > x[best] || x[i] != x[i]) best = i;
  }
  return best;
}

// One value from the lanes of a vector.
template <typename scalar, typename Join>
ALWAYS_INLINE scalar across(Vec<scalar> v, const Join& join) {
  scalar lanes[kLanes<scalar>];
  store(lanes, v);
#pragma GCC unroll 8
  for (int half = kLanes<scalar> / 2; half > 0; half /= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < half; ++i) lanes[i] = join(lanes[i], lanes[i + half]);
  }
  return lanes[0];
}

// Of n numbers (in whole vectors, padded by what is not above `low`), the greatest whose followers,
// itself among them, are enough: `enough` is asked with their count, or their sum. Followers of a
// number are all that reach it. The answer is known to be above `low`. Bisects values, and moves
// both ends to numbers that exist: a dozen passes, whatever the order and the ties.
template <bool kCount, typename scalar, typename Enough>
scalar cut(const scalar* x, int64_t n, scalar low, const Enough& enough) {
  constexpr int L = kLanes<scalar>;
  const auto less = [](scalar a, scalar b) { return a < b ? a : b; };
  const auto more = [](scalar a, scalar b) { return a > b ? a : b; };
  const auto plus = [](scalar a, scalar b) { return a + b; };
  const Vec<scalar> infinity = broadcast(std::numeric_limits<scalar>::infinity());
  Vec<scalar> least = infinity, most = -infinity;
  for (int64_t i = 0; i < n; i += L) {
    const Vec<scalar> v = load(x + i);
    most = select<scalar>(v > most, v, most);
    least = select<scalar>((v < least) & (v > low), v, least);
  }
  // The answer is not below `from`, and not above `to`.
  scalar from = across<scalar>(least, less), to = across<scalar>(most, more);
  while (from < to) {
    scalar middle = from + (to - from) / 2;
    if (!(middle > from)) middle = to;  // neighbours, or infinities
    Vec<scalar> measure = {}, above = infinity, below = -infinity;
    for (int64_t i = 0; i < n; i += L) {
      const Vec<scalar> v = load(x + i);
      const Vec<Bits<scalar>> reaches = v >= middle;
      measure += select<scalar>(reaches, kCount ? broadcast(scalar{1}) : v, Vec<scalar>{});
      above = select<scalar>(reaches & (v < above), v, above);
      below = select<scalar>((v < middle) & (v > below), v, below);
    }
    if (enough(across<scalar>(measure, plus))) {
      from = across<scalar>(above, less);
    } else {
      to = across<scalar>(below, more);
    }
  }
  return to;
}

// weights = exp((logits - the greatest) / temperature), in whole vectors.
template <typename scalar>
void weigh(const scalar* logits, int64_t n, scalar temperature, scalar* weights) {
  constexpr int L = kLanes<scalar>;
  Vec<scalar> most = load(logits);
  for (int64_t i = L; i < n; i += L) {
    const Vec<scalar> x = load(logits + i);
    most = select<scalar>(x > most, x, most);
  }
  const scalar best = across<scalar>(most, [](scalar a, scalar b) { return a > b ? a : b; });
  for (int64_t i = 0; i < n; i += L) {
    const Vec<scalar> x = (load(logits + i) - best) / temperature;
    store(weights + i, exp_of_nonpositive<scalar>(x));
  }
}

// Sets to zero the weights that are not among the fewest, heaviest first, whose sum reaches a
// threshold; of equal ones the first are kept.
template <typename scalar>
void keep_heaviest(double* weights, int64_t n, double sum, scalar threshold) {
  constexpr int L = kLanes<double>;
  // Whatever is lighter than `low` can go all at once.
  const double low = (sum - threshold) / (2 * n);
  const double lightest = cut<false>(
      weights, n, low, [=](double reached) { return static_cast<scalar>(reached) >= threshold; });
  Vec<double> heavier = {};
  for (int64_t i = 0; i < n; i += L) {
    const Vec<double> w = load(weights + i);
    heavier += select<double>(w > broadcast(lightest), w, Vec<double>{});
    store(weights + i, select<double>(w < broadcast(lightest), Vec<double>{}, w));
  }
  double reached = across<double>(heavier, [](double a, double b) { return a + b; });
  for (int64_t v = 0; v < n; ++v) {
    if (weights[v] != lightest) continue;
    if (static_cast<scalar>(reached) >= threshold && reached > 0) weights[v] = 0;
    reached += weights[v];
  }
}

// A draw follows `draw` in charrnn_fast/charlm/sample.py: the same rules, in the same order and
// with sums in double as torch.cumsum has them.

// The weights of one stream's characters from its logits, which may be overwritten; `scratch` is
// for as many.
template <typename scalar>
void weigh_characters(const GenerateArgs<scalar>& args, scalar* logits, scalar* scratch,
                      double* weights) {
  constexpr int L = kLanes<scalar>;
  const int64_t V = args.V;
  if (0 < args.top_k && args.top_k < V) {
    const scalar never = -std::numeric_limits<scalar>::infinity();
    const scalar enough = args.top_k;
    const scalar least = cut<true>(logits, V, never, [=](scalar count) { return count >= enough; });
    for (int64_t i = 0; i < V; i += L) {
      const Vec<scalar> x = load(logits + i);
      store(logits + i, select<scalar>(x < broadcast(least), broadcast(never), x));
    }
  }
  weigh(logits, V, static_cast<scalar>(args.temperature), scratch);
  for (int64_t v = 0; v < V; ++v) weights[v] = scratch[v];
  if (args.top_p < 1) {
    double sum = 0;
    for (int64_t v = 0; v < V; ++v) sum += weights[v];
    const scalar threshold = static_cast<scalar>(args.top_p) * static_cast<scalar>(sum);
    if (threshold == threshold) keep_heaviest(weights, V, sum, threshold);
  }
}

// The running sums of the weights of `n` streams, whose rows are `ld` apart.
template <int n, typename scalar>
void add_up(const double* weights, int64_t V, int64_t ld, scalar* totals) {
  double sums[n] = {};
  for (int64_t v = 0; v < V; ++v) {
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) {
      sums[i] += weights[i * ld + v];
      totals[i * ld + v] = static_cast<scalar>(sums[i]);
    }
  }
}

template <typename scalar>
int64_t choose(const double* weights, const scalar* totals, int64_t V, scalar uniform) {
  const scalar wanted = uniform * totals[V - 1];
  int64_t chosen = 0;
  for (int64_t v = 0; v < V; ++v) chosen += totals[v] <= wanted;
  // Rounding may put `wanted` at the total itself: the last character that has any weight is meant.
  if (chosen == V) {
    do --chosen;
    while (chosen > 0 && !(weights[chosen] > 0));
  }
  return chosen;
}

// Draws one character for each of n streams.
template <typename scalar>
void draw(const GenerateArgs<scalar>& args, const GenerateSpace<scalar>& space,
          scalar* const* logits, const scalar* uniforms, int64_t n, int64_t* drawn) {
  const int64_t V = args.V, ld = space.scores.padded_columns();
  if (args.temperature < std::numeric_limits<scalar>::min()) {
    for (int64_t s = 0; s < n; ++s) drawn[s] = greatest(logits[s], V);
    return;
  }
  for (int64_t first = 0; first < n; first += kDrawTogether) {
    const int64_t count = n - first < kDrawTogether ? n - first : kDrawTogether;
    for (int64_t i = 0; i < count; ++i) {
      weigh_characters(args, logits[first + i], space.totals + i * ld, space.weights + i * ld);
    }
    if (count == 1) {
      add_up<1>(space.weights, V, ld, space.totals);
    } else {  // of streams that are not there it adds up what was before
      add_up<kDrawTogether>(space.weights, V, ld, space.totals);
    }
    for (int64_t i = 0; i < count; ++i) {
      drawn[first + i] =
          choose(space.weights + i * ld, space.totals + i * ld, V, uniforms[first + i]);
    }
  }
}

// Runs streams [streams.first, streams.last), at most kBlockSlots of them, through all steps. False
// when it was told to stop.
template <Cell cell, typename scalar>
bool generate_block(const GenerateArgs<scalar>& args, const GenerateSpace<scalar>& space,
                    Range streams) {
  const int64_t H = args.H, padded = space.hidden.padded_columns();
  const int64_t width = space.scores.padded_columns();
  const int64_t n = streams.last - streams.first;
  const auto state_row = [&](int64_t layer, int64_t stream) {
    return args.state + (layer * args.ld + streams.first + stream) * H;
  };
  for (int64_t layer = 0; layer < args.layers; ++layer) {
    for (int64_t s = 0; s < n; ++s) {
      std::memcpy(space.state(0, layer, s), state_row(layer, s), H * sizeof(scalar));
    }
  }
  const int64_t products = n * H * ((2 * args.layers - 1) * H + args.V);
  const int64_t patience = kStopProducts / products + 1;  // steps between questions

  const scalar* init[kBlockSlots];
  const scalar* previous[kBlockSlots];
  const scalar* below[kBlockSlots];
  scalar* current[kBlockSlots];
  scalar* logits[kBlockSlots];
  for (int64_t s = 0; s < n; ++s) logits[s] = space.logits + s * width;

  const int64_t* tokens = args.tokens + streams.first;
  for (int64_t i = 0; i < args.N; ++i) {
    if ((i + 1) % patience == 0 && args.stop != nullptr && args.stop(args.stop_state)) return false;
    for (int64_t layer = 0; layer < args.layers; ++layer) {
      for (int64_t s = 0; s < n; ++s) {
        previous[s] = space.state(i, layer, s);
        current[s] = space.state(i + 1, layer, s);
        init[s] = layer == 0 ? space.table + tokens[s] * padded : space.bias + layer * padded;
      }
      if (layer > 0) {
        for (int64_t s = 0; s < n; ++s) below[s] = space.state(i + 1, layer - 1, s);
        TileArgs<scalar> input = {.a = below, .K = H, .init = init, .out = current};
        multiply<Finish::kStore>(input, n, space.hidden, space.input + (layer - 1) * H * padded);
        for (int64_t s = 0; s < n; ++s) init[s] = current[s];
      }
      TileArgs<scalar> recurrence = {.a = previous, .K = H, .init = init, .out = current};
      multiply<Finish::kActivate, cell>(recurrence, n, space.hidden,
                                        space.recurrent + layer * H * padded);
    }
    for (int64_t s = 0; s < n; ++s) {
      previous[s] = current[s];
      init[s] = space.head_bias;
    }
    TileArgs<scalar> scores = {.a = previous, .K = H, .init = init, .out = logits};
    multiply<Finish::kStore>(scores, n, space.scores, space.head);
    int64_t* drawn = args.drawn + i * args.ld + streams.first;
    const scalar* uniforms = args.uniforms + i * args.ld + streams.first;
    draw(args, space, logits, uniforms, n, drawn);
    tokens = drawn;
  }
  for (int64_t layer = 0; layer < args.layers; ++layer) {
    for (int64_t s = 0; s < n; ++s) {
      std::memcpy(state_row(layer, s), space.state(args.N, layer, s), H * sizeof(scalar));
    }
  }
  return true;
}

template <Cell cell, typename scalar>
void generate_all(const GenerateArgs<scalar>& args) {
  const GenerateSpace<scalar> space(args, args.workspace);
  pack_generate(args, space);
  for (int64_t first = 0; first < args.S; first += space.block) {
    const int64_t last = first + space.block < args.S ? first + space.block : args.S;
    if (!generate_block<cell>(args, space, {first, last})) return;
  }
}

template <typename scalar>
void generate(const GenerateArgs<scalar>& args) {
  switch (args.cell) {
    case Cell::kTanh:
      return generate_all<Cell::kTanh>(args);
    case Cell::kRelu:
      return generate_all<Cell::kRelu>(args);
    case Cell::kSigmoid:
      return generate_all<Cell::kSigmoid>(args);
  }
}
