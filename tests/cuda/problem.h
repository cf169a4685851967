// One layer's recurrence as a test case: its tensors, what the definition gives for them in
// float64, and a run of the kernels on them.
#pragma once

#include <random>

#include "check.h"

namespace charrnn_fast::cuda {

struct Case {
  int64_t T, B, H, D;
  Dtype dtype;
  Cell cell;
  enum Layout { kFull, kRagged, kPacked } layout;
  bool initial;
};

inline const char* const kActivations[] = {"tanh", "relu", "sigmoid"};
inline const char* const kLayouts[] = {"full", "ragged", "packed"};
inline const char* const kDesigns[] = {"block", "grid", "step"};

inline std::string describe(const Case& c) {
  return "T=" + std::to_string(c.T) + " B=" + std::to_string(c.B) + " H=" + std::to_string(c.H) +
         " D=" + std::to_string(c.D) + " " + kDtypes[static_cast<int>(c.dtype)] + " " +
         kActivations[static_cast<int>(c.cell)] + " " + kLayouts[c.layout] +
         (c.initial ? "" : " without initial state");
}

inline double act(Cell cell, double x) {
  if (cell == Cell::kTanh) return std::tanh(x);
  if (cell == Cell::kSigmoid) return 1 / (1 + std::exp(-x));
  return x < 0 ? 0 : x;
}

inline double slope(Cell cell, double y) {
  if (cell == Cell::kTanh) return 1 - y * y;
  if (cell == Cell::kSigmoid) return y * (1 - y);
  return y <= 0 ? 0 : 1;
}

// The tensors of one case, and the results that the definition gives for them in float64.
struct Problem {
  Case c;
  int64_t N = 0;
  std::vector<int64_t> lengths, step_row;
  Memory W[2], z, h0, y, dy, dh_n;
  std::vector<double> y_expected, h_n_expected, delta_expected, dh0_expected;

  int64_t row(int64_t t, int64_t b) const {
    return (c.layout == Case::kPacked ? step_row[t] : t * c.B) + b;
  }
  int64_t at(int64_t t, int64_t b, int64_t d, int64_t j) const {
    return (row(t, b) * c.D + d) * c.H + j;
  }
  int64_t state_at(int64_t d, int64_t b, int64_t j) const { return (d * c.B + b) * c.H + j; }

  Problem(const Case& c, unsigned seed) : c(c) {
    std::mt19937 random(seed);
    std::normal_distribution<double> normal;
    lengths.assign(c.B, c.T);
    for (int64_t b = 0; b < c.B && c.layout != Case::kFull; ++b) {
      lengths[b] = 1 + static_cast<int64_t>(random() % c.T);
    }
    if (c.layout == Case::kPacked) {
      lengths[0] = c.T;
      std::sort(lengths.begin(), lengths.end(), std::greater<>());
      for (int64_t t = 0; t < c.T; ++t) {
        step_row.push_back(N);
        for (int64_t length : lengths) N += length > t;
      }
    } else {
      N = c.T * c.B;
    }
    const auto fill = [&](Memory& memory, int64_t n, double scale) {
      memory = Memory(n, c.dtype);
      for (int64_t i = 0; i < n; ++i) memory.set(i, scale * normal(random));
    };
    for (int64_t d = 0; d < c.D; ++d) fill(W[d], c.H * c.H, 0.9 / std::sqrt(c.H));
    fill(z, N * c.D * c.H, 1);
    fill(dy, N * c.D * c.H, 1);
    if (c.initial) fill(h0, c.D * c.B * c.H, 1);
    if (c.initial) fill(dh_n, c.D * c.B * c.H, 1);
    y = Memory(N * c.D * c.H, c.dtype);

    y_expected.assign(N * c.D * c.H, 0);
    delta_expected = y_expected;
    h_n_expected.assign(c.D * c.B * c.H, 0);
    dh0_expected = h_n_expected;
    for (int64_t d = 0; d < c.D; ++d) {
      std::vector<double> weights(c.H * c.H);
      for (int64_t i = 0; i < c.H * c.H; ++i) weights[i] = W[d].get(i);
      for (int64_t b = 0; b < c.B; ++b) expect(d, b, weights);
    }
    // Backward starts from the y that was stored.
    for (int64_t i = 0; i < N * c.D * c.H; ++i) y.set(i, y_expected[i]);
    for (int64_t d = 0; d < c.D; ++d) {
      std::vector<double> weights(c.H * c.H);
      for (int64_t i = 0; i < c.H * c.H; ++i) weights[i] = W[d].get(i);
      for (int64_t b = 0; b < c.B; ++b) expect_backward(d, b, weights);
    }
  }

  void expect(int64_t d, int64_t b, const std::vector<double>& weights) {
    std::vector<double> h(c.H, 0), next(c.H);
    for (int64_t j = 0; j < c.H && c.initial; ++j) h[j] = h0.get(state_at(d, b, j));
    for (int64_t i = 0; i < lengths[b]; ++i) {
      const int64_t t = d == 1 ? lengths[b] - 1 - i : i;
      for (int64_t j = 0; j < c.H; ++j) {
        double sum = z.get(at(t, b, d, j));
        for (int64_t k = 0; k < c.H; ++k) sum += weights[j * c.H + k] * h[k];
        next[j] = act(c.cell, sum);
        y_expected[at(t, b, d, j)] = next[j];
      }
      h = next;
    }
    for (int64_t j = 0; j < c.H; ++j) h_n_expected[state_at(d, b, j)] = h[j];
  }

  void expect_backward(int64_t d, int64_t b, const std::vector<double>& weights) {
    std::vector<double> dh(c.H, 0), delta(c.H);
    for (int64_t j = 0; j < c.H && c.initial; ++j) dh[j] = dh_n.get(state_at(d, b, j));
    for (int64_t i = 0; i < lengths[b]; ++i) {
      const int64_t t = d == 1 ? i : lengths[b] - 1 - i;
      for (int64_t j = 0; j < c.H; ++j) {
        const int64_t a = at(t, b, d, j);
        delta[j] = (dy.get(a) + dh[j]) * slope(c.cell, y.get(a));
        delta_expected[a] = delta[j];
      }
      for (int64_t k = 0; k < c.H; ++k) {
        dh[k] = 0;
        for (int64_t j = 0; j < c.H; ++j) dh[k] += delta[j] * weights[j * c.H + k];
      }
    }
    for (int64_t j = 0; j < c.H; ++j) dh0_expected[state_at(d, b, j)] = dh[j];
  }
};

// One rounding of the storage, and float32 sums of H terms over T steps (contracting: the weights'
// norm is below 1.8, and slopes are below 1).
inline double tolerance_of(const Case& c) {
  const double storage = c.dtype == Dtype::kFloat32   ? 0x1p-24
                         : c.dtype == Dtype::kFloat16 ? 0x1p-11
                                                      : 0x1p-8;
  return storage + 0x1p-23 * std::sqrt(static_cast<double>(c.H)) * 4;
}

inline void run(const Problem& problem_, const LaunchPlan& plan, bool backward,
                const std::string& context) {
  Problem& problem = const_cast<Problem&>(problem_);  // kernels take pointers to const void
  const Case& c = problem.c;
  const bool in_place = !backward && c.B % 2 == 0;
  Memory out = in_place ? problem.z : Memory(problem.N * c.D * c.H, c.dtype);
  Memory final(c.D * c.B * c.H, c.dtype);
  const size_t bytes = recurrence_workspace(plan, c.B, c.H, c.D);
  Memory workspace(bytes / 4, Dtype::kFloat32);
  // Only the counters have to be zero; the states are left as NaN.
  for (size_t i = 0; i < bytes / 4 - (bytes > 0 ? 2 * c.D * c.B * c.H : 0); ++i)
    workspace.set(i, 0);
  RecurrenceArgs args{};
  args.T = c.T;
  args.B = c.B;
  args.H = c.H;
  args.D = static_cast<int32_t>(c.D);
  args.dtype = c.dtype;
  args.cell = c.cell;
  args.step_row = c.layout == Case::kPacked ? problem.step_row.data() : nullptr;
  args.lengths = c.layout == Case::kFull ? nullptr : problem.lengths.data();
  for (int64_t d = 0; d < c.D; ++d) args.W_hh[d] = problem.W[d].data();
  args.in = in_place ? out.data() : backward ? problem.dy.data() : problem.z.data();
  args.y = problem.y.data();
  args.out = out.data();
  args.initial = !c.initial ? nullptr : backward ? problem.dh_n.data() : problem.h0.data();
  args.final = final.data();
  args.workspace = workspace.data();
  const std::string where = context + (backward ? " backward " : " forward ") + describe(c);
  const char* error = backward ? charrnn_fast_cuda_backward(&plan, &args, nullptr)
                               : charrnn_fast_cuda_forward(&plan, &args, nullptr);
  if (error != nullptr) return fail(where + ": " + error);
  if (!emulator::settings.fault.empty()) fail(where + ": " + emulator::settings.fault);
  emulator::settings.fault.clear();
  const double tolerance = tolerance_of(c);
  compare(where, backward ? "delta" : "y", out,
          backward ? problem.delta_expected : problem.y_expected, tolerance);
  compare(where, backward ? "dh0" : "h_n", final,
          backward ? problem.dh0_expected : problem.h_n_expected, tolerance);
  if (!workspace.intact() && bytes > 0) fail(where + ": a store outside the workspace");
}

// A plan that names a tile whatever the planner would say.
inline LaunchPlan plan_for(Design design, int tile, const Case& c, int rows) {
  LaunchPlan plan{};
  plan.design = design;
  plan.tile = tile;
  plan.rows = rows;
  plan.together = true;
  plan.reason = "a test";
  if (design == Design::kBlock) {
    const Tile& t = kBlockTiles[tile];
    plan.blocks = static_cast<int>((c.B + rows - 1) / rows);
    plan.blocks_in_group = 1;
    plan.shared_bytes = 2 * rows * t.width() * 4 + (rows + 1) / 2 * 16 + t.weight_bytes();
  } else {
    const Tile& t = kGridTiles[tile];
    plan.blocks_in_group = static_cast<int>((c.H + t.block_outputs() - 1) / t.block_outputs());
    plan.blocks = static_cast<int>((c.B + rows - 1) / rows) * plan.blocks_in_group;
    plan.shared_bytes = kStagedRows * t.width() * 4 + t.weight_bytes();
  }
  return plan;
}

}  // namespace charrnn_fast::cuda
