// The kernels on bfloat16 tensors, for an ISA with dot products of pairs of bfloat16.
//
// What differs from the other kernels: memory holds bfloat16, and every sum is a float. The sum in
// act() is one chain of floats from the bias over x and the state; rounded to bfloat16 are the
// states (as y holds them and W_hh multiplies them) and the deltas, once a step, to nearest even.
// Weights' gradients are summed in floats and rounded at the end. Denormals count as zeros, in
// products and in what is stored.
//
// Operands come in pairs of neighbours along k, as one uint32_t with the lower k in its lower half.
// Of an odd number the last pair has a zero. Bits depend on nothing but the sequence's own numbers,
// for the reasons in tile-inl.h.

ALWAYS_INLINE int64_t pairs_of(int64_t n) { return (n + 1) / 2; }

typedef uint16_t SixteenBits __attribute__((vector_size(32)));

ALWAYS_INLINE __mmask16 first_lanes(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }

// The bits of the first n values, each in the lower half of its lane; the other lanes are zero.
ALWAYS_INLINE Vec<uint32_t> load_bits(const bfloat16* p, int64_t n) {
  SixteenBits bits;
  if (n == 16) {
    std::memcpy(&bits, p, sizeof(bits));
  } else {
    bits = reinterpret_cast<SixteenBits>(_mm256_maskz_loadu_epi16(first_lanes(n), p));
  }
  return __builtin_convertvector(bits, Vec<uint32_t>);
}

ALWAYS_INLINE Vec<float> load_bfloat16(const bfloat16* p, int64_t n) {
  return bit_cast<Vec<float>>(load_bits(p, n) << 16);
}

ALWAYS_INLINE void store_bfloat16(bfloat16* p, Vec<float> v, int64_t n) {
  const __m256i bits = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v));
  if (n == 16) {
    std::memcpy(p, &bits, sizeof(bits));
  } else {
    _mm256_mask_storeu_epi16(p, first_lanes(n), bits);
  }
}

ALWAYS_INLINE float as_float(bfloat16 value) {
  return bit_cast<float>(static_cast<uint32_t>(value.bits) << 16);
}

// What becomes of the product of a tile.
enum class Dot {
  kProject,   // sums = init + a b
  kActivate,  // out = act(init + a b)
  kBackward,  // out = (dy + a b) * act'(y)
  kRound,     // out = a b
  kAdd,       // sums += a b
};

struct DotArgs {
  const bfloat16* const* a = nullptr;   // rows of K; unless kAdd
  const uint32_t* packed_a = nullptr;   // kAdd: [pairs][height]
  const uint32_t* panel = nullptr;      // [pairs][width] vectors
  int64_t K = 0;                        // for kAdd even
  const float* const* init = nullptr;   // rows, for kProject and kActivate
  const bfloat16* const* dy = nullptr;  // rows, for kBackward, as y
  const bfloat16* const* y = nullptr;
  float* const* sums = nullptr;    // rows, for kProject and kAdd
  bfloat16* const* out = nullptr;  // rows, for the others
  int64_t column = 0;
  int64_t columns = 0;
  Activation activation = Activation::kTanh;
};

template <Dot dot, Activation activation, int R, int P>
ALWAYS_INLINE void finish_dot_tile(const DotArgs& args, const Vec<float> (&sum)[R * P],
                                   int64_t first_row, int64_t last_lanes) {
#pragma GCC unroll 1
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
      const int64_t at = args.column + p * 16;
      const int64_t lanes = p < P - 1 ? 16 : last_lanes;
      Vec<float> result = sum[r * P + p];
      if constexpr (dot == Dot::kActivate) result = activate<activation, float>(result);
      if constexpr (dot == Dot::kBackward) {
        const Vec<float> y = load_bfloat16(args.y[first_row + r] + at, lanes);
        result = activate_backward<activation, float>(result, y);
      }
      store_bfloat16(args.out[first_row + r] + at, result, lanes);
    }
  }
}

// Chains per element: enough to hide the latency of a narrow panel.
constexpr int dot_chains(int width) { return width <= 2 ? kTileVectors / width : 1; }

// Panel rows between a prefetch and its use. A prefetch beyond the panel is harmless.
constexpr int64_t kPrefetchedRows = 16;

// The product of R rows, from first_row on, with a panel of P vectors.
template <Dot dot, int R, int P>
__attribute__((noinline)) void dot_tile(const DotArgs& args, int64_t first_row) {
  constexpr int C = dot_chains(P);
  Vec<float> sum[C][R][P];
  const int64_t last_lanes = args.columns - (P - 1) * 16;

#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) sum[c][r][p] = Vec<float>{};
      const int64_t at = args.column + p * 16;
      const int64_t lanes = p < P - 1 ? 16 : last_lanes;
      if constexpr (dot == Dot::kProject || dot == Dot::kActivate) {
        sum[0][r][p] = load_lanes(args.init[first_row + r] + at, lanes);
      } else if constexpr (dot == Dot::kBackward) {
        sum[0][r][p] = load_bfloat16(args.dy[first_row + r] + at, lanes);
      }
    }
  }

  const bfloat16* row[R];
  if constexpr (dot != Dot::kAdd) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) row[r] = args.a[first_row + r];
  }
  const uint32_t* panel = args.panel;
  const int64_t whole = args.K / 2;

  const auto step = [&](int c, int64_t k, const auto& pair) __attribute__((always_inline)) {
    __m512bh b[P];
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
      b[p] = reinterpret_cast<__m512bh>(load(panel + (k * P + p) * 16));
      if constexpr (R <= 4 && dot != Dot::kAdd) {
        __builtin_prefetch(panel + ((k + kPrefetchedRows) * P + p) * 16);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m512bh s = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair(r, k)));
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) sum[c][r][p] = _mm512_dpbf16_ps(sum[c][r][p], s, b[p]);
    }
  };
  const auto both = [&](int r, int64_t k) __attribute__((always_inline)) {
    if constexpr (dot == Dot::kAdd) return static_cast<int32_t>(args.packed_a[k * R + r]);
    int32_t two;
    std::memcpy(&two, row[r] + 2 * k, sizeof(two));
    return two;
  };
  [[maybe_unused]] const auto last = [&](int r, int64_t k) __attribute__((always_inline)) {
    return static_cast<int32_t>(row[r][2 * k].bits);
  };
  int64_t k = 0;
  for (; k + C <= whole; k += C) {
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) step(c, k + c, both);
  }
  if constexpr (C > 1) {
    for (; k < whole; ++k) step(0, k, both);
  }
  if constexpr (dot != Dot::kAdd) {
    if (args.K % 2 != 0) step(0, whole, last);
  }

  Vec<float> total[R * P];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
#pragma GCC unroll 8
      for (int half = C / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
        for (int c = 0; c < half; ++c) sum[c][r][p] += sum[c + half][r][p];
      }
      total[r * P + p] = sum[0][r][p];
      if constexpr (dot == Dot::kProject || dot == Dot::kAdd) {
        float* sums = args.sums[first_row + r] + args.column + p * 16;
        const int64_t lanes = p < P - 1 ? 16 : last_lanes;
        if constexpr (dot == Dot::kAdd) sum[0][r][p] += load_lanes(sums, lanes);
        store_lanes(sums, sum[0][r][p], lanes);
      }
    }
  }
  if constexpr (dot == Dot::kRound) {
    finish_dot_tile<dot, Activation::kRelu, R, P>(args, total, first_row, last_lanes);
  } else if constexpr (dot == Dot::kActivate || dot == Dot::kBackward) {
    switch (args.activation) {
      case Activation::kTanh:
        return finish_dot_tile<dot, Activation::kTanh, R, P>(args, total, first_row, last_lanes);
      case Activation::kRelu:
        return finish_dot_tile<dot, Activation::kRelu, R, P>(args, total, first_row, last_lanes);
      case Activation::kSigmoid:
        return finish_dot_tile<dot, Activation::kSigmoid, R, P>(args, total, first_row, last_lanes);
    }
  }
}

// Tiles by [height - 1][width - 1].
template <Dot dot>
constexpr void (*kDotTiles[6][4])(const DotArgs&, int64_t) = {
#define CHARRNN_FAST_TILES(R) \
  {dot_tile<dot, R, 1>, dot_tile<dot, R, 2>, dot_tile<dot, R, 3>, dot_tile<dot, R, 4>}
    CHARRNN_FAST_TILES(1), CHARRNN_FAST_TILES(2), CHARRNN_FAST_TILES(3), CHARRNN_FAST_TILES(4),
    CHARRNN_FAST_TILES(5), CHARRNN_FAST_TILES(6)
#undef CHARRNN_FAST_TILES
};
static_assert(kTileRows == 6 && kTileVectors == 4 && kLanes<float> == 16);

// The product of any number of rows with one panel of `packed`, all panels of K values each.
// As multiply_rows, names the panel in args.
template <Dot dot>
void dot_rows(DotArgs& args, int64_t rows, const Panels<float>& panels, int64_t panel,
              const uint32_t* packed) {
  args.column = panels.first_column(panel);
  args.columns = panels.used_columns(panel);
  args.panel = packed + args.column * pairs_of(args.K);
  const int width = panels.width(panel);
  for (int64_t first = 0; first < rows;) {
    const int64_t height = tile_height(rows - first);
    kDotTiles<dot>[height - 1][width - 1](args, first);
    first += height;
  }
}

// Packs some panels of b = W', with W [columns, K]: neighbours along k are neighbours in memory.
inline void pack_pairs_transposed(const bfloat16* W, int64_t K, const Panels<float>& panels,
                                  Range which, uint32_t* packed) {
  const int64_t pairs = pairs_of(K), whole = K / 2;
  for (int64_t p = which.first; p < which.last; ++p) {
    const int64_t stride = panels.width(p) * 16;
    const int64_t n = panels.used_columns(p);
    const bfloat16* source = W + panels.first_column(p) * K;
    uint32_t* target = packed + panels.first_column(p) * pairs;
    constexpr int64_t kLine = 16;  // pairs in a cache line of a row of W
    for (int64_t line = 0; line < pairs; line += kLine) {
      const int64_t end = line + kLine < pairs ? line + kLine : pairs;
      for (int64_t j = 0; j < stride; ++j) {
        for (int64_t k = line; k < end; ++k) {
          uint32_t two = 0;
          if (j < n) std::memcpy(&two, source + j * K + 2 * k, k < whole ? 4 : 2);
          target[k * stride + j] = two;
        }
      }
    }
  }
}

// Packs one panel of b, given as K rows; pairs are of rows. `zeros` is a row of zeros.
inline void pack_row_pairs(const bfloat16* const* rows, int64_t K, const Panels<float>& panels,
                           int64_t panel, const bfloat16* zeros, uint32_t* target) {
  const int width = panels.width(panel);
  const int64_t last = panels.used_columns(panel) - (width - 1) * 16;
  const int64_t first_column = panels.first_column(panel);
  for (int64_t k = 0; k < K; k += 2) {
    const bfloat16* low = rows[k] + first_column;
    const bfloat16* high = (k + 1 < K ? rows[k + 1] : zeros) + first_column;
    for (int p = 0; p < width; ++p, target += 16) {
      const int64_t lanes = p < width - 1 ? 16 : last;
      store(target, load_bits(low + p * 16, lanes) | load_bits(high + p * 16, lanes) << 16);
    }
  }
}

template <int R>
ALWAYS_INLINE void pack_tile_pairs(const bfloat16* const* a, int64_t K, int64_t column,
                                   const bfloat16* zeros, uint32_t* target) {
  constexpr __mmask8 kRows = (1u << R) - 1;
  for (int64_t k = 0; k < K; k += 2, target += R) {
    const __m128i low = _mm_maskz_loadu_epi16(kRows, a[k] + column);
    const __m128i high = _mm_maskz_loadu_epi16(kRows, (k + 1 < K ? a[k + 1] : zeros) + column);
    const __m256i two =
        _mm256_set_m128i(_mm_unpackhi_epi16(low, high), _mm_unpacklo_epi16(low, high));
    _mm256_mask_storeu_epi32(target, kRows, two);
  }
}

// Packs columns [column, column + rows) of a, given as K rows, into tiles [pairs][height].
inline void pack_column_pairs(const bfloat16* const* a, int64_t K, int64_t column, int64_t rows,
                              const bfloat16* zeros, uint32_t* packed) {
  for (int64_t first = 0; first < rows;) {
    const int64_t height = tile_height(rows - first);
    uint32_t* target = packed + first * pairs_of(K);
    const auto pack = [&]<int R>() { pack_tile_pairs<R>(a, K, column + first, zeros, target); };
    switch (height) {
      case 1:
        pack.template operator()<1>();
        break;
      case 2:
        pack.template operator()<2>();
        break;
      case 3:
        pack.template operator()<3>();
        break;
      case 4:
        pack.template operator()<4>();
        break;
      case 5:
        pack.template operator()<5>();
        break;
      default:
        pack.template operator()<6>();
        break;
    }
    first += height;
  }
}

// Rows whose projections are made together; no fewer than the slots of a block.
constexpr int64_t kProjectedRows = kBlockSlots;

struct BFloat16ForwardSpace {
  Panels<float> panels;
  uint32_t* input = nullptr;      // W_ih' in panels
  float* table = nullptr;         // for ids instead: [I][padded H] of W_ih' + bias
  uint32_t* recurrent = nullptr;  // W_hh' in panels
  float* bias = nullptr;          // b_ih + b_hh, padded
  float* projected = nullptr;     // each member's own: [kProjectedRows][padded H]
  size_t bytes = 0;

  BFloat16ForwardSpace(const ForwardArgs<bfloat16>& args, int team_size, int rank, void* base)
      : panels(args.H) {
    const int64_t columns = panels.padded_columns();
    Arena arena(base);
    if (args.ids != nullptr) {
      table = arena.take<float>(args.I * columns);
    } else {
      input = arena.take<uint32_t>(pairs_of(args.I) * columns);
    }
    recurrent = arena.take<uint32_t>(pairs_of(args.H) * columns);
    bias = arena.take<float>(columns);
    for (int member = 0; member < team_size && args.ids == nullptr; ++member) {
      float* piece = arena.take<float>(kProjectedRows * columns);
      if (member == rank) projected = piece;
    }
    bytes = arena.used();
  }
};

inline size_t bfloat16_forward_workspace(const ForwardArgs<bfloat16>& args, int team_size) {
  return BFloat16ForwardSpace(args, team_size, 0, nullptr).bytes;
}

inline void pack_forward(const ForwardArgs<bfloat16>& args, const BFloat16ForwardSpace& space,
                         const Team& team) {
  const Range mine = share(space.panels.count, team);
  const int64_t first = space.panels.first_column(mine.first);
  const int64_t last = space.panels.first_column(mine.last);
  for (int64_t j = first; j < last; ++j) {
    float b = 0;
    if (j < args.H && args.b_ih != nullptr) b += as_float(args.b_ih[j]);
    if (j < args.H && args.b_hh != nullptr) b += as_float(args.b_hh[j]);
    space.bias[j] = b;
  }
  pack_pairs_transposed(args.W_hh, args.H, space.panels, mine, space.recurrent);
  if (args.ids == nullptr) {
    pack_pairs_transposed(args.W_ih, args.I, space.panels, mine, space.input);
    return;
  }
  for (int64_t v = 0; v < args.I; ++v) {
    float* entry = space.table + v * space.panels.padded_columns();
    for (int64_t j = first; j < last; ++j) {
      entry[j] = j < args.H ? as_float(args.W_ih[j * args.I + v]) + space.bias[j] : 0;
    }
  }
}

// x W_ih' + bias for some rows, in the columns of some panels, into the first rows of projected.
inline void project(const ForwardArgs<bfloat16>& args, const BFloat16ForwardSpace& space,
                    Range mine, const int64_t* rows, int64_t count) {
  const bfloat16* x[kProjectedRows];
  const float* bias[kProjectedRows];
  float* sums[kProjectedRows];
  for (int64_t i = 0; i < count; ++i) {
    x[i] = args.x + rows[i] * args.ldx;
    bias[i] = space.bias;
    sums[i] = space.projected + i * space.panels.padded_columns();
  }
  DotArgs product = {.a = x, .K = args.I, .init = bias, .sums = sums};
  for (int64_t p = mine.first; p < mine.last; ++p) {
    dot_rows<Dot::kProject>(product, count, space.panels, p, space.input);
  }
}

// As forward_block.
template <Activation activation>
void forward_block(const ForwardArgs<bfloat16>& args, const BFloat16ForwardSpace& space,
                   Range slots, Range mine, const Team* others) {
  const Panels<float>& panels = space.panels;
  const Sequences& seq = args.seq;
  const int64_t first = panels.first_column(mine.first);
  const int64_t end = panels.first_column(mine.last);
  const int64_t last = end < args.H ? end : args.H;

  int64_t slot[kBlockSlots];
  for (int64_t i = 0; i < slots.last - slots.first; ++i) slot[i] = inwards(seq, slots, i);
  StepWalk walk(seq, slots.first, slots.last, args.reverse);
  StepWalk ahead = walk;  // runs a chunk of steps ahead, projecting
  int64_t projected = 0;  // rows projected,
  int64_t used = 0;       // and those of them that have been run
  int64_t rows[kProjectedRows];
  const bfloat16* previous[kBlockSlots];
  const float* init[kBlockSlots];
  bfloat16* current[kBlockSlots];
  DotArgs product = {
      .a = previous, .K = args.H, .init = init, .out = current, .activation = activation};
  while (walk.next()) {
    if (args.ids == nullptr && used == projected) {
      used = projected = 0;
      while (projected + (slots.last - slots.first) <= kProjectedRows && ahead.next()) {
        for (int64_t i = 0; i < ahead.running; ++i) {
          rows[projected++] = row_of(seq, ahead.t, slot[i]);
        }
      }
      project(args, space, mine, rows, projected);
    }

    const int64_t before = args.reverse ? walk.t + 1 : walk.t - 1;
    for (int64_t i = 0; i < walk.running; ++i) {
      const int64_t row = row_of(seq, walk.t, slot[i]);
      current[i] = args.y + row * args.ldy;
      init[i] = args.ids != nullptr ? space.table + args.ids[row] * panels.padded_columns()
                                    : space.projected + used++ * panels.padded_columns();
    }
    for (int64_t i = 0; i < walk.continuing; ++i) {
      previous[i] = args.y + row_of(seq, before, slot[i]) * args.ldy;
    }
    int64_t active = walk.running;
    if (args.h0 == nullptr) {
      active = walk.continuing;
    } else {
      for (int64_t i = walk.continuing; i < walk.running; ++i) {
        previous[i] = args.h0 + state_row_of(seq, slot[i]) * args.H;
      }
    }
    for (int64_t p = mine.first; p < mine.last; ++p) {
      dot_rows<Dot::kActivate>(product, active, panels, p, space.recurrent);
    }
    for (int64_t i = active; i < walk.running; ++i) {  // sequences that start from zeros
      for (int64_t j = first; j < last; j += 16) {
        const int64_t lanes = last - j < 16 ? last - j : 16;
        store_bfloat16(current[i] + j, activate<activation, float>(load_lanes(init[i] + j, lanes)),
                       lanes);
      }
    }
    if (others != nullptr) wait_for_rows(*others, current, walk.running, args.H);
  }
  for (int64_t i = slots.first; i < slots.last; ++i) {
    const bfloat16* y = args.y + row_of(seq, last_step(seq, i, args.reverse), i) * args.ldy;
    std::memcpy(args.h_n + state_row_of(seq, i) * args.H + first, y + first,
                (last - first) * sizeof(bfloat16));
  }
}

// Calls run(slots, panels, team or null) for the blocks of sequences that are this member's.
template <typename Run>
void for_blocks(const Sequences& seq, Split split, const Panels<float>& panels, const Team& team,
                const Run& run) {
  const bool hidden = split == Split::kHidden;
  const Range mine = hidden ? share(panels.count, team) : Range{0, panels.count};
  const Range slots = hidden ? Range{0, seq.B} : share(seq.B, team);
  const int64_t n = slots.last - slots.first;
  const int64_t blocks = (n + kBlockSlots - 1) / kBlockSlots;
  for (int64_t i = 0; i < blocks; ++i) {
    run(Range{slots.first + i * n / blocks, slots.first + (i + 1) * n / blocks}, mine,
        hidden ? &team : nullptr);
  }
}

inline void bfloat16_forward(const ForwardArgs<bfloat16>& args, const Team& team) {
  const BFloat16ForwardSpace space(args, team.size, team.rank, args.workspace);
  pack_forward(args, space, team);
  wait_for(team);
  for_blocks(args.seq, args.split, space.panels, team,
             [&](Range slots, Range mine, const Team* others) {
               switch (args.activation) {
                 case Activation::kTanh:
                   return forward_block<Activation::kTanh>(args, space, slots, mine, others);
                 case Activation::kRelu:
                   return forward_block<Activation::kRelu>(args, space, slots, mine, others);
                 case Activation::kSigmoid:
                   return forward_block<Activation::kSigmoid>(args, space, slots, mine, others);
               }
             });
}

// Rows summed in one chain of a weight's gradient; blocks of them are added up.
constexpr int64_t kPairedGradientRows = 256;

struct BFloat16BackwardSpace {
  Panels<float> hidden;           // columns of W_hh, of dW_hh
  Panels<float> inputs;           // columns of W_ih, of dW_ih
  uint32_t* recurrent = nullptr;  // W_hh in panels
  uint32_t* input = nullptr;      // W_ih in panels
  bfloat16* zeros = nullptr;      // a row for whatever is absent
  // Each member's own, for its units:
  uint32_t* left = nullptr;   // delta' in tiles
  uint32_t* right = nullptr;  // a panel of y_prev or of x
  float* dW_ih = nullptr;     // [units][I]
  float* dW_hh = nullptr;     // [units][H]
  float* db = nullptr;        // [units]
  double* table = nullptr;    // for ids: dW_ih', [I][units]
  size_t bytes = 0;

  BFloat16BackwardSpace(const BackwardArgs<bfloat16>& args, int team_size, int rank, void* base)
      : hidden(args.H), inputs(args.I) {
    Arena arena(base);
    recurrent = arena.take<uint32_t>(pairs_of(args.H) * hidden.padded_columns());
    if (args.dx != nullptr) {
      input = arena.take<uint32_t>(pairs_of(args.H) * inputs.padded_columns());
    }
    zeros = arena.take<bfloat16>(zero_columns());
    const int64_t units = (args.H + team_size - 1) / team_size;
    const auto take = [&]<typename T>(bool mine, T** piece, int64_t n) {
      T* taken = arena.take<T>(n);
      if (mine) *piece = taken;
    };
    for (int member = 0; member < team_size; ++member) {
      const bool mine = member == rank;
      take(mine, &left, units * kPairedGradientRows / 2);
      take(mine, &right, kTileVectors * 16 * kPairedGradientRows / 2);
      if (args.dW_ih != nullptr && args.ids == nullptr) take(mine, &dW_ih, units * args.I);
      if (args.dW_ih != nullptr && args.ids != nullptr) take(mine, &table, units * args.I);
      if (args.dW_hh != nullptr) take(mine, &dW_hh, units * args.H);
      if (args.db != nullptr) take(mine, &db, units);
    }
    bytes = arena.used();
  }

  int64_t zero_columns() const {
    const int64_t a = hidden.padded_columns(), b = inputs.padded_columns();
    return a > b ? a : b;
  }
};

inline size_t bfloat16_backward_workspace(const BackwardArgs<bfloat16>& args, int team_size) {
  return BFloat16BackwardSpace(args, team_size, 0, nullptr).bytes;
}

inline void pack_backward(const BackwardArgs<bfloat16>& args, const BFloat16BackwardSpace& space,
                          const Team& team) {
  const auto pack = [&](const bfloat16* W, const Panels<float>& panels, uint32_t* packed) {
    const Range mine = share(panels.count, team);
    for (int64_t p = mine.first; p < mine.last; ++p) {
      uint32_t* target = packed + panels.first_column(p) * pairs_of(args.H);
      const int64_t size = panels.width(p) * 16;
      for (int64_t k = 0; k < args.H; k += 2, target += size) {
        const bfloat16* rows[2] = {W + k * panels.columns, W + (k + 1) * panels.columns};
        pack_row_pairs(rows, args.H - k < 2 ? 1 : 2, panels, p, space.zeros, target);
      }
    }
  };
  // The last row of an odd number is paired with zeros.
  if (team.rank == 0) std::memset(space.zeros, 0, space.zero_columns() * sizeof(bfloat16));
  wait_for(team);
  pack(args.W_hh, space.hidden, space.recurrent);
  if (args.dx != nullptr) pack(args.W_ih, space.inputs, space.input);
}

// As backward_block.
template <Activation activation>
void backward_block(const BackwardArgs<bfloat16>& args, const BFloat16BackwardSpace& space,
                    Range slots, Range mine, const Team* others) {
  const Panels<float>& panels = space.hidden;
  const Sequences& seq = args.seq;
  const int64_t first = panels.first_column(mine.first);
  const int64_t end = panels.first_column(mine.last);
  const int64_t last = end < args.H ? end : args.H;

  StepWalk walk(seq, slots.first, slots.last, !args.reverse);
  const bfloat16* next[kBlockSlots];
  const bfloat16* dy[kBlockSlots];
  const bfloat16* y[kBlockSlots];
  bfloat16* delta[kBlockSlots];
  DotArgs product = {
      .a = next, .K = args.H, .dy = dy, .y = y, .out = delta, .activation = activation};
  while (walk.next()) {
    const int64_t after = args.reverse ? walk.t - 1 : walk.t + 1;
    for (int64_t i = 0; i < walk.running; ++i) {
      const int64_t row = row_of(seq, walk.t, slots.first + i);
      delta[i] = args.delta + row * args.H;
      y[i] = args.y + row * args.ldy;
      dy[i] = args.dy != nullptr ? args.dy + row * args.lddy : space.zeros;
    }
    for (int64_t i = 0; i < walk.continuing; ++i) {
      next[i] = args.delta + row_of(seq, after, slots.first + i) * args.H;
    }
    for (int64_t p = mine.first; p < mine.last; ++p) {
      dot_rows<Dot::kBackward>(product, walk.continuing, panels, p, space.recurrent);
    }
    for (int64_t i = walk.continuing; i < walk.running; ++i) {
      const bfloat16* dh_n = args.dh_n != nullptr
                                 ? args.dh_n + state_row_of(seq, slots.first + i) * args.H
                                 : space.zeros;
      for (int64_t j = first; j < last; j += 16) {
        const int64_t n = last - j < 16 ? last - j : 16;
        const Vec<float> g = load_bfloat16(dy[i] + j, n) + load_bfloat16(dh_n + j, n);
        store_bfloat16(delta[i] + j,
                       activate_backward<activation, float>(g, load_bfloat16(y[i] + j, n)), n);
      }
    }
    if (others != nullptr) wait_for_rows(*others, delta, walk.running, args.H);
  }
}

// dx = delta W_ih for a share of all rows.
inline void backward_input(const BackwardArgs<bfloat16>& args, const BFloat16BackwardSpace& space,
                           Range mine) {
  RowWalk walk(args.seq, {0, args.seq.B}, false);
  walk.seek(mine.first);
  const bfloat16* delta[kChunkRows];
  bfloat16* dx[kChunkRows];
  DotArgs product = {.a = delta, .K = args.H, .out = dx};
  for (int64_t done = mine.first; done < mine.last;) {
    const int64_t count = mine.last - done < kChunkRows ? mine.last - done : kChunkRows;
    for (int64_t i = 0; i < count; ++i, walk.next()) {
      const int64_t row = row_of(args.seq, walk.t, walk.slot);
      delta[i] = args.delta + row * args.H;
      dx[i] = args.dx + row * args.I;
    }
    done += count;
    for (int64_t p = 0; p < space.inputs.count; ++p) {
      dot_rows<Dot::kRound>(product, count, space.inputs, p, space.input);
    }
  }
}

// dh0 = delta W_hh at each sequence's first step.
inline void backward_state(const BackwardArgs<bfloat16>& args, const BFloat16BackwardSpace& space,
                           Range slots) {
  const bfloat16* delta[kChunkRows];
  bfloat16* dh0[kChunkRows];
  DotArgs product = {.a = delta, .K = args.H, .out = dh0};
  for (int64_t done = slots.first; done < slots.last;) {
    const int64_t count = slots.last - done < kChunkRows ? slots.last - done : kChunkRows;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t slot = done + i;
      delta[i] =
          args.delta + row_of(args.seq, first_step(args.seq, slot, args.reverse), slot) * args.H;
      dh0[i] = args.dh0 + state_row_of(args.seq, slot) * args.H;
    }
    done += count;
    for (int64_t p = 0; p < space.hidden.count; ++p) {
      dot_rows<Dot::kRound>(product, count, space.hidden, p, space.recurrent);
    }
  }
}

// out[j] += sum of rows[k][first + j].
inline void add_rows(const bfloat16* const* rows, int64_t K, Range columns, float* out) {
  for (int64_t j = columns.first; j < columns.last; j += 16, out += 16) {
    const int64_t n = columns.last - j < 16 ? columns.last - j : 16;
    Vec<float> sum = {};
    for (int64_t k = 0; k < K; ++k) sum += load_bfloat16(rows[k] + j, n);
    store_lanes(out, load_lanes(out, n) + sum, n);
  }
}

// dW_ih, dW_hh and db of the units in a range: sums over rows in one fixed order.
inline void backward_weights(const BackwardArgs<bfloat16>& args, const BFloat16BackwardSpace& space,
                             Range units) {
  const int64_t count = units.last - units.first;
  if (count == 0) return;
  const auto zero = [](auto* p, int64_t n) {
    if (p != nullptr) std::memset(p, 0, n * sizeof(*p));
  };
  zero(space.dW_ih, count * args.I);
  zero(space.dW_hh, count * args.H);
  zero(space.db, count);
  zero(space.table, count * args.I);

  const int64_t total = rows_in(args.seq);
  RowWalk walk(args.seq, {0, args.seq.B}, false);
  const bfloat16* delta[kPairedGradientRows];
  const bfloat16* x[kPairedGradientRows];
  const bfloat16* y_previous[kPairedGradientRows];
  for (int64_t done = 0; done < total;) {
    const int64_t K = total - done < kPairedGradientRows ? total - done : kPairedGradientRows;
    done += K;
    for (int64_t k = 0; k < K; ++k, walk.next()) {
      const int64_t row = row_of(args.seq, walk.t, walk.slot);
      delta[k] = args.delta + row * args.H;
      if (space.dW_ih != nullptr) x[k] = args.x + row * args.ldx;
      if (walk.t == first_step(args.seq, walk.slot, args.reverse)) {
        y_previous[k] =
            args.h0 != nullptr ? args.h0 + state_row_of(args.seq, walk.slot) * args.H : space.zeros;
      } else {
        const int64_t before = args.reverse ? walk.t + 1 : walk.t - 1;
        y_previous[k] = args.y + row_of(args.seq, before, walk.slot) * args.ldy;
      }
      if (space.table != nullptr) {
        double* entry = space.table + args.ids[row] * count;
        for (int64_t j = 0; j < count; ++j) entry[j] += as_float(delta[k][units.first + j]);
      }
    }
    if (space.db != nullptr) add_rows(delta, K, units, space.db);
    if (space.dW_ih == nullptr && space.dW_hh == nullptr) continue;
    pack_column_pairs(delta, K, units.first, count, space.zeros, space.left);
    const auto product = [&](const bfloat16* const* b, const Panels<float>& panels, float* dW) {
      for (int64_t p = 0; p < panels.count; ++p) {
        pack_row_pairs(b, K, panels, p, space.zeros, space.right);
        for (int64_t first = 0; first < count;) {
          const int64_t height = tile_height(count - first);
          float* sums[kTileRows];
          for (int64_t r = 0; r < height; ++r) sums[r] = dW + (first + r) * panels.columns;
          const DotArgs args = {.packed_a = space.left + first * pairs_of(K),
                                .panel = space.right,
                                .K = 2 * pairs_of(K),
                                .sums = sums,
                                .column = panels.first_column(p),
                                .columns = panels.used_columns(p)};
          kDotTiles<Dot::kAdd>[height - 1][panels.width(p) - 1](args, 0);
          first += height;
        }
      }
    };
    if (space.dW_ih != nullptr) product(x, space.inputs, space.dW_ih);
    if (space.dW_hh != nullptr) product(y_previous, space.hidden, space.dW_hh);
  }
  const auto round = [&](const float* sums, int64_t columns, bfloat16* out) {
    if (sums == nullptr) return;
    out += units.first * columns;
    for (int64_t i = 0, n = count * columns; i < n; i += 16) {
      const int64_t lanes = n - i < 16 ? n - i : 16;
      store_bfloat16(out + i, load_lanes(sums + i, lanes), lanes);
    }
  };
  round(space.dW_ih, args.I, args.dW_ih);
  round(space.dW_hh, args.H, args.dW_hh);
  round(space.db, 1, args.db);
  if (space.table != nullptr) {
    for (int64_t j = 0; j < count; ++j) {
      for (int64_t v = 0; v < args.I; ++v) {
        const Vec<float> sum = {static_cast<float>(space.table[v * count + j])};
        store_bfloat16(args.dW_ih + (units.first + j) * args.I + v, sum, 1);
      }
    }
  }
}

inline void bfloat16_backward(const BackwardArgs<bfloat16>& args, const Team& team) {
  const BFloat16BackwardSpace space(args, team.size, team.rank, args.workspace);
  pack_backward(args, space, team);
  wait_for(team);
  for_blocks(args.seq, args.split, space.hidden, team,
             [&](Range slots, Range mine, const Team* others) {
               switch (args.activation) {
                 case Activation::kTanh:
                   return backward_block<Activation::kTanh>(args, space, slots, mine, others);
                 case Activation::kRelu:
                   return backward_block<Activation::kRelu>(args, space, slots, mine, others);
                 case Activation::kSigmoid:
                   return backward_block<Activation::kSigmoid>(args, space, slots, mine, others);
               }
             });
  wait_for(team);
  if (args.dx != nullptr) backward_input(args, space, share(rows_in(args.seq), team));
  if (args.dh0 != nullptr) backward_state(args, space, share(args.seq.B, team));
  if (args.dW_ih != nullptr || args.dW_hh != nullptr || args.db != nullptr) {
    backward_weights(args, space, share(args.H, team));
  }
}

inline bool bfloat16_all_finite(const bfloat16* p, int64_t n) {
  constexpr uint16_t kExponent = 0x7F80;
  uint16_t found = 0;
  for (int64_t i = 0; i < n; ++i) found |= (p[i].bits & kExponent) == kExponent;
  return found == 0;
}

constexpr Kernels<bfloat16> kBFloat16Kernels = {bfloat16_all_finite,
                                                bfloat16_forward_workspace,
                                                bfloat16_forward,
                                                bfloat16_backward_workspace,
                                                bfloat16_backward,
                                                nullptr,
                                                nullptr,
                                                nullptr,
                                                nullptr};
