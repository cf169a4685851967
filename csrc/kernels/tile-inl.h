// The register tile of products with packed weights. What else is multiplied: sequences of one step
// (one-step-inl.h), and rows for the gradients of weights (outer-inl.h).
//
// Determinism: each element of a product is one chain of multiply-adds over k, or several, which
// the width of the whole product decides. So results do not depend on the rest of the batch, on
// the heights and widths of tiles, or on the number of threads.
#pragma once

#include "epilogues-inl.h"
#include "format-inl.h"
#include "sequences-inl.h"

namespace charrnn_fast {
namespace {

// Accumulators that a tile may fill: its rows times its vectors.
constexpr int kAccumulators = kTileRows * kTileVectors;

// Columns of a product, cut into panels of as many vectors as a tile has, as even as possible. The
// columns may be hidden units of several gates: then a panel holds one vector of units, gate after
// gate, so that the tile that sums them has all that their step needs in registers.
template <typename scalar>
struct Panels {
  int64_t columns;  // units
  int64_t vectors;  // of one gate: columns / lanes, rounded up
  int64_t count;
  int gates;

  explicit Panels(int64_t n, int of_gates = 1)
      : columns(n),
        vectors((n + kLanes<scalar> - 1) / kLanes<scalar>),
        count(of_gates > 1 ? vectors : (vectors + kTileVectors - 1) / kTileVectors),
        gates(of_gates),
        narrow_(count > 0 ? vectors / count : 0),
        wide_(vectors - narrow_ * count) {}

  int64_t first_column(int64_t panel) const {
    return (panel * narrow_ + (panel < wide_ ? panel : wide_)) * kLanes<scalar>;
  }
  // Vectors of a panel, of all gates.
  int width(int64_t panel) const { return static_cast<int>(narrow_ + (panel < wide_)) * gates; }
  int64_t padded_columns() const { return vectors * kLanes<scalar>; }
  // Columns of n panels that exist.
  int64_t used_columns(int64_t panel, int64_t n = 1) const {
    const int64_t end = first_column(panel + n);
    return (end < columns ? end : columns) - first_column(panel);
  }

 private:
  int64_t narrow_;  // vectors of a gate in most panels
  int64_t wide_;    // panels that are one vector wider; they come first
};

// Where a panel lies in `scalar` weights packed for K terms, and how large all panels are.
template <typename scalar>
int64_t packed_place(const Panels<SumOf<scalar>>& panels, int64_t panel, int64_t K) {
  return panels.first_column(panel) * panels.gates * packed_rows<scalar>(K);
}
template <typename scalar>
int64_t packed_size(const Panels<SumOf<scalar>>& panels, int64_t K) {
  return panels.padded_columns() * panels.gates * packed_rows<scalar>(K);
}

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

// Rows of the tallest tile that sums several such blocks itself. A taller one has no registers left
// for totals: its totals wait in memory, and each block is a call.
constexpr int rows_of_several_blocks(int width) {
  const int rows = kAccumulators / (2 * width);
  return rows < 1 ? 1 : rows > 3 ? 3 : rows;
}

// Rows of the tallest tile of `width` vectors.
constexpr int tallest_tile(int width) {
  const int rows = kAccumulators / width;
  return rows < kTileRows ? rows : kTileRows;
}

// Rows of a tile that may run step after step: few, as the constants of the activation share the
// registers with the sums. More rows hide the cost of a call.
constexpr int rows_of_running_tile(int width) {
  return kAccumulators / 2 / (width * chains_of_lone_panel(width));
}

// Bytes of packed weights from which on they are prefetched while the part before them is
// multiplied: beside all else that a step reads, L2 hardly keeps so many until the next one.
constexpr int64_t kAheadFrom = int64_t{1} << 20;
// What a tile prefetches in every round of its loop: a cache line.
template <typename scalar>
constexpr int64_t kAheadAtOnce = 64 / sizeof(PackedOf<scalar>);

// Operands of a tile. init and out point at whole rows, of a dtype or of its sums. A tile that
// holds whole rows may run several steps, its output being the next one's input: then the rows of
// each step lie *_step scalars behind those of the one before.
template <typename scalar, typename InitType = scalar, typename OutType = scalar>
struct TileArgs {
  using Scalar = scalar;
  using Sum = SumOf<scalar>;
  using Init = InitType;
  using Out = OutType;
  static constexpr int kLanesOfSum = kLanes<Sum>;

  const scalar* const* a = nullptr;         // rows of K scalars
  const PackedOf<scalar>* panel = nullptr;  // [packed_rows(K)][width] vectors
  int64_t first_k = 0;  // of the rows of a; of the panel already taken into account
  int64_t K = 0;
  const Init* const* init = nullptr;
  int64_t init_column = 0;  // of the panel
  Out* const* out = nullptr;
  int64_t column = 0;   // of the panel
  int64_t columns = 0;  // that exist, from there on
  // The part of packed weights that is multiplied next, from where it is not yet prefetched; null:
  // nothing is.
  const PackedOf<scalar>* ahead = nullptr;
  const PackedOf<scalar>* ahead_end = nullptr;
  bool looks_ahead = false;
  int64_t steps = 1;
  int64_t a_step = 0, init_step = 0, out_step = 0;

  // Of a step of a cell (see ForwardRow and BackwardRow); null where there is none.
  int64_t H = 0;
  const Init* const* projected = nullptr;  // forward: rows of all sums
  const scalar* const* y = nullptr;
  Sum* const* carry = nullptr;  // forward: c
  scalar* const* saved = nullptr;
  scalar* const* cells = nullptr;  // backward: dcells
  const scalar* const* before = nullptr;
  int64_t y_step = 0, saved_step = 0, cells_step = 0, before_step = 0;
};

// The product of R rows, from first_row on, with P vectors, in C chains: those of a panel, or of
// several side by side, each W vectors wide; `lone` when the panel is the only one. Sums of more
// than kChainTerms are summed in blocks of so many, unless the panel is lone or
// R > rows_of_several_blocks(W): then K is no more than one block.
//
// One function, as its registers are allocated as a whole: with the chains in a class of their own,
// g++ 12 makes other code for nine of ten tiles. Compare `objdump -d` before and after a change.
template <typename End, bool lone, int R, int P, int C, int W, typename Args>
__attribute__((noinline)) void tile(const Args& args, int64_t first_row) {
  using scalar = typename Args::Scalar;
  using Sum = SumOf<scalar>;
  constexpr int L = kLanes<Sum>;
  constexpr int kEach = kTerms<scalar>;  // of a row of the panel
  // Vectors of init that belong to a panel, and scalars of weights.
  constexpr int kInitOfPanel = W / End::kOfUnit * End::kInitScale;
  const int64_t next_panel = P > W ? packed_rows<scalar>(args.K) * W * L : 0;
  const int64_t last_lanes = args.columns - (P - 1) * L;
  const auto lanes = [&](int p) __attribute__((always_inline)) {
    return End::kPadded || p < P - 1 ? L : last_lanes;
  };
  const int64_t steps = lone && R <= rows_of_running_tile(P) ? args.steps : 1;
  for (int64_t s = 0; s < steps; ++s) {
    const scalar* row[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      row[r] = args.a[first_row + r] + s * args.a_step + args.first_k;
    }
    const auto init = [&](int r, int p) __attribute__((always_inline)) {
      const auto* at = args.init[first_row + r] + s * args.init_step + args.init_column;
      return load_lanes(at + (p / W * kInitOfPanel + p % W) * L, lanes(p));
    };
    // The operands of the epilogue may lie in memory: they are prefetched while the sums are made.
    constexpr bool kPrefetches = R * P >= 8;

    const PackedOf<scalar>* panel = args.panel;
    const int64_t whole = args.K / kEach;  // rows of the panel that are full of terms
    Vec<Sum> total[R * P];
    for (int64_t first = 0;;) {
      const int64_t left = whole - first;
      const int64_t terms = lone || left < kChainTerms<scalar> ? left : kChainTerms<scalar>;
      // Chain c sums k = c, c + C, ...; the first one what is left.
      Vec<Sum> sum[C][R * P];
#pragma GCC unroll 32
      for (int i = 0; i < R * P; ++i) {
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) sum[c][i] = Vec<Sum>{};
        // Here the loads overlap with the products; at the end the next step would wait for them.
        if constexpr (lone && End::kInitFirst) sum[0][i] = init(i / P, i % P);
      }
      const auto multiply = [&](int c, int64_t k, int n) __attribute__((always_inline)) {
        if constexpr (kAccumulators <= 12 &&
                      R < P) {  // few registers: hold the operand that has fewer
          Vec<PackedOf<scalar>> a[R];
#pragma GCC unroll 8
          for (int r = 0; r < R; ++r) a[r] = broadcast_terms(row[r], k, n);
#pragma GCC unroll 8
          for (int p = 0; p < P; ++p) {
            const Vec<PackedOf<scalar>> b = load(panel + p / W * next_panel + (k * W + p % W) * L);
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r)
              sum[c][r * P + p] = plus_product(sum[c][r * P + p], a[r], b);
          }
          return;
        }
        Vec<PackedOf<scalar>> b[P];
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) b[p] = load(panel + p / W * next_panel + (k * W + p % W) * L);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const Vec<PackedOf<scalar>> a = broadcast_terms(row[r], k, n);
#pragma GCC unroll 8
          for (int p = 0; p < P; ++p) sum[c][r * P + p] = plus_product(sum[c][r * P + p], a, b[p]);
        }
      };
      constexpr int kAtOnce = C > 1 ? C : kTermsAtOnce;
      const auto step = [&](int64_t k) __attribute__((always_inline)) {
#pragma GCC unroll 8
        for (int i = 0; i < kAtOnce; ++i) multiply(i % C, k + i, kEach);
      };
      int64_t k = 0;
      // In several chains there are too few terms to go between; forward's init is in the cache.
      if constexpr (kPrefetches && C > 1 && End::kPrefetchesAtOnce) {
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) End::template prefetch<P>(args, first_row + r, s);
      }
      // A tile of few rows takes no longer than what it would prefetch.
      constexpr bool kLooksAhead = !lone && R > rows_of_several_blocks(W);
      if constexpr (kPrefetches && C == 1) {
        // Many go row by row between the sums, whose own loads would have to wait for a core's miss
        // buffers. For few that does not pay: each short loop ends in a branch that is mispredicted
        // where a busy sibling shares the predictor.
        constexpr int kFewLines = 12;
        const bool few = R * End::template lines<P>(args) <= kFewLines;
        const bool at_once = few || (kLooksAhead && args.ahead != nullptr);
        const int64_t between = at_once ? 0 : terms / ((R + 1) * kAtOnce) * kAtOnce;
#pragma GCC unroll 1
        for (int r = 0; r < R && first == 0; ++r) {
          End::template prefetch<P>(args, first_row + r, s);
          for (const int64_t end = k + between; k < end; k += kAtOnce) step(k);
        }
      }
      if (kLooksAhead && args.ahead != nullptr) {
        const PackedOf<scalar>* ahead = args.ahead;
        for (; k + kAtOnce <= terms; k += kAtOnce, ahead += kAheadAtOnce<scalar>) {
          __builtin_prefetch(ahead, 0, 2);  // into L2: L1 has no room
          step(k);
        }
      }
      for (; k + kAtOnce <= terms; k += kAtOnce) step(k);
      if constexpr (kAtOnce > 1) {
        for (; k < terms; ++k) multiply(0, k, kEach);
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
      if constexpr (lone) {
#pragma GCC unroll 32
        for (int i = 0; i < R * P; ++i) {
          total[i] = End::kInitFirst ? sum[0][i] : init(i / P, i % P) + sum[0][i];
        }
        break;
      }
      constexpr bool one_block = R > rows_of_several_blocks(W);
      if (one_block || first == 0) {
#pragma GCC unroll 32
        for (int i = 0; i < R * P; ++i) total[i] = init(i / P, i % P) + sum[0][i];
        if constexpr (one_block) break;
      } else {
#pragma GCC unroll 32
        for (int i = 0; i < R * P; ++i) total[i] += sum[0][i];
      }
      first += terms;
      if (first == whole) break;
      panel += terms * W * L;
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) row[r] += terms;
    }

    if constexpr (R * P <= 4 || !End::kRecurrence) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) End::template finish<P>(args, first_row + r, s, total + r * P);
    } else if constexpr (End::kHalves) {
      // Both halves are long chains of latencies. All rows pass the first one before the second,
      // as a core looks ahead about a row and a half.
      constexpr int kUnits = P / W;  // vectors of them
      const int64_t last_units = args.columns - (kUnits - 1) * L;
      decltype(End::begin(args, first_row, s, total, 0, L)) midway[R * kUnits];
#pragma GCC unroll 1
      for (int i = 0; i < R * kUnits; ++i) {
        const int r = i / kUnits, u = i % kUnits;
        const int64_t n = u < kUnits - 1 ? L : last_units;
        midway[i] = End::begin(args, first_row + r, s, total + r * P, u, n);
      }
#pragma GCC unroll 1
      for (int i = 0; i < R * kUnits; ++i) {
        const int r = i / kUnits, u = i % kUnits;
        End::end(args, first_row + r, s, midway[i], u, u < kUnits - 1 ? L : last_units);
      }
    } else {  // a loop: unrolled, the code outgrows the instruction cache
#pragma GCC unroll 1
      for (int r = 0; r < R; ++r) End::template finish<P>(args, first_row + r, s, total + r * P);
    }
  }
}

template <typename Args>
using Tile = void (*)(const Args&, int64_t first_row);

template <typename Args, typename End, bool lone, int R, int P>
constexpr Tile<Args> tile_or_null() {
  if constexpr (R <= tallest_tile(P) && End::template takes<P>()) {
    constexpr int C = lone ? chains_of_lone_panel(P) : 1;
    return tile<End, lone, R, P, C, P>;
  }
  return nullptr;
}

// Tiles by [height - 1][width - 1].
template <typename Args, typename End, bool lone>
constexpr Tile<Args> kTiles[6][4] = {
#define CHARRNN_FAST_TILES(R)                                                    \
  {tile_or_null<Args, End, lone, R, 1>(), tile_or_null<Args, End, lone, R, 2>(), \
   tile_or_null<Args, End, lone, R, 3>(), tile_or_null<Args, End, lone, R, 4>()}
    CHARRNN_FAST_TILES(1), CHARRNN_FAST_TILES(2), CHARRNN_FAST_TILES(3), CHARRNN_FAST_TILES(4),
    CHARRNN_FAST_TILES(5), CHARRNN_FAST_TILES(6)
#undef CHARRNN_FAST_TILES
};
static_assert(kTileRows <= 6 && kTileVectors <= 4);

// Panels that a tile of few rows takes side by side: each sum is a chain of latencies, and a core
// wants about eight of them at once. Of whole cache lines four keep up with L2, and two panels at
// once are slower.
constexpr int panels_abreast(int64_t rows, int width) {
  const bool few = kVectorBytes < 64 && width > 1 && rows * width <= 4;
  return few ? 8 / (static_cast<int>(rows) * width) : 1;
}

template <typename Args, typename End, int R, int W>
constexpr Tile<Args> tile_abreast_or_null() {
  constexpr int N = panels_abreast(R, W);
  if constexpr (N > 1 && End::kAbreast && End::template takes<W>()) {
    static_assert(R <= rows_of_several_blocks(W));
    return tile<End, false, R, N * W, 1, W>;
  }
  return nullptr;
}

// Tiles of panels_abreast() by [height - 1][width - 2].
template <typename Args, typename End>
constexpr Tile<Args> kTilesAbreast[2][3] = {
#define CHARRNN_FAST_TILES(R)                                                        \
  {tile_abreast_or_null<Args, End, R, 2>(), tile_abreast_or_null<Args, End, R, 3>(), \
   tile_abreast_or_null<Args, End, R, 4>()}
    CHARRNN_FAST_TILES(1), CHARRNN_FAST_TILES(2)
#undef CHARRNN_FAST_TILES
};

// The height of the next tile of `rows` rows: at most `tallest`, and no small remainder.
inline int64_t tile_height(int64_t rows, int64_t tallest) {
  if (rows <= tallest) return rows;
  return rows >= 2 * tallest ? tallest : (rows + 1) / 2;
}

// Rows that one tile of the recurrence takes when it can run step after step; 0 when it cannot.
template <typename Sum>
int64_t rows_of_running_tile(const Panels<Sum>& panels) {
  return panels.count == 1 ? rows_of_running_tile(panels.width(0)) : 0;
}

// The product of any number of rows with the panel that args name, `width` vectors wide.
template <typename Args>
ALWAYS_INLINE void run_tiles(const Tile<Args> (&tiles)[6][4], Args& args, int64_t rows, int width) {
  using scalar = typename Args::Scalar;
  const int64_t tallest = tallest_tile(width);
  for (int64_t first = 0; first < rows;) {
    const int64_t height = tile_height(rows - first, tallest);
    tiles[height - 1][width - 1](args, first);
    first += height;
    if (args.ahead != nullptr) {
      args.ahead += args.K / (kTerms<scalar> * kTermsAtOnce) * kAheadAtOnce<scalar>;
      if (args.ahead >= args.ahead_end) args.ahead = nullptr;
    }
  }
}

// As multiply_rows, for several tiles and more terms than a chain's: all tiles pass one block of
// the panel before the next one. The partial sums of a recurrence wait in rows of their own, as a
// row of its result may be narrower than the panel.
template <typename End, typename Args>
void multiply_rows_in_blocks(Args block, int64_t rows, int width) {
  using scalar = typename Args::Scalar;
  using Sum = typename Args::Sum;
  constexpr int64_t kTermsOfBlock = kChainTerms<scalar>;
  constexpr int64_t kColumns = 4 * kLanes<Sum>;
  constexpr bool apart = End::kRecurrence;
  alignas(64) Sum partial[apart ? kBlockSlots * kColumns : 1];
  Sum* partial_rows[apart ? kBlockSlots : 1];
  auto* const out = block.out;
  const int64_t column = block.column, columns = block.columns;
  const auto *const next_panel = block.ahead, *const next_panel_end = block.ahead_end;
  if constexpr (apart) {
    for (int64_t i = 0; i < rows; ++i) partial_rows[i] = partial + i * kColumns;
    block.out = partial_rows;
    block.column = 0;
    if (End::kPadded) block.columns = width * kLanes<Sum>;
  }
  int64_t left = block.K;
  block.K = kTermsOfBlock;
  const int64_t size = kTermsOfBlock * width * kLanes<scalar>;
  for (; left > kTermsOfBlock; left -= kTermsOfBlock) {
    block.ahead = block.looks_ahead ? block.panel + size : nullptr;
    block.ahead_end = block.panel + 2 * size;
    run_tiles(kTiles<Args, Store<>, false>, block, rows, width);
    block.first_k += kTermsOfBlock;
    block.panel += size;
    block.init = block.out;
    block.init_column = block.column;
    block.init_step = block.out_step;
  }
  block.K = left;
  block.out = out;
  block.column = column;
  block.columns = columns;
  block.ahead = next_panel;
  block.ahead_end = next_panel_end;
  run_tiles(kTiles<Args, End, false>, block, rows, width);
}

// The product of any number of rows (of a recurrence no more than kBlockSlots) with one panel of
// packed weights, or with panels_abreast(), which it names in args: in place, as the tiles would
// wait for a copy.
template <typename End, typename scalar, typename Init, typename Out>
void multiply_rows(TileArgs<scalar, Init, Out>& args, int64_t rows,
                   const Panels<SumOf<scalar>>& panels, int64_t panel, int64_t abreast,
                   const PackedOf<scalar>* packed) {
  using Args = TileArgs<scalar, Init, Out>;
  constexpr int L = kLanes<SumOf<scalar>>;
  const int64_t column = panels.first_column(panel);
  const int width = panels.width(panel);
  args.init_column = column * End::kInitScale + End::kInitShift * L;
  args.column = column * End::kOutScale;
  args.columns =
      End::kPadded && !End::kRecurrence ? width * L : panels.used_columns(panel, abreast);
  args.panel = packed + packed_place<scalar>(panels, panel, args.K);
  if (abreast > 1) return kTilesAbreast<Args, End>[rows - 1][width - 2](args, 0);
  if (End::kRecurrence && panels.count == 1) {
    return run_tiles(kTiles<Args, End, End::kRecurrence>, args, rows, width);
  }
  if constexpr (kTerms<scalar> == 1) {
    if (rows > rows_of_several_blocks(width) && args.K > kChainTerms<scalar>) {
      return multiply_rows_in_blocks<End>(args, rows, width);
    }
  }
  run_tiles(kTiles<Args, End, false>, args, rows, width);
}

// The product with some panels, from the first on or from the last.
//
// A core's own prefetchers stop at the end of what is read, and come back to it for every tile: of
// weights in L3 the first tile of each block would wait for nearly all of them.
template <typename End, typename scalar, typename Init, typename Out>
void multiply(TileArgs<scalar, Init, Out>& args, int64_t rows, const Panels<SumOf<scalar>>& panels,
              Range mine, const PackedOf<scalar>* packed, bool backwards = false) {
  const int64_t terms = args.K < kChainTerms<scalar> ? args.K : kChainTerms<scalar>;
  args.looks_ahead =
      packed_size<scalar>(panels, args.K) * int64_t{sizeof(PackedOf<scalar>)} >= kAheadFrom;
  while (mine.first < mine.last) {
    const int64_t at = backwards ? mine.last - 1 : mine.first;
    int64_t n = 1;
    if (End::kAbreast && rows > 0 && panels.count > 1) {
      const int64_t most = panels_abreast(rows, panels.width(at));
      const int64_t other = backwards ? at - most + 1 : at + most - 1;
      const bool there = other >= mine.first && other < mine.last;
      if (there && panels.width(other) == panels.width(at)) n = most;
    }
    const int64_t first = backwards ? mine.last - n : mine.first;
    if (backwards) {
      mine.last -= n;
    } else {
      mine.first += n;
    }
    args.ahead = nullptr;
    if (args.looks_ahead && mine.first < mine.last) {
      const int64_t next = backwards ? mine.last - 1 : mine.first;
      args.ahead = packed + packed_place<scalar>(panels, next, args.K);
      args.ahead_end =
          args.ahead + packed_rows<scalar>(terms) * panels.width(next) * kLanes<SumOf<scalar>>;
    }
    multiply_rows<End>(args, rows, panels, first, n, packed);
  }
}

}  // namespace
}  // namespace charrnn_fast
