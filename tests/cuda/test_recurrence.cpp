// The recurrence against its definition in float64: persistent kernels, single steps, tokens.
#include "problem.h"

namespace charrnn_fast::cuda {
namespace {

void parity_of(Design design, int tile, int64_t H, bool packed, bool quick) {
  static unsigned number = 0;
  std::vector<Dtype> dtypes;
  if (!packed) dtypes.push_back(Dtype::kFloat32);
  dtypes.push_back(Dtype::kFloat16);
  dtypes.push_back(Dtype::kBFloat16);
  const bool costly = H > 400;
  for (Dtype dtype : dtypes) {
    for (int layout = 0; layout < 3; ++layout) {
      // Each combination of the rest comes up somewhere over all tiles.
      ++number;
      if (wanted_tile >= 0 && tile != wanted_tile) continue;
      if ((quick || costly) && static_cast<int>(number / 3 % 3) != layout) continue;
      Case c{};
      c.T = costly ? 2 + number % 2 : 1 + (number * 5) % 8;
      c.B = costly ? 2 + number % 2 : 1 + (number * 3) % 11;
      c.H = H;
      c.D = 1 + number % 2;
      c.dtype = dtype;
      c.cell = static_cast<Cell>(number % 3);
      c.layout = static_cast<Case::Layout>(layout);
      c.initial = number % 5 != 0;
      const int rows = std::min<int>(static_cast<int>(c.B), 1 + static_cast<int>(number / 2 % 10));
      LaunchPlan plan = plan_for(design, tile, c, rows);
      // All blocks of a cooperative launch have their fibers at once, each with two mappings of
      // memory, and Linux allows 65530 of those: one group, and one direction after the other.
      constexpr int kMostBlocks = 117;
      if (design == Design::kGrid && plan.blocks * c.D > kMostBlocks) {
        plan = plan_for(design, tile, c, static_cast<int>(c.B));
        plan.together = plan.blocks * c.D <= kMostBlocks;
      }
      const Problem problem(c, number);
      in_every_order(
          [&] {
            const std::string context =
                std::string(kDesigns[static_cast<int>(design)]) + " tile " + std::to_string(tile);
            run(problem, plan, false, context);
            run(problem, plan, true, context);
          },
          quick || costly);
    }
  }
}

}  // namespace

void block_parity(bool quick) {
  for (int tile = 0; tile < kBlockTileCount; ++tile) {
    const Tile& t = kBlockTiles[tile];
    // The widest H of a tile, and odd ones inside it.
    for (int64_t H : {t.width(), t.width() - 13, std::max(1, t.width() - 31)}) {
      if (quick && (H == t.width()) != (tile % 2 == 0)) continue;
      parity_of(Design::kBlock, tile, H, t.packed, quick);
    }
  }
}

void grid_parity(bool quick) {
  for (int tile = 0; tile < kGridTileCount; ++tile) {
    const Tile& t = kGridTiles[tile];
    if (quick && tile > 2) continue;
    for (int64_t H : {t.width(), t.width() - 45, t.width() - 90}) {
      if (quick && H != t.width() - 45) continue;
      if (t.width() > 600 && H == t.width() - 90) continue;  // minutes
      parity_of(Design::kGrid, tile, H, false, quick);
    }
  }
}

void step_parity() {
  // The steps with a plain product between them, as the binding calls them.
  unsigned number = 0;
  for (int64_t H : {1, 33, 200}) {
    for (int d = 0; d < 3; ++d) {
      for (int layout = 0; layout < 3; ++layout) {
        ++number;
        const Case c{1 + number % 6,
                     1 + number % 7,
                     H,
                     1,
                     static_cast<Dtype>(d),
                     static_cast<Cell>(number % 3),
                     static_cast<Case::Layout>(layout),
                     number % 4 != 0};
        Problem p(c, number);
        for (int backward = 0; backward < 2; ++backward) {
          StepArgs a{};
          a.T = c.T;
          a.B = c.B;
          a.H = H;
          a.dtype = c.dtype;
          a.cell = c.cell;
          a.lengths = c.layout == Case::kFull ? nullptr : p.lengths.data();
          a.ld = H;
          Memory out = backward ? Memory(p.N * H, c.dtype) : p.z;
          Memory state(c.B * H, c.dtype), product(c.B * H, c.dtype), rows(c.B * H, c.dtype);
          const auto offset = [&](Memory& m, int64_t n) {
            return static_cast<char*>(m.data()) + n * H * (c.dtype == Dtype::kFloat32 ? 4 : 2);
          };
          const auto multiply = [&](Memory& from, bool transposed, auto set) {
            for (int64_t b = 0; b < c.B; ++b) {
              for (int64_t j = 0; j < H; ++j) {
                double sum = 0;
                for (int64_t k = 0; k < H; ++k) {
                  sum += p.W[0].get(transposed ? k * H + j : j * H + k) * from.get(b * H + k);
                }
                set(b, j, sum);
              }
            }
          };
          const std::string where =
              std::string(backward ? "step backward " : "step ") + describe(c);
          for (int64_t i = 0; i < c.B * H; ++i) state.set(i, c.initial ? p.h0.get(i) : 0);
          a.before = -1;
          for (int64_t s = 0; s < c.T; ++s) {
            a.t = backward ? c.T - 1 - s : s;
            a.rows = c.B;
            if (c.layout == Case::kPacked) {
              a.rows = std::count_if(p.lengths.begin(), p.lengths.end(),
                                     [&](int64_t length) { return length > a.t; });
            }
            const int64_t row = p.row(a.t, 0);
            if (backward) {
              a.y = offset(p.y, row);
              a.in = offset(p.dy, row);
              a.product = product.data();
              a.initial = c.initial ? p.dh_n.data() : nullptr;
              a.delta = offset(out, row);
              a.delta_rows = rows.data();
              a.final = state.data();
              if (charrnn_fast_cuda_step_backward(&a, nullptr) != nullptr) fail(where);
              multiply(rows, true,
                       [&](int64_t b, int64_t j, double sum) { product.set(b * H + j, sum); });
            } else {
              multiply(state, false, [&](int64_t b, int64_t j, double sum) {
                if (b < a.rows) out.set((row + b) * H + j, out.get((row + b) * H + j) + sum);
              });
              a.y = offset(out, row);
              a.state = state.data();
              if (charrnn_fast_cuda_step_forward(&a, nullptr) != nullptr) fail(where);
            }
            a.before = a.t;
          }
          if (backward) {
            a.t = -1;
            a.rows = 0;
            a.delta = nullptr;
            if (charrnn_fast_cuda_step_backward(&a, nullptr) != nullptr) fail(where);
          }
          // Here every step rounds to the storage type.
          const double tolerance = tolerance_of(c) * (4 + c.T);
          compare(where, "out", out, backward ? p.delta_expected : p.y_expected, tolerance);
          compare(where, "final", state, backward ? p.dh0_expected : p.h_n_expected, tolerance);
        }
      }
    }
  }
}

void token_parity() {
  std::mt19937 random(3);
  for (int d = 0; d < 3; ++d) {
    for (int64_t H : {1, 31, 70}) {
      const int64_t N = 57, I = 13, ld = 2 * H + 3;
      const Dtype dtype = static_cast<Dtype>(d);
      std::vector<int64_t> ids(N), order(N), starts(I + 1, 0);
      for (auto& id : ids) id = static_cast<int64_t>(random() % I) / 2 * 2;  // some never occur
      Memory table(I * H, dtype), out(N * ld, dtype), delta(N * ld, dtype), sum(I * H, dtype);
      for (int64_t i = 0; i < I * H; ++i)
        table.set(i, static_cast<double>(random() % 1000) / 500 - 1);
      for (int64_t i = 0; i < N * ld; ++i)
        delta.set(i, static_cast<double>(random() % 1000) / 500 - 1);
      ids[5] = I;
      ids[6] = -1;
      const GatherArgs gather{N, I, H, dtype, ids.data(), table.data(), out.data(), ld};
      if (charrnn_fast_cuda_gather(&gather, nullptr) != nullptr) fail("gather");
      for (int64_t n = 0; n < N; ++n) {
        for (int64_t j = 0; j < ld; ++j) {
          ++checks;
          const bool inside = j < H && ids[n] >= 0 && ids[n] < I;
          const double found = out.get(n * ld + j);
          if (inside ? found != table.get(ids[n] * H + j) : !std::isnan(found)) fail("gather");
        }
      }
      if (!out.intact()) fail("gather: a store outside");
      ids[5] = ids[6] = 0;
      for (int64_t n = 0; n < N; ++n) order[n] = n;
      std::stable_sort(order.begin(), order.end(), [&](auto a, auto b) { return ids[a] < ids[b]; });
      for (int64_t n = 0; n < N; ++n) ++starts[ids[n] + 1];
      for (int64_t v = 0; v < I; ++v) starts[v + 1] += starts[v];
      const SegmentSumArgs segments{I,  H,         dtype, order.data(), starts.data(), delta.data(),
                                    ld, sum.data()};
      in_every_order(
          [&] {
            if (charrnn_fast_cuda_segment_sum(&segments, nullptr) != nullptr) fail("segment sum");
            std::vector<double> expected(I * H, 0);
            for (int64_t n = 0; n < N; ++n) {
              for (int64_t j = 0; j < H; ++j) expected[ids[n] * H + j] += delta.get(n * ld + j);
            }
            compare("tokens", "segment sum", sum, expected,
                    d == 0   ? 0x1p-22
                    : d == 1 ? 0x1p-11
                             : 0x1p-8);
          },
          false);
    }
  }
}

}  // namespace charrnn_fast::cuda
