// Runs the CUDA kernels in the emulator against a plain float64 recurrence.
//
//   test_kernels parity [quick]   every tile, dtype and activation over odd shapes, in three thread
//   orders test_kernels faults           every barrier and shuffle left out in turn, and other
//   faults: all caught? test_kernels plan             the plan for a table of real devices, and
//   what every plan must hold test_kernels races            a few launches, for a build with a
//   sanitizer test_kernels race             one launch without its barrier, which ThreadSanitizer
//   must report
//
// Prints one line for each group, and FAIL lines; the exit status is the number of failures, at
// most 100.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "../../csrc/cuda/compat.cuh"
#include "../../csrc/cuda/rnn_cuda.h"

namespace {

using namespace charrnn_fast;
using namespace charrnn_fast::cuda;

int failures = 0;
int64_t checks = 0;

void fail(const std::string& what) {
  ++failures;
  if (failures <= 40) std::printf("FAIL %s\n", what.c_str());
}

// A device's memory: guarded on both sides, and NaN until written.
class Memory {
 public:
  Memory() = default;
  Memory(size_t elements, Dtype dtype) : dtype_(dtype), elements_(elements) {
    bytes_.assign(size() + 2 * kMargin, static_cast<char>(0xff));
  }
  size_t size() const { return elements_ * (dtype_ == Dtype::kFloat32 ? 4 : 2); }
  void* data() { return bytes_.empty() ? nullptr : bytes_.data() + kMargin; }
  double get(size_t i) const {
    const char* at = bytes_.data() + kMargin;
    if (dtype_ == Dtype::kFloat32) return reinterpret_cast<const float*>(at)[i];
    const uint16_t bits = reinterpret_cast<const uint16_t*>(at)[i];
    return dtype_ == Dtype::kFloat16 ? from_float16(bits) : from_bfloat16(bits);
  }
  void set(size_t i, double value) {
    char* at = bytes_.data() + kMargin;
    if (dtype_ == Dtype::kFloat32) {
      reinterpret_cast<float*>(at)[i] = static_cast<float>(value);
    } else {
      reinterpret_cast<uint16_t*>(at)[i] = dtype_ == Dtype::kFloat16
                                               ? to_float16(static_cast<float>(value))
                                               : to_bfloat16(static_cast<float>(value));
    }
  }
  bool intact() const {
    const auto touched = [](char c) { return c != static_cast<char>(0xff); };
    return std::none_of(bytes_.begin(), bytes_.begin() + kMargin, touched) &&
           std::none_of(bytes_.end() - kMargin, bytes_.end(), touched);
  }

 private:
  static constexpr size_t kMargin = 256;
  Dtype dtype_ = Dtype::kFloat32;
  size_t elements_ = 0;
  std::vector<char> bytes_;
};

struct Case {
  int64_t T, B, H, D;
  Dtype dtype;
  Activation activation;
  enum Layout { kFull, kRagged, kPacked } layout;
  bool initial;
};

const char* const kDtypes[] = {"float32", "float16", "bfloat16"};
const char* const kActivations[] = {"tanh", "relu", "sigmoid"};
const char* const kLayouts[] = {"full", "ragged", "packed"};
const char* const kDesigns[] = {"block", "grid", "step"};

std::string describe(const Case& c) {
  return "T=" + std::to_string(c.T) + " B=" + std::to_string(c.B) + " H=" + std::to_string(c.H) +
         " D=" + std::to_string(c.D) + " " + kDtypes[static_cast<int>(c.dtype)] + " " +
         kActivations[static_cast<int>(c.activation)] + " " + kLayouts[c.layout] +
         (c.initial ? "" : " without initial state");
}

double act(Activation activation, double x) {
  if (activation == Activation::kTanh) return std::tanh(x);
  if (activation == Activation::kSigmoid) return 1 / (1 + std::exp(-x));
  return x < 0 ? 0 : x;
}

double slope(Activation activation, double y) {
  if (activation == Activation::kTanh) return 1 - y * y;
  if (activation == Activation::kSigmoid) return y * (1 - y);
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
        next[j] = act(c.activation, sum);
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
        delta[j] = (dy.get(a) + dh[j]) * slope(c.activation, y.get(a));
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

// The greatest error in units of 2^-bits of a tensor's greatest value; NaN and untouched guards are
// failures.
void compare(const std::string& where, const char* name, const Memory& found,
             const std::vector<double>& expected, double tolerance) {
  ++checks;
  double scale = 1, worst = 0;
  size_t at = 0;
  for (double value : expected) scale = std::max(scale, std::abs(value));
  for (size_t i = 0; i < expected.size(); ++i) {
    const double error = std::abs(found.get(i) - expected[i]);
    if (!(error <= worst)) {  // a NaN is the worst
      worst = error;
      at = i;
      if (std::isnan(worst)) break;
    }
  }
  if (!(worst <= tolerance * scale)) {
    fail(where + ": " + name + "[" + std::to_string(at) + "] is " + std::to_string(found.get(at)) +
         ", not " + std::to_string(expected[at]));
  }
  if (!found.intact()) fail(where + ": a store outside " + name);
}

// One rounding of the storage, and float32 sums of H terms over T steps (contracting: the weights'
// norm is below 1.8, and slopes are below 1).
double tolerance_of(const Case& c) {
  const double storage = c.dtype == Dtype::kFloat32   ? 0x1p-24
                         : c.dtype == Dtype::kFloat16 ? 0x1p-11
                                                      : 0x1p-8;
  return storage + 0x1p-23 * std::sqrt(static_cast<double>(c.H)) * 4;
}

void run(const Problem& problem_, const Plan& plan, bool backward, const std::string& context) {
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
  args.activation = c.activation;
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
Plan plan_for(Design design, int tile, const Case& c, int rows) {
  Plan plan{};
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

void in_every_order(const std::function<void()>& body, bool quick) {
  using emulator::Order;
  for (Order order : {Order::kForward, Order::kReverse, Order::kRandom, Order::kUneven}) {
    if (quick && (order == Order::kForward || order == Order::kReverse)) continue;
    emulator::settings.order = order;
    ++emulator::settings.seed;
    body();
  }
  emulator::settings.order = Order::kForward;
}

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
      if ((quick || costly) && static_cast<int>(number / 3 % 3) != layout) continue;
      Case c{};
      c.T = costly ? 2 + number % 2 : 1 + (number * 5) % 8;
      c.B = costly ? 2 + number % 2 : 1 + (number * 3) % 11;
      c.H = H;
      c.D = 1 + number % 2;
      c.dtype = dtype;
      c.activation = static_cast<Activation>(number % 3);
      c.layout = static_cast<Case::Layout>(layout);
      c.initial = number % 5 != 0;
      const int rows = std::min<int>(static_cast<int>(c.B), 1 + static_cast<int>(number / 2 % 10));
      const Plan plan = plan_for(design, tile, c, rows);
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

void report_group(const char* name, int64_t before) {
  std::printf("%-8s %6lld checks\n", name, static_cast<long long>(checks - before));
  std::fflush(stdout);
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
                     static_cast<Activation>(number % 3),
                     static_cast<Case::Layout>(layout),
                     number % 4 != 0};
        Problem p(c, number);
        for (int backward = 0; backward < 2; ++backward) {
          StepArgs a{};
          a.T = c.T;
          a.B = c.B;
          a.H = H;
          a.dtype = c.dtype;
          a.activation = c.activation;
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

// Generation: the same draws as a float64 model, given weights that leave no draw near a boundary.
void generate_parity(bool quick) {
  std::mt19937 random(11);
  std::normal_distribution<double> normal;
  for (int64_t H : {5, 64, 150}) {
    for (int layers = 1; layers <= (quick ? 2 : 3); ++layers) {
      for (int d = 0; d < 3; ++d) {
        for (float temperature : {0.0f, 0.8f}) {
          const int64_t S = 3, n = 6, V = 29;
          const Dtype dtype = static_cast<Dtype>(d);
          const auto fill = [&](int64_t size, double scale) {
            Memory memory(size, dtype);
            for (int64_t i = 0; i < size; ++i) memory.set(i, scale * normal(random));
            return memory;
          };
          Memory table = fill(V * H, 1), W_out = fill(V * H, 2), b_out = fill(V, 1);
          std::array<Memory, 3> W_ih, W_hh, bias;
          cuda::GenerateArgs a{};
          for (int l = 0; l < layers; ++l) {
            W_ih[l] = fill(H * H, 1 / std::sqrt(H));
            W_hh[l] = fill(H * H, 1 / std::sqrt(H));
            bias[l] = fill(H, 1);
            a.W_ih[l] = W_ih[l].data();
            a.W_hh[l] = W_hh[l].data();
            a.bias[l] = bias[l].data();
          }
          Memory uniforms(n * S, Dtype::kFloat32), state(layers * S * H, Dtype::kFloat32);
          for (int64_t i = 0; i < n * S; ++i) {
            uniforms.set(i, static_cast<double>(random() % 1000003) / 1000003);
          }
          for (int64_t i = 0; i < layers * S * H; ++i) state.set(i, normal(random) / 2);
          const Memory state_before = state;
          std::vector<int64_t> first(S), out(n * S, -1);
          for (auto& id : first) id = static_cast<int64_t>(random() % V);
          a.S = S;
          a.n = n;
          a.H = H;
          a.V = V;
          a.layers = layers;
          a.dtype = dtype;
          a.activation = Activation::kTanh;
          a.table = table.data();
          a.W_out = W_out.data();
          a.b_out = b_out.data();
          a.temperature = temperature;
          a.uniforms = static_cast<float*>(uniforms.data());
          a.first = first.data();
          a.state = static_cast<float*>(state.data());
          a.out = out.data();
          in_every_order(
              [&] {
                state = state_before;
                a.state = static_cast<float*>(state.data());
                const char* error = charrnn_fast_cuda_generate(&a, nullptr);
                if (error != nullptr) fail(std::string("generate: ") + error);
                if (!emulator::settings.fault.empty())
                  fail("generate: " + emulator::settings.fault);
                emulator::settings.fault.clear();
                for (int64_t s = 0; s < S; ++s) {
                  std::vector<std::vector<double>> h(layers, std::vector<double>(H));
                  for (int l = 0; l < layers; ++l) {
                    for (int64_t j = 0; j < H; ++j) h[l][j] = state_before.get((l * S + s) * H + j);
                  }
                  int64_t id = first[s];
                  for (int64_t i = 0; i < n; ++i) {
                    for (int l = 0; l < layers; ++l) {
                      std::vector<double> next(H);
                      for (int64_t j = 0; j < H; ++j) {
                        double sum = l == 0 ? table.get(id * H + j) : bias[l].get(j);
                        for (int64_t k = 0; k < H; ++k) {
                          sum += W_hh[l].get(j * H + k) * h[l][k];
                          if (l > 0) sum += W_ih[l].get(j * H + k) * h[l - 1][k];
                        }
                        next[j] = std::tanh(sum);
                      }
                      h[l] = next;
                    }
                    std::vector<double> logits(V);
                    for (int64_t v = 0; v < V; ++v) {
                      logits[v] = b_out.get(v);
                      for (int64_t k = 0; k < H; ++k) {
                        logits[v] += W_out.get(v * H + k) * h[layers - 1][k];
                      }
                    }
                    const double top = *std::max_element(logits.begin(), logits.end());
                    int64_t drawn = std::max_element(logits.begin(), logits.end()) - logits.begin();
                    bool close = false;
                    if (temperature > 0) {
                      double total = 0, running = 0;
                      for (double& l : logits) total += l = std::exp((l - top) / temperature);
                      drawn = -1;
                      for (int64_t v = 0; v < V; ++v) {
                        running += logits[v];
                        close |= std::abs(running / total - uniforms.get(i * S + s)) < 1e-4;
                        if (drawn < 0 && running > uniforms.get(i * S + s) * total) drawn = v;
                      }
                    }
                    ++checks;
                    const int64_t found = out[i * S + s];
                    if (found != drawn && !close) {
                      fail("generate: H=" + std::to_string(H) + " character " +
                           std::to_string(found) + ", not " + std::to_string(drawn));
                    }
                    id = found;
                    if (id < 0 || id >= V) return fail("generate: no character");
                  }
                  for (int l = 0; l < layers; ++l) {
                    for (int64_t j = 0; j < H; ++j) {
                      if (!(std::abs(state.get((l * S + s) * H + j) - h[l][j]) < 1e-4)) {
                        return fail("generate: the state left behind");
                      }
                    }
                  }
                }
              },
              quick);
        }
      }
    }
  }
}

void parity(bool quick) {
  int64_t before = checks;
  for (int tile = 0; tile < kBlockTileCount; ++tile) {
    const Tile& t = kBlockTiles[tile];
    // The widest H of a tile, and odd ones inside it.
    for (int64_t H : {t.width(), t.width() - 13, std::max(1, t.width() - 31)}) {
      if (quick && (H == t.width()) != (tile % 2 == 0)) continue;
      parity_of(Design::kBlock, tile, H, t.packed, quick);
    }
  }
  report_group("block", before);
  before = checks;
  for (int tile = 0; tile < kGridTileCount; ++tile) {
    const Tile& t = kGridTiles[tile];
    if (quick && tile > 2) continue;
    for (int64_t H : {t.width(), t.width() - 45, t.width() - 90}) {
      if ((quick || t.width() > 600) && H != t.width() - 45) continue;
      parity_of(Design::kGrid, tile, H, false, quick);
    }
  }
  report_group("grid", before);
  before = checks;
  step_parity();
  report_group("step", before);
  before = checks;
  token_parity();
  report_group("tokens", before);
  before = checks;
  generate_parity(quick);
  report_group("generate", before);
  std::printf("%lld launches (%lld cooperative), %lld turns of fibers\n",
              static_cast<long long>(emulator::settings.launches),
              static_cast<long long>(emulator::settings.cooperative_launches),
              static_cast<long long>(emulator::settings.turns));
}

// Runs a body that is to fail, and says whether it did.
bool caught(const std::function<void()>& body) {
  const int before = failures;
  failures = 1000;  // silent
  using emulator::Order;
  for (int i = 0; i < 16 && failures == 1000; ++i) {
    const Order order = i < 3 ? static_cast<Order>(i) : Order::kUneven;
    emulator::settings.order = order;
    ++emulator::settings.seed;
    body();
    emulator::settings.fault.clear();
  }
  emulator::settings.order = emulator::Order::kForward;
  const bool found = failures > 1000;
  failures = before;
  return found;
}

void every_site(const char* name, const std::function<void()>& body) {
  emulator::settings.sites.clear();
  body();
  const std::set<int> sites = emulator::settings.sites;
  for (int site : sites) {
    emulator::settings.skip_site = site;
    ++checks;
    const bool found = caught(body);
    emulator::settings.skip_site = 0;
    std::printf("  %s without the barrier or shuffle of line %d: %s\n", name, site,
                found ? "caught" : "NOT CAUGHT");
    if (!found)
      fail(std::string(name) + ": nothing noticed that line " + std::to_string(site) +
           " was left out");
  }
}

void faults() {
  const Case small{6, 5, 60, 2, Dtype::kFloat32, Activation::kTanh, Case::kRagged, true};
  const Case middle{5, 20, 260, 2, Dtype::kFloat32, Activation::kTanh, Case::kFull, true};
  const Problem block_problem(small, 5), grid_problem(middle, 6);
  const Plan block = plan_for(Design::kBlock, 1, small, 3);
  const Plan grid = plan_for(Design::kGrid, 0, middle, 20);
  for (bool backward : {false, true}) {
    every_site(backward ? "block backward" : "block forward",
               [&] { run(block_problem, block, backward, "fault"); });
    every_site(backward ? "grid backward" : "grid forward",
               [&] { run(grid_problem, grid, backward, "fault"); });
  }
  const auto expect = [](const char* name, bool found) {
    ++checks;
    std::printf("  %s: %s\n", name, found ? "caught" : "NOT CAUGHT");
    if (!found) fail(std::string(name) + " was not noticed");
  };
  emulator::settings.skip_grid_barrier = true;
  expect("no grid barrier", caught([&] { run(grid_problem, grid, false, "fault"); }));
  emulator::settings.skip_grid_barrier = false;
#if !defined(__SANITIZE_ADDRESS__)
  // Shared memory four bytes short: the last thread's weights are stored beyond its end.
  const Case spilling{2, 1, 256, 1, Dtype::kFloat32, Activation::kTanh, Case::kFull, true};
  const Problem spilling_problem(spilling, 7);
  emulator::settings.shared_missing = 4;
  expect("a store past shared memory", caught([&] {
           run(spilling_problem, plan_for(Design::kBlock, 7, spilling, 1), false, "fault");
         }));
  emulator::settings.shared_missing = 0;
  // One sequence too many: rows beyond the end of y and h_n, inside the guards.
  expect("a store past the end of y", caught([&] {
           Case more{1, 2, 8, 1, Dtype::kFloat32, Activation::kTanh, Case::kFull, false};
           Problem problem(more, 8);
           problem.c.H = 8;
           Memory out(1 * 1 * 8, Dtype::kFloat32), final(8, Dtype::kFloat32);
           RecurrenceArgs args{};
           args.T = 1;
           args.B = 2;
           args.H = 8;
           args.D = 1;
           args.W_hh[0] = problem.W[0].data();
           args.in = problem.z.data();
           args.out = out.data();
           args.final = final.data();
           const Plan plan = plan_for(Design::kBlock, 0, more, 2);
           (void)charrnn_fast_cuda_forward(&plan, &args, nullptr);
           if (!out.intact() || !final.intact()) fail("caught");
         }));
#endif
  // More blocks than are resident would wait for ever; the launch itself refuses.
  emulator::settings.resident_blocks = 3;
  expect("a cooperative launch that does not fit",
         caught([&] { run(grid_problem, grid, false, "fault"); }));
  emulator::settings.resident_blocks = 1 << 30;
  emulator::settings.refuse_launch = true;
  expect("a launch that fails", caught([&] { run(block_problem, block, false, "fault"); }));
  emulator::settings.refuse_launch = false;
  // And without any fault nothing is caught.
  for (bool backward : {false, true}) {
    ++checks;
    if (caught([&] {
          run(block_problem, block, backward, "no fault");
          run(grid_problem, grid, backward, "no fault");
        })) {
      fail("a fault was reported where there is none");
    }
  }
}

// Limits from NVIDIA's programming guide, table of compute capabilities; multiprocessors from data
// sheets.
struct Device {
  const char* name;
  DeviceLimits limits;
};
const Device kDevices[] = {
    {"T4", {40, 75, 65536, 65536, true}},      {"A100", {108, 80, 166912, 65536, true}},
    {"L4", {58, 89, 101376, 65536, true}},     {"H100", {132, 90, 232448, 65536, true}},
    {"B200", {148, 100, 232448, 65536, true}},
};

void plans(bool print) {
  for (const Device& device : kDevices) {
    for (int dtype = 0; dtype < 3; ++dtype) {
      for (int64_t H :
           {1,   2,   31,  32,  33,  100, 128,  150,  192,  200,  224,  225,  240,  256,
            300, 384, 448, 512, 640, 768, 1000, 1024, 1280, 1536, 2000, 2048, 2049, 4096}) {
        for (int64_t B : {1, 2, 8, 32, 64, 100, 256, 5000}) {
          for (int64_t D : {1, 2}) {
            ++checks;
            const Dtype type = static_cast<Dtype>(dtype);
            const Plan plan = plan_recurrence(H, B, D, type, device.limits);
            const std::string where = std::string("plan ") + device.name + " " + kDtypes[dtype] +
                                      " H=" + std::to_string(H) + " B=" + std::to_string(B) +
                                      " D=" + std::to_string(D);
            const auto require = [&](bool holds, const char* what) {
              if (!holds) fail(where + ": " + what);
            };
            require(plan.reason != nullptr, "no reason");
            require(plan.shared_bytes <= device.limits.shared_per_block, "too much shared memory");
            if (plan.design == Design::kStep) continue;
            require(H <= kMaxHidden, "H is too large");
            const Tile& tile =
                plan.design == Design::kBlock ? kBlockTiles[plan.tile] : kGridTiles[plan.tile];
            require(tile.width() >= H, "the tile is too narrow");
            require(!tile.packed || type != Dtype::kFloat32, "float32 in 16 bits");
            require(plan.rows >= 1, "no rows");
            if (plan.design == Design::kBlock) {
              require(plan.rows <= kMaxRows, "too many rows");
              require(static_cast<int64_t>(plan.blocks) * plan.rows >= B, "sequences are left out");
              require(static_cast<int64_t>(plan.blocks - 1) * plan.rows < B,
                      "a block without sequences");
            } else {
              const int groups = plan.blocks / plan.blocks_in_group;
              require(plan.blocks % plan.blocks_in_group == 0, "a broken group");
              require(plan.blocks_in_group * tile.block_outputs() >= H, "outputs are left out");
              require(static_cast<int64_t>(groups) * plan.rows >= B, "sequences are left out");
              require(static_cast<int64_t>(groups - 1) * plan.rows < B,
                      "a group without sequences");
              require(plan.blocks * (plan.together ? D : 1) <= device.limits.multiprocessors,
                      "blocks that are not resident");
            }
            DeviceLimits alone = device.limits;
            alone.cooperative = false;
            require(plan_recurrence(H, B, D, type, alone).design != Design::kGrid,
                    "a cooperative launch that the device does not have");
          }
        }
      }
    }
  }
  // What is wanted of the designs, device by device.
  const auto design = [](const char* name, int64_t H, int64_t B, Dtype dtype) {
    for (const Device& device : kDevices) {
      if (std::strcmp(device.name, name) == 0) {
        return plan_recurrence(H, B, 1, dtype, device.limits).design;
      }
    }
    return Design::kStep;
  };
  const struct {
    const char* device;
    int64_t H, B;
    Dtype dtype;
    Design expected;
  } table[] = {
      {"T4", 128, 32, Dtype::kFloat32, Design::kBlock},
      {"T4", 224, 32, Dtype::kFloat32, Design::kBlock},
      {"T4", 512, 8, Dtype::kFloat32, Design::kGrid},
      {"T4", 2048, 8, Dtype::kFloat32, Design::kStep},
      {"A100", 64, 256, Dtype::kFloat32, Design::kBlock},
      {"A100", 256, 32, Dtype::kFloat32, Design::kBlock},
      {"A100", 300, 8, Dtype::kFloat32, Design::kGrid},
      {"A100", 300, 8, Dtype::kBFloat16, Design::kBlock},
      {"A100", 512, 16, Dtype::kFloat32, Design::kGrid},
      {"A100", 2048, 256, Dtype::kBFloat16, Design::kStep},
      {"L4", 224, 8, Dtype::kFloat32, Design::kBlock},
      {"H100", 288, 8, Dtype::kFloat32, Design::kBlock},
      {"H100", 416, 8, Dtype::kBFloat16, Design::kBlock},
      {"H100", 1024, 8, Dtype::kFloat32, Design::kGrid},
      {"H100", 1024, 256, Dtype::kBFloat16, Design::kStep},
      {"B200", 1024, 8, Dtype::kFloat32, Design::kGrid},
  };
  for (const auto& row : table) {
    ++checks;
    const Design found = design(row.device, row.H, row.B, row.dtype);
    if (found != row.expected) {
      fail(std::string("plan ") + row.device + " H=" + std::to_string(row.H) +
           " B=" + std::to_string(row.B) + " is " + kDesigns[static_cast<int>(found)]);
    }
  }
  if (!print) return;
  for (int dtype : {0, 2}) {
    for (const Device& device : kDevices) {
      std::printf("%s %s\n", device.name, kDtypes[dtype]);
      for (int64_t H : {64, 128, 200, 224, 256, 320, 384, 448, 512, 768, 1024, 1536, 2048}) {
        std::printf("  H=%-5lld", static_cast<long long>(H));
        for (int64_t B : {1, 8, 32, 64, 128, 256}) {
          const Plan plan = plan_recurrence(H, B, 1, static_cast<Dtype>(dtype), device.limits);
          std::printf(" %s", kDesigns[static_cast<int>(plan.design)]);
          if (plan.design != Design::kStep) std::printf("(%dx%d)", plan.blocks, plan.rows);
        }
        std::printf("\n");
      }
    }
  }
}

void races() {
  for (int layout = 0; layout < 3; ++layout) {
    const Case small{
        4, 3, 60, 2, Dtype::kFloat32, Activation::kTanh, static_cast<Case::Layout>(layout), true};
    const Case spilling{
        2, 2, 250, 1, Dtype::kBFloat16, Activation::kRelu, static_cast<Case::Layout>(layout), true};
    const Case middle{
        3, 9, 200, 2, Dtype::kFloat32, Activation::kTanh, static_cast<Case::Layout>(layout), true};
    const Problem a(small, 5), b(spilling, 6), c(middle, 7);
    for (bool backward : {false, true}) {
      in_every_order(
          [&] {
            run(a, plan_for(Design::kBlock, 1, small, 2), backward, "races");
            run(b, plan_for(Design::kBlock, 7, spilling, 2), backward, "races");
            run(c, plan_for(Design::kGrid, 0, middle, 5), backward, "races");
          },
          layout > 0);
    }
  }
  step_parity();
  token_parity();
  generate_parity(true);
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "parity";
  const bool quick = argc > 2 && std::strcmp(argv[2], "quick") == 0;
  if (what == "parity") parity(quick);
  if (what == "faults") faults();
  if (what == "plan") plans(argc > 2 && std::strcmp(argv[2], "print") == 0);
  if (what == "races") races();
  if (what == "race") {
    const Case small{3, 2, 60, 1, Dtype::kFloat32, Activation::kTanh, Case::kFull, true};
    const Problem problem(small, 5);
    emulator::settings.sites.clear();
    run(problem, plan_for(Design::kBlock, 1, small, 2), false, "race");
    emulator::settings.skip_site = *emulator::settings.sites.rbegin();  // the barrier of each step
    run(problem, plan_for(Design::kBlock, 1, small, 2), false, "race");
  }
  std::printf("%s: %lld checks, %d failures\n", what.c_str(), static_cast<long long>(checks),
              failures);
  return std::min(failures, 100);
}
