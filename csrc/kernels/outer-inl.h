// Sums of outer products, which the gradients of weights are: out += a' b for some rows of a and b.
//
// Determinism: each element is one chain of multiply-adds over the rows, whatever tile or thread
// computes it.
#pragma once

#include "format-inl.h"
#include "pack-inl.h"
#include "sequences-inl.h"
#include "tile-inl.h"

namespace charrnn_fast {
namespace {

// Whether rows are always packed first. Tiles of several cache lines across read them where they
// lie, which takes less time than to pack them; narrower ones would come back to the same lines and
// pages for too little work. Terms that must stand side by side are packed in any case.
template <typename scalar>
constexpr bool kOuterPacks = kVectorBytes < 64 || kTerms<scalar> > 1;

// So are rows of a that lie so many bytes apart: each is in pages of its own, and all share a few
// sets of L1.
constexpr int64_t kOuterPacksFrom = 8192;

// Rows of a and b that are multiplied at once, in one chain.
template <typename scalar>
constexpr int64_t kOuterRows = 128 * kTerms<scalar>;

// Operands of a tile: K rows of a, whose columns from `a_column` on are rows of out from `row` on,
// and of b, whose columns begin at `column`.
template <typename scalar, typename Out>
struct OuterArgs {
  int64_t K;
  const scalar* const* a;  // unless they are packed
  const scalar* const* b;
  const PackedOf<scalar>* packed_a;  // [packed_rows(K)][height]
  const PackedOf<scalar>* packed_b;  // [packed_rows(K)][width] vectors
  Out* out;                          // rows of ld
  bool first;                        // out holds nothing yet
  int64_t ld;
  int64_t row, a_column, column;
  int64_t columns;  // that exist, from there on
};

// The tile of R rows and P vectors.
template <int R, int P, bool packed, typename scalar, typename Out>
__attribute__((noinline)) void outer_tile(const OuterArgs<scalar, Out>& args) {
  using Sum = SumOf<scalar>;
  constexpr int L = kLanes<Sum>;
  const int64_t K = packed_rows<scalar>(args.K), row = args.row, column = args.column;
  const int64_t last_lanes = args.columns - (P - 1) * L;
  Out* const out = args.out + row * args.ld + column;
  Vec<Sum> sum[R * P];
#pragma GCC unroll 32
  for (int i = 0; i < R * P; ++i) sum[i] = Vec<Sum>{};
  const auto sum_rows = [&]([[maybe_unused]] int64_t lanes) __attribute__((always_inline)) {
    // Packed rows lie one behind the other; others are found one by one.
    constexpr int kAtOnce = packed ? kTermsAtOnce : 1;
    const auto step = [&](int64_t k, int n) __attribute__((always_inline)) {
      const PackedOf<scalar>*left, *right;
      if constexpr (packed) {
        left = args.packed_a + k * R;
        right = args.packed_b + k * P * L;
      } else {
        left = args.a[k] + args.a_column;
        right = args.b[k] + column;
      }
      // One address each with constant offsets, where g++ would keep one for every offset.
      asm("" : "+r"(left), "+r"(right));
#pragma GCC unroll 4
      for (int i = 0; i < n; ++i) {
        Vec<PackedOf<scalar>> b[P];
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) {
          if constexpr (packed) {
            b[p] = load(right + (i * P + p) * L);
          } else {
            b[p] = load_lanes(right + p * L, p < P - 1 ? L : lanes);
          }
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const Vec<PackedOf<scalar>> a = broadcast(left[i * R + r]);
#pragma GCC unroll 8
          for (int p = 0; p < P; ++p) sum[r * P + p] = plus_product(sum[r * P + p], a, b[p]);
        }
      }
    };
    int64_t k = 0;
    const int64_t between = K / ((R + 1) * kAtOnce) * kAtOnce;
#pragma GCC unroll 1
    for (int r = 0; r < R; ++r) {  // out may lie in memory: it arrives meanwhile
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) __builtin_prefetch(out + r * args.ld + p * L, 1);
      for (const int64_t end = k + between; k < end; k += kAtOnce) step(k, kAtOnce);
    }
    for (; k + kAtOnce <= K; k += kAtOnce) step(k, kAtOnce);
    if constexpr (kAtOnce > 1) {
      for (; k < K; ++k) step(k, 1);
    }
  };
  if (packed || last_lanes == L) {
    sum_rows(L);
  } else {
    sum_rows(last_lanes);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
      const int64_t lanes = p < P - 1 ? L : last_lanes;
      Out* to = out + r * args.ld + p * L;
      const Vec<Sum> total = sum[r * P + p];
      store_lanes(to, args.first ? total : load_lanes(to, lanes) + total, lanes);
    }
  }
}

template <typename Args>
using OuterTile = void (*)(const Args&);

template <typename Args, bool packed, int R, int P>
constexpr OuterTile<Args> outer_tile_or_null() {
  if constexpr (R <= kTileRows && P <= kTileVectors) return outer_tile<R, P, packed>;
  return nullptr;
}

// Tiles by [height - 1][width - 1].
template <typename Args, bool packed>
constexpr OuterTile<Args> kOuterTiles[6][4] = {
#define CHARRNN_FAST_TILES(R)                                                          \
  {outer_tile_or_null<Args, packed, R, 1>(), outer_tile_or_null<Args, packed, R, 2>(), \
   outer_tile_or_null<Args, packed, R, 3>(), outer_tile_or_null<Args, packed, R, 4>()}
    CHARRNN_FAST_TILES(1), CHARRNN_FAST_TILES(2), CHARRNN_FAST_TILES(3), CHARRNN_FAST_TILES(4),
    CHARRNN_FAST_TILES(5), CHARRNN_FAST_TILES(6)
#undef CHARRNN_FAST_TILES
};

// Rows of out that K <= kOuterRows rows of a are multiplied for, with one b after the other. a
// holds blocks of columns, `stride` apart, of each of which the columns in a range are taken.
template <typename scalar>
class OuterProducts {
 public:
  // Elements of work space, for so many columns of so many blocks, `stride` apart.
  static int64_t space(int64_t columns, int blocks, int64_t stride) {
    if (!packs(blocks, stride)) return 0;
    return blocks * tiles(columns) * kTile + kPackedRows * kTileVectors * kLanes<PackedOf<scalar>>;
  }

  OuterProducts(const scalar* const* a, int64_t K, Range columns, int blocks, int64_t stride,
                PackedOf<scalar>* space, bool first)
      : a_(a),
        K_(K),
        columns_(columns),
        stride_(stride),
        packed_a_(space),
        packed_b_(space),
        packs_(packs(blocks, stride)),
        first_(first) {
    if (!packs_) return;
    for (int i = 0; i < blocks; ++i) pack_columns(i);
    packed_b_ += blocks * tiles(columns.last - columns.first) * kTile;
  }

  // out += a' b, of `blocks` blocks of a from the first one on: block i of them is block row(i) of
  // out, whose rows are of panels.columns. At first out holds nothing.
  template <typename Out, typename RowOf>
  void add(const scalar* const* b, int first_block, int blocks, const Panels<SumOf<scalar>>& panels,
           Out* out, const RowOf& row) const {
    if constexpr (!kOuterPacks<scalar>) {
      if (!packs_) return add_tiles<false>(b, first_block, blocks, panels, out, row);
    }
    add_tiles<true>(b, first_block, blocks, panels, out, row);
  }

 private:
  static bool packs(int blocks, int64_t stride) {
    return kOuterPacks<scalar> || blocks * stride * int64_t{sizeof(scalar)} >= kOuterPacksFrom;
  }

  template <bool packed, typename Out, typename RowOf>
  void add_tiles(const scalar* const* b, int first_block, int blocks,
                 const Panels<SumOf<scalar>>& panels, Out* out, const RowOf& row) const {
    using Args = OuterArgs<scalar, Out>;
    Args args = {.K = K_,
                 .a = a_,
                 .b = b,
                 .packed_a = packed_a_,
                 .packed_b = packed_b_,
                 .out = out,
                 .first = first_,
                 .ld = panels.columns,
                 .row = 0,
                 .a_column = 0,
                 .column = 0,
                 .columns = 0};
    // Few rows of b stay in L1 while out is written from end to end; of more, a panel does.
    const bool whole_rows = !packed && K_ * panels.columns * int64_t{sizeof(scalar)} <= kRowsOfB;
    const int64_t at_once = whole_rows ? kTileRows : columns_.last - columns_.first;
    for (Range rows = {columns_.first, 0}; rows.first < columns_.last; rows.first = rows.last) {
      rows.last = rows.first + at_once < columns_.last ? rows.first + at_once : columns_.last;
      for (int64_t p = 0; p < panels.count; ++p) {
        if constexpr (packed) {
          pack_rows<scalar>([&](int64_t k) { return b[k]; }, K_, panels, p, packed_b_);
        }
        args.column = panels.first_column(p);
        args.columns = panels.used_columns(p);
        for (int i = 0; i < blocks; ++i) {
          const int block = first_block + i;
          args.packed_a = packed_a_ + block * tiles(columns_.last - columns_.first) * kTile;
          for (int64_t j = rows.first; j < rows.last; j += kTileRows) {
            args.a_column = block * stride_ + j;
            args.row = row(i) * stride_ + j;
            const int64_t height = rows.last - j < kTileRows ? rows.last - j : kTileRows;
            kOuterTiles<Args, packed>[height - 1][panels.width(p) - 1](args);
            if (packed) args.packed_a += kTile;
          }
        }
      }
    }
  }

  static constexpr int64_t kRowsOfB = 1 << 14;  // bytes of them in half of L1

  // Scalars from one packed tile of a to the next: a cache line more than it needs, lest the tiles
  // all fall into the same few sets of the cache.
  static constexpr int64_t kPackedRows = packed_rows<scalar>(kOuterRows<scalar>);
  static constexpr int64_t kTile = kPackedRows * kTileRows + 64 / sizeof(PackedOf<scalar>);
  static int64_t tiles(int64_t columns) { return (columns + kTileRows - 1) / kTileRows; }

  // The columns of a block: those of a few tiles, which stay in L1, row by row.
  void pack_columns(int block) {
    constexpr int64_t kTilesAtOnce = 8;
    const int64_t whole = (columns_.last - columns_.first) / kTileRows;
    const int64_t rest = (columns_.last - columns_.first) % kTileRows;
    const int64_t first_column = block * stride_ + columns_.first;
    PackedOf<scalar>* const packed =
        packed_a_ + block * tiles(columns_.last - columns_.first) * kTile;
    const auto of_terms = [&](int64_t k) __attribute__((always_inline)) {
      return rows_of_terms<scalar>([&](int64_t i) { return a_[i]; }, k, K_);
    };
    const int64_t rows = packed_rows<scalar>(K_);
    for (int64_t first = 0; first < whole; first += kTilesAtOnce) {
      const int64_t last = whole - first < kTilesAtOnce ? whole : first + kTilesAtOnce;
      for (int64_t k = 0; k < rows; ++k) {
        const auto terms = of_terms(k);
        for (int64_t tile = first; tile < last; ++tile) {
          pack_terms(terms, first_column + tile * kTileRows, kTileRows,
                     packed + tile * kTile + k * kTileRows);
        }
      }
    }
    for (int64_t k = 0; rest > 0 && k < rows; ++k) {
      pack_terms(of_terms(k), first_column + whole * kTileRows, rest,
                 packed + whole * kTile + k * rest);
    }
  }

  const scalar* const* a_;
  int64_t K_;
  Range columns_;
  int64_t stride_;
  PackedOf<scalar>* packed_a_;
  PackedOf<scalar>* packed_b_;
  bool packs_;
  bool first_;
};

}  // namespace
}  // namespace charrnn_fast
