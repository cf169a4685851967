// Sums of outer products, which the gradients of weights are: out += a' b for some rows of a and b.
//
// Bits: each element is one chain of multiply-adds over the rows, whoever computes it beside
// whichever others.

// Whether the rows are packed first. Tiles of several cache lines across read them where they lie,
// which takes less time than to pack them; narrower ones would come back to the same lines and
// pages for too little work.
constexpr bool kOuterPacks = kVectorBytes < 64;

// Operands of a tile: K rows of a, whose columns from `row` on are rows of out, and of b, whose
// columns begin at `column`.
template <typename scalar>
struct OuterArgs {
  int64_t K;
  const scalar* const* a;  // unless kOuterPacks
  const scalar* const* b;
  const scalar* packed_a;  // [K][height]
  const scalar* packed_b;  // [K][width] vectors
  scalar* out;             // rows of ld
  int64_t ld;
  int64_t row, column;
  int64_t columns;  // that exist, from there on
};

// The tile of R rows and P vectors.
template <typename scalar, int R, int P>
__attribute__((noinline)) void outer_tile(const OuterArgs<scalar>& args) {
  constexpr int L = kLanes<scalar>;
  const int64_t K = args.K, row = args.row, column = args.column;
  const int64_t last_lanes = args.columns - (P - 1) * L;
  scalar* const out = args.out + row * args.ld + column;
  Vec<scalar> sum[R * P];
#pragma GCC unroll 32
  for (int i = 0; i < R * P; ++i) sum[i] = Vec<scalar>{};
  const auto sum_rows = [&](int64_t lanes) __attribute__((always_inline)) {
    const auto step = [&](int64_t k) __attribute__((always_inline)) {
      const scalar* left = kOuterPacks ? args.packed_a + k * R : args.a[k] + row;
      const scalar* right = kOuterPacks ? args.packed_b + k * P * L : args.b[k] + column;
      // One address each with constant offsets, where g++ would keep one for every offset.
      asm("" : "+r"(left), "+r"(right));
      Vec<scalar> b[P];
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) b[p] = load_lanes(right + p * L, p < P - 1 ? L : lanes);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Vec<scalar> a = broadcast(left[r]);
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) sum[r * P + p] = multiply_add(a, b[p], sum[r * P + p]);
      }
    };
    int64_t k = 0;
    const int64_t between = K / (R + 1);
#pragma GCC unroll 1
    for (int r = 0; r < R; ++r) {  // out may lie in memory: it arrives meanwhile
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) __builtin_prefetch(out + r * args.ld + p * L, 1);
      for (const int64_t end = k + between; k < end; ++k) step(k);
    }
    for (; k < K; ++k) step(k);
  };
  if (kOuterPacks || last_lanes == L) {
    sum_rows(L);
  } else {
    sum_rows(last_lanes);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
      const int64_t lanes = p < P - 1 ? L : last_lanes;
      scalar* to = out + r * args.ld + p * L;
      store_lanes(to, load_lanes(to, lanes) + sum[r * P + p], lanes);
    }
  }
}

template <typename scalar>
using OuterTile = void (*)(const OuterArgs<scalar>&);

template <typename scalar, int R, int P>
constexpr OuterTile<scalar> outer_tile_or_null() {
  if constexpr (R <= kTileRows && P <= kTileVectors) return outer_tile<scalar, R, P>;
  return nullptr;
}

// Tiles by [height - 1][width - 1].
template <typename scalar>
constexpr OuterTile<scalar> kOuterTiles[6][4] = {
#define CHARRNN_FAST_TILES(R)                                              \
  {outer_tile_or_null<scalar, R, 1>(), outer_tile_or_null<scalar, R, 2>(), \
   outer_tile_or_null<scalar, R, 3>(), outer_tile_or_null<scalar, R, 4>()}
    CHARRNN_FAST_TILES(1), CHARRNN_FAST_TILES(2), CHARRNN_FAST_TILES(3), CHARRNN_FAST_TILES(4),
    CHARRNN_FAST_TILES(5), CHARRNN_FAST_TILES(6)
#undef CHARRNN_FAST_TILES
};

// Rows of out that K <= kChainTerms rows of a are multiplied for, with one b after the other.
template <typename scalar>
class OuterProducts {
 public:
  // Scalars of work space, for so many rows of out.
  static int64_t space(int64_t rows) {
    return kOuterPacks ? tiles(rows) * kTile + kChainTerms * kTileVectors * kLanes<scalar> : 0;
  }

  OuterProducts(const scalar* const* a, int64_t K, Range rows, scalar* space)
      : a_(a), K_(K), rows_(rows), packed_a_(space) {
    if (kOuterPacks) pack_columns();
  }

  // out += a' b in these rows of out, which are of panels.columns.
  void add(const scalar* const* b, const Panels<scalar>& panels, scalar* out) const {
    scalar* const packed_b =
        kOuterPacks ? packed_a_ + tiles(rows_.last - rows_.first) * kTile : nullptr;
    OuterArgs<scalar> args = {.K = K_,
                              .a = a_,
                              .b = b,
                              .packed_a = packed_a_,
                              .packed_b = packed_b,
                              .out = out,
                              .ld = panels.columns,
                              .row = 0,
                              .column = 0,
                              .columns = 0};
    for (int64_t p = 0; p < panels.count; ++p) {
      if (kOuterPacks) {
        pack_rows<scalar>([&](int64_t k) { return b[k]; }, K_, panels, p, packed_b);
      }
      args.column = panels.first_column(p);
      args.columns = panels.used_columns(p);
      args.packed_a = packed_a_;
      for (args.row = rows_.first; args.row < rows_.last; args.row += kTileRows) {
        const int64_t height =
            rows_.last - args.row < kTileRows ? rows_.last - args.row : kTileRows;
        kOuterTiles<scalar>[height - 1][panels.width(p) - 1](args);
        if (kOuterPacks) args.packed_a += kTile;
      }
    }
  }

 private:
  // Scalars from one packed tile of a to the next: a cache line more than it needs, lest the tiles
  // all fall into the same few sets of the cache.
  static constexpr int64_t kTile = kChainTerms * kTileRows + 64 / sizeof(scalar);
  static int64_t tiles(int64_t rows) { return (rows + kTileRows - 1) / kTileRows; }

  // Row by row, as they lie in memory.
  void pack_columns() {
    const int64_t whole = (rows_.last - rows_.first) / kTileRows;
    const int64_t rest = (rows_.last - rows_.first) % kTileRows;
    for (int64_t k = 0; k < K_; ++k) {
      const scalar* source = a_[k] + rows_.first;
      scalar* target = packed_a_ + k * kTileRows;
      for (int64_t tile = 0; tile < whole; ++tile) {
        // A constant number of bytes: a few moves instead of a call.
        std::memcpy(target, source, kTileRows * sizeof(scalar));
        source += kTileRows;
        target += kTile;
      }
      target = packed_a_ + whole * kTile + k * rest;
      for (int64_t r = 0; r < rest; ++r) target[r] = source[r];
    }
  }

  const scalar* const* a_;
  int64_t K_;
  Range rows_;
  scalar* packed_a_;
};
