// The register tile of products with packed weights. What else is multiplied: sequences of one step
// (one-step-inl.h), and rows for the gradients of weights (outer-inl.h).
//
// Bits: each element of a product is one chain of multiply-adds over k (or several of them, by the
// width of the whole product), whatever rows stand beside it and whoever computes it. So results do
// not depend on the batch around a sequence, on tile heights, or on the number of threads.

// Columns of a product, cut into panels of at most kTileVectors vectors, as even as possible.
template <typename scalar>
struct Panels {
  int64_t columns;
  int64_t vectors;  // columns / lanes, rounded up
  int64_t count;

  explicit Panels(int64_t n)
      : columns(n),
        vectors((n + kLanes<scalar> - 1) / kLanes<scalar>),
        count((vectors + kTileVectors - 1) / kTileVectors),
        narrow_(count > 0 ? vectors / count : 0),
        wide_(vectors - narrow_ * count) {}

  int64_t first_column(int64_t panel) const {
    return (panel * narrow_ + (panel < wide_ ? panel : wide_)) * kLanes<scalar>;
  }
  int width(int64_t panel) const { return static_cast<int>(narrow_ + (panel < wide_)); }  // vectors
  int64_t padded_columns() const { return vectors * kLanes<scalar>; }
  // Columns of the panel that exist.
  int64_t used_columns(int64_t panel) const {
    const int64_t end = first_column(panel + 1);
    return (end < columns ? end : columns) - first_column(panel);
  }

 private:
  int64_t narrow_;  // width of most panels
  int64_t wide_;    // panels that are one vector wider; they come first
};

// Multiply-add chains per element. A step of the recurrence waits for the one before it; where one
// narrow panel holds all columns there is little work to hide the latency of a chain behind, so
// each element gets several, as many as stay in registers. Elsewhere a tile's rows are chains
// enough.
constexpr int chains_of_lone_panel(int width) {
  return width == 1 ? kTileVectors : width == 2 ? kTileVectors / 2 : 1;
}

// Terms of the longest chain: longer sums are summed in blocks of so many, which rounds less, and
// whose part of a panel stays in L1 while the rows pass by. Sums of bfloat16 are exact enough, and
// there is nowhere in rows of bfloat16 to keep them between blocks.
template <typename scalar>
constexpr int64_t kChainTerms = kTerms<scalar> == 1 ? 128 : std::numeric_limits<int64_t>::max();

// Rows of the tallest tile that sums several such blocks itself. Beside the sums of a taller one
// there are no registers for totals: those wait in memory, and each block is a call.
constexpr int kRowsOfSeveralBlocks = 3;

// Rows of a tile that may run step after step: few, as the constants of the activation share the
// registers with the sums. More rows hide the cost of a call.
constexpr int rows_of_running_tile(int width) {
  return kTileRows * kTileVectors / 2 / (width * chains_of_lone_panel(width));
}

// What becomes of the product of a tile.
enum class Finish {
  kStore,     // out = init + a b
  kActivate,  // out = act(init + a b)
  kBackward,  // out = (init + a b) * act'(y)
};

// Operands of a tile. init, out and y point at whole rows, of a dtype or of its sums; the panel's
// `columns` columns start at `column`. A tile that holds whole rows may run several steps, its
// output being the next one's input: then the rows of each step lie *_step scalars behind those of
// the one before.
template <typename scalar, typename Init = scalar, typename Out = scalar>
struct TileArgs {
  const scalar* const* a = nullptr;         // rows of K scalars
  const PackedOf<scalar>* panel = nullptr;  // [packed_rows(K)][width] vectors
  int64_t first_k = 0;  // of the rows of a; of the panel already taken into account
  int64_t K = 0;
  const Init* const* init = nullptr;
  Out* const* out = nullptr;
  const scalar* const* y = nullptr;  // kBackward only
  int64_t column = 0;
  int64_t columns = 0;
  int64_t steps = 1;
  int64_t a_step = 0, init_step = 0, out_step = 0, y_step = 0;
};

template <Finish finish, Cell cell, typename Sum, typename scalar>
ALWAYS_INLINE Vec<Sum> finished(Vec<Sum> sum, const scalar* y, int64_t lanes) {
  if constexpr (finish == Finish::kActivate) return activate<cell, Sum>(sum);
  if constexpr (finish == Finish::kBackward) {
    return activate_backward<cell, Sum>(sum, load_lanes(y, lanes));
  }
  return sum;
}

// The product of R rows, from first_row on, with a panel of P vectors, in C chains; `lone` when the
// panel is the only one. K <= kChainTerms when `lone` or R > kRowsOfSeveralBlocks.
template <Finish finish, Cell cell, bool lone, int R, int P, int C, typename scalar, typename Init,
          typename Out>
__attribute__((noinline)) void tile(const TileArgs<scalar, Init, Out>& args, int64_t first_row) {
  using Sum = SumOf<scalar>;
  constexpr int L = kLanes<Sum>;
  constexpr int kEach = kTerms<scalar>;  // of a row of the panel
  const int64_t last_lanes = args.columns - (P - 1) * L;
  const auto lanes = [&](int p)
                         __attribute__((always_inline)) { return p < P - 1 ? L : last_lanes; };
  const int64_t steps = lone && R <= rows_of_running_tile(P) ? args.steps : 1;
  for (int64_t s = 0; s < steps; ++s) {
    const scalar* row[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      row[r] = args.a[first_row + r] + s * args.a_step + args.first_k;
    }
    const auto init = [&](int r, int p) __attribute__((always_inline)) {
      return args.init[first_row + r] + s * args.init_step + args.column + p * L;
    };
    const auto out = [&](int r, int p) __attribute__((always_inline)) {
      return args.out[first_row + r] + s * args.out_step + args.column + p * L;
    };
    const auto y = [&](int r, int p) __attribute__((always_inline)) {
      return args.y[first_row + r] + s * args.y_step + args.column + p * L;
    };
    // What the end of a large tile needs may lie in memory: it arrives while the tile is summed,
    // row by row, lest the sums wait behind many fetches at once.
    constexpr bool kFetches = R * P >= 8;
    const auto fetch = [&](int r) __attribute__((always_inline)) {
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) {
        __builtin_prefetch(init(r, p));
        if constexpr (finish == Finish::kBackward) __builtin_prefetch(y(r, p));
        if constexpr (finish == Finish::kStore || finish == Finish::kBackward) {
          __builtin_prefetch(out(r, p), 1);
        }
      }
    };

    const PackedOf<scalar>* panel = args.panel;
    const int64_t whole = args.K / kEach;  // rows of the panel that are full of terms
    Vec<Sum> total[R * P];
    for (int64_t first = 0;;) {
      const int64_t left = whole - first;
      const int64_t terms = left < kChainTerms<scalar> ? left : kChainTerms<scalar>;
      // Chain c sums k = c, c + C, ...; the first one what is left.
      Vec<Sum> sum[C][R * P];
#pragma GCC unroll 32
      for (int i = 0; i < R * P; ++i) {
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) sum[c][i] = Vec<Sum>{};
        // Here the loads are at hand, and the end is what the next step waits for.
        if constexpr (lone) sum[0][i] = load_lanes(init(i / P, i % P), lanes(i % P));
      }
      const auto multiply = [&](int c, int64_t k, int n) __attribute__((always_inline)) {
        Vec<PackedOf<scalar>> b[P];
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) b[p] = load(panel + (k * P + p) * L);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const Vec<PackedOf<scalar>> a = broadcast_terms(row[r], k, n);
#pragma GCC unroll 8
          for (int p = 0; p < P; ++p) sum[c][r * P + p] = multiply_add(a, b[p], sum[c][r * P + p]);
        }
      };
      const auto step = [&](int c, int64_t k)
                            __attribute__((always_inline)) { multiply(c, k, kEach); };
      int64_t k = 0;
      // In several chains there are too few terms to go between; forward's init is in the cache.
      if constexpr (kFetches && C > 1 && finish == Finish::kBackward) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) fetch(r);
      }
      if constexpr (kFetches && C == 1) {
        const int64_t between = terms / (R + 1);
#pragma GCC unroll 1
        for (int r = 0; r < R && first == 0; ++r) {
          fetch(r);
          for (const int64_t end = k + between; k < end; ++k) step(0, k);
        }
      }
      for (; k + C <= terms; k += C) {
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) step(c, k + c);
      }
      if constexpr (C > 1) {
        for (; k < terms; ++k) step(0, k);
      }
      if constexpr (kEach == 2) {
        if (args.K % 2 != 0) multiply(0, whole, 1);
      }

#pragma GCC unroll 32
      for (int i = 0; i < R * P; ++i) {
#pragma GCC unroll 8
        for (int half = C / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
          for (int c = 0; c < half; ++c) sum[c][i] += sum[c + half][i];
        }
      }
      if constexpr (lone) {  // one block: no more columns than one panel's
#pragma GCC unroll 32
        for (int i = 0; i < R * P; ++i) total[i] = sum[0][i];
        break;
      }
      constexpr bool one_block = R > kRowsOfSeveralBlocks;
      if (one_block || first == 0) {
#pragma GCC unroll 32
        for (int i = 0; i < R * P; ++i) {
          total[i] = load_lanes(init(i / P, i % P), lanes(i % P)) + sum[0][i];
        }
        if constexpr (one_block) break;
      } else {
#pragma GCC unroll 32
        for (int i = 0; i < R * P; ++i) total[i] += sum[0][i];
      }
      first += terms;
      if (first == whole) break;
      panel += terms * P * L;
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) row[r] += terms;
    }

    const auto finish_row = [&](int r) __attribute__((always_inline)) {
      Out* to = out(r, 0);
      const scalar* at_y = finish == Finish::kBackward ? y(r, 0) : nullptr;
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) {
        store_lanes(to + p * L,
                    finished<finish, cell, Sum>(total[r * P + p], at_y + p * L, lanes(p)),
                    lanes(p));
      }
    };
    if constexpr (R * P <= 4 || finish == Finish::kStore) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) finish_row(r);
    } else {  // a loop, lest the code outgrow the instruction cache
#pragma GCC unroll 1
      for (int r = 0; r < R; ++r) finish_row(r);
    }
  }
}

template <typename Args>
using Tile = void (*)(const Args&, int64_t first_row);

template <typename Args, Finish finish, Cell cell, bool lone, int R, int P>
constexpr Tile<Args> tile_or_null() {
  if constexpr (P <= kTileVectors && R <= kTileRows) {
    constexpr int C = lone ? chains_of_lone_panel(P) : 1;
    return tile<finish, cell, lone, R, P, C>;
  }
  return nullptr;
}

// Tiles by [height - 1][width - 1].
template <typename Args, Finish finish, Cell cell, bool lone>
constexpr Tile<Args> kTiles[6][4] = {
#define CHARRNN_FAST_TILES(R)                                                                      \
  {tile_or_null<Args, finish, cell, lone, R, 1>(), tile_or_null<Args, finish, cell, lone, R, 2>(), \
   tile_or_null<Args, finish, cell, lone, R, 3>(), tile_or_null<Args, finish, cell, lone, R, 4>()}
    CHARRNN_FAST_TILES(1), CHARRNN_FAST_TILES(2), CHARRNN_FAST_TILES(3), CHARRNN_FAST_TILES(4),
    CHARRNN_FAST_TILES(5), CHARRNN_FAST_TILES(6)
#undef CHARRNN_FAST_TILES
};
static_assert(kTileRows <= 6 && kTileVectors <= 4);

// The height of the next tile of `rows` rows: at most kTileRows, and no small remainder.
inline int64_t tile_height(int64_t rows) {
  if (rows <= kTileRows) return rows;
  return rows >= 2 * kTileRows ? kTileRows : (rows + 1) / 2;
}

// Rows that one tile of the recurrence takes when it can run step after step; 0 when it cannot.
template <typename Sum>
int64_t rows_of_running_tile(const Panels<Sum>& panels) {
  return panels.count == 1 ? rows_of_running_tile(panels.width(0)) : 0;
}

// The product of any number of rows with the panel, of so many vectors, that args name.
template <typename Args>
ALWAYS_INLINE void run_tiles(const Tile<Args> (&tiles)[6][4], const Args& args, int64_t rows,
                             int width) {
  for (int64_t first = 0; first < rows;) {
    const int64_t height = tile_height(rows - first);
    tiles[height - 1][width - 1](args, first);
    first += height;
  }
}

// As multiply_rows, for several tiles and more terms than a chain's: all tiles pass one block of
// the panel before the next one.
template <Finish finish, Cell cell, typename scalar>
void multiply_rows_in_blocks(TileArgs<scalar> block, int64_t rows, int width) {
  using Args = TileArgs<scalar>;
  constexpr int64_t kTermsOfBlock = kChainTerms<scalar>;
  int64_t left = block.K;
  block.K = kTermsOfBlock;
  for (; left > kTermsOfBlock; left -= kTermsOfBlock) {
    run_tiles(kTiles<Args, Finish::kStore, Cell::kRelu, false>, block, rows, width);
    block.first_k += kTermsOfBlock;
    block.panel += kTermsOfBlock * width * kLanes<scalar>;
    block.init = block.out;
    block.init_step = block.out_step;
  }
  block.K = left;
  run_tiles(kTiles<Args, finish, cell, false>, block, rows, width);
}

// The product of any number of rows with one panel of packed weights, which it names in args: in
// place, as the tiles would wait for a copy.
template <Finish finish, Cell cell = Cell::kRelu, typename scalar, typename Init, typename Out>
void multiply_rows(TileArgs<scalar, Init, Out>& args, int64_t rows,
                   const Panels<SumOf<scalar>>& panels, int64_t panel,
                   const PackedOf<scalar>* packed) {
  using Args = TileArgs<scalar, Init, Out>;
  constexpr bool kRecurrence = finish == Finish::kActivate || finish == Finish::kBackward;
  args.column = panels.first_column(panel);
  args.columns = panels.used_columns(panel);
  args.panel = packed + args.column * packed_rows<scalar>(args.K);
  const int width = panels.width(panel);
  if (kRecurrence && panels.count == 1) {
    return run_tiles(kTiles<Args, finish, cell, kRecurrence>, args, rows, width);
  }
  if constexpr (kTerms<scalar> == 1) {
    if (rows > kRowsOfSeveralBlocks && args.K > kChainTerms<scalar>) {
      return multiply_rows_in_blocks<finish, cell>(args, rows, width);
    }
  }
  run_tiles(kTiles<Args, finish, cell, false>, args, rows, width);
}
