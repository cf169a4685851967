// The packing of a product's operands, and products that pack as they go.

// Packs columns [column, column + rows) of a, given as K <= kChainTerms rows, into tiles
// [K][height]. Row by row, as they lie in memory.
template <typename scalar>
void pack_columns(const scalar* const* a, int64_t K, int64_t column, int64_t rows, scalar* packed) {
  const int64_t whole = rows / kTileRows;
  const int64_t rest = rows % kTileRows;
  for (int64_t k = 0; k < K; ++k) {
    const scalar* source = a[k] + column;
    scalar* target = packed + k * kTileRows;
    for (int64_t tile = 0; tile < whole; ++tile) {
      // A constant number of bytes: a few moves instead of a call.
      std::memcpy(target, source, kTileRows * sizeof(scalar));
      source += kTileRows;
      target += kPackedTile<scalar>;
    }
    target = packed + whole * kPackedTile<scalar> + k * rest;
    for (int64_t r = 0; r < rest; ++r) target[r] = source[r];
  }
}

// Moves a block of kBlock x kBlock scalars from rows `source_stride` apart to columns.
template <typename scalar>
struct Transpose;

template <>
struct Transpose<float> {
  static constexpr int kBlock = 4;
  static ALWAYS_INLINE void run(const float* source, int64_t source_stride, float* target,
                                int64_t target_stride) {
    typedef float Four __attribute__((vector_size(16)));
    Four a, b, c, d;
    std::memcpy(&a, source, 16);
    std::memcpy(&b, source + source_stride, 16);
    std::memcpy(&c, source + 2 * source_stride, 16);
    std::memcpy(&d, source + 3 * source_stride, 16);
    const Four ab_low = SHUFFLE4(a, b, 0, 4, 1, 5), ab_high = SHUFFLE4(a, b, 2, 6, 3, 7);
    const Four cd_low = SHUFFLE4(c, d, 0, 4, 1, 5), cd_high = SHUFFLE4(c, d, 2, 6, 3, 7);
    a = SHUFFLE4(ab_low, cd_low, 0, 1, 4, 5);
    b = SHUFFLE4(ab_low, cd_low, 2, 3, 6, 7);
    c = SHUFFLE4(ab_high, cd_high, 0, 1, 4, 5);
    d = SHUFFLE4(ab_high, cd_high, 2, 3, 6, 7);
    std::memcpy(target, &a, 16);
    std::memcpy(target + target_stride, &b, 16);
    std::memcpy(target + 2 * target_stride, &c, 16);
    std::memcpy(target + 3 * target_stride, &d, 16);
  }
};

template <>
struct Transpose<double> {
  static constexpr int kBlock = 1;
  static ALWAYS_INLINE void run(const double* source, int64_t, double* target, int64_t) {
    *target = *source;
  }
};

// Transposes K columns of W, whose rows lie ld apart: `source` is the first of n rows. The result
// is K rows, `stride` apart, filled up to whole vectors with zeros.
template <typename scalar>
void pack_transposed_rows(const scalar* source, int64_t ld, int64_t K, int64_t n, scalar* target,
                          int64_t stride) {
  constexpr int64_t kBlock = Transpose<scalar>::kBlock;
  constexpr int64_t kLine =
      64 / sizeof(scalar);  // a cache line of a row of W is used up before it is left
  const int64_t filled = (n + kLanes<scalar> - 1) / kLanes<scalar> * kLanes<scalar>;
  const int64_t whole = n / kBlock * kBlock;
  int64_t done = 0, packed = 0;  // of so many columns, so much along k
#ifdef CHARRNN_FAST_TRANSPOSE
  if constexpr (sizeof(scalar) == 4) {
    constexpr int64_t L = kLanes<scalar>;
    packed = K / kLine * kLine;
    for (; done + L <= n; done += L) {
      for (int64_t k = 0; k < packed; k += L) {
        transpose_lanes(source + done * ld + k, ld, target + k * stride + done, stride);
      }
    }
  }
#endif
  for (int64_t line = 0; line < K; line += kLine) {
    const int64_t end = line + kLine < K ? line + kLine : K;
    for (int64_t j = line < packed ? done : 0; j < whole; j += kBlock) {
      int64_t k = line;
      for (; k + kBlock <= end; k += kBlock) {
        Transpose<scalar>::run(source + j * ld + k, ld, target + k * stride + j, stride);
      }
      for (; k < end; ++k) {
        for (int64_t i = j; i < j + kBlock; ++i) target[k * stride + i] = source[i * ld + k];
      }
    }
    for (int64_t k = line; k < end; ++k) {
      for (int64_t j = whole; j < n; ++j) target[k * stride + j] = source[j * ld + k];
      for (int64_t j = n; j < filled; ++j) target[k * stride + j] = 0;
    }
  }
}

// Packs K columns of W for one panel of the product a W': `source` is the row of the panel's first
// column. The result is [K][width] vectors.
template <typename scalar>
void pack_panel(const scalar* source, int64_t ld, int64_t K, const Panels<scalar>& panels,
                int64_t panel, scalar* target) {
  pack_transposed_rows(source, ld, K, panels.used_columns(panel), target,
                       panels.width(panel) * kLanes<scalar>);
}

// Packs W, [columns, K] as PyTorch keeps weights, in some panels of the product a W'.
template <typename scalar>
void pack_transposed(const scalar* W, int64_t K, const Panels<scalar>& panels, int64_t first_panel,
                     int64_t last_panel, scalar* packed) {
  for (int64_t p = first_panel; p < last_panel; ++p) {
    const int64_t first = panels.first_column(p) * K;
    pack_panel(W + first, K, K, panels, p, packed + first);
  }
}

#ifdef CHARRNN_FAST_TRANSPOSE
// Adds to each sum a chain of `terms` products of a row with kLanes rows of W; chain c starts
// a_step and W_step scalars behind the one before. W is transposed block by block, where it is
// used. Several chains at once hide each other's latency.
template <int chains>
ALWAYS_INLINE void add_chains(const float* a, int64_t a_step, const float* W, int64_t W_step,
                              int64_t K, int64_t terms, Vec<float>* sums) {
  constexpr int64_t L = kLanes<float>;
  alignas(64) float block[chains][L * L];
  int64_t k = 0;
  for (; k + L <= terms; k += L) {
#pragma GCC unroll 2
    for (int c = 0; c < chains; ++c) transpose_lanes(W + c * W_step + k, K, block[c], L);
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) {
#pragma GCC unroll 2
      for (int c = 0; c < chains; ++c) {
        const Vec<float> factor = broadcast(a[c * a_step + k + i]);
        sums[c] = multiply_add(factor, load(block[c] + i * L), sums[c]);
      }
    }
  }
  for (; k < terms; ++k) {
    for (int c = 0; c < chains; ++c) {
      for (int64_t i = 0; i < L; ++i) block[c][i] = W[c * W_step + i * K + k];
      sums[c] = multiply_add(broadcast(a[c * a_step + k]), load(block[c]), sums[c]);
    }
  }
}

// The product of one row with W' in `groups` vectors of columns from column j on. Has the bits of
// tile().
template <Finish finish, Activation activation, int groups>
ALWAYS_INLINE void multiply_row_unpacked(const TileArgs<float>& args, const float* W, int64_t j) {
  constexpr int64_t L = kLanes<float>;
  const int64_t K = args.K;
  const int64_t in_pairs = K / (2 * kChainTerms) * (2 * kChainTerms);
  const float* a = args.a[0];
  const float* rows = W + j * K;
  Vec<float> total[groups];
  for (int g = 0; g < groups; ++g) {
    total[g] = load(args.init[0] + j + g * L);
    for (int64_t k = 0; k < in_pairs; k += 2 * kChainTerms) {
      Vec<float> sums[2] = {};
      add_chains<2>(a + k, kChainTerms, rows + g * L * K + k, kChainTerms, K, kChainTerms, sums);
      total[g] += sums[0];
      total[g] += sums[1];
    }
  }
  for (int64_t k = in_pairs; k < K; k += kChainTerms) {
    const int64_t terms = K - k < kChainTerms ? K - k : kChainTerms;
    Vec<float> sums[groups] = {};
    add_chains<groups>(a + k, 0, rows + k, L * K, K, terms, sums);
    for (int g = 0; g < groups; ++g) total[g] += sums[g];
  }
  for (int g = 0; g < groups; ++g) {
    store(args.out[0] + j + g * L, finished<finish, activation, float>(total[g], nullptr, L));
  }
}

// The same in one panel of several, of whole vectors.
template <Finish finish, Activation activation>
void multiply_row_unpacked(const TileArgs<float>& args, const float* W, const Panels<float>& panels,
                           int64_t panel) {
  constexpr int64_t L = kLanes<float>;
  int64_t j = panels.first_column(panel);
  const int64_t end = j + panels.used_columns(panel);
  for (; j + 2 * L <= end; j += 2 * L) {
    multiply_row_unpacked<finish, activation, 2>(args, W, j);
  }
  if (j < end) multiply_row_unpacked<finish, activation, 1>(args, W, j);
}
#endif

// The product of some rows with W' in the columns of one panel, with W packed block by block just
// before its use: for weights that are used once. Has the bits of packing all of it.
template <Finish finish, Activation activation = Activation::kRelu, typename scalar>
void multiply_unpacked(TileArgs<scalar> args, int64_t rows, const scalar* W,
                       const Panels<scalar>& panels, int64_t panel, scalar* block) {
  const int64_t K = args.K;
#ifdef CHARRNN_FAST_TRANSPOSE
  if constexpr (sizeof(scalar) == 4) {
    if (rows == 1 && panels.count > 1 && panels.used_columns(panel) % kLanes<scalar> == 0) {
      return multiply_row_unpacked<finish, activation>(args, W, panels, panel);
    }
  }
#endif
  const scalar* source = W + panels.first_column(panel) * K;
  for (; K - args.first_k > kChainTerms; args.first_k += kChainTerms) {
    args.K = kChainTerms;
    pack_panel(source + args.first_k, K, args.K, panels, panel, block);
    multiply_rows<Finish::kStore>(args, rows, panels, panel, block);
    args.init = args.out;
  }
  args.K = K - args.first_k;
  pack_panel(source + args.first_k, K, args.K, panels, panel, block);
  multiply_rows<finish, activation>(args, rows, panels, panel, block);
}

// The same with b given as K rows of `columns`, each found by row(k).
template <typename scalar, typename RowOf>
ALWAYS_INLINE void pack_rows(const RowOf& row, int64_t K, const Panels<scalar>& panels,
                             int64_t panel, scalar* target) {
  constexpr int L = kLanes<scalar>;
  const int width = panels.width(panel);
  const int64_t last = panels.used_columns(panel) - (width - 1) * L;
  const int64_t first_column = panels.first_column(panel);
  for (int64_t k = 0; k < K; ++k) {
    const scalar* source = row(k) + first_column;
    for (int p = 0; p < width - 1; ++p) store(target + p * L, load(source + p * L));
    source += (width - 1) * L;
    target += (width - 1) * L;
    store(target, load_lanes(source, last));
    target += L;
  }
}
