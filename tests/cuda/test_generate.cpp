// Generation: every draw is the one that its definition in float64 makes, of the characters so far.
#include <numeric>
#include <random>

#include "check.h"

namespace charrnn_fast::cuda {
namespace {

struct How {
  float temperature;
  int64_t top_k;
  float top_p;
};

// Decisions that lie so near their threshold that float32 may take them otherwise.
constexpr double kClose = 1e-4;

// The rules of `draw` in charrnn_fast/charlm/sample.py; `close` where the outcome is not sure.
int64_t draw(const std::vector<double>& scores, const How& how, double u, bool* close) {
  const int64_t V = static_cast<int64_t>(scores.size());
  std::vector<int64_t> order(V);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return scores[a] > scores[b]; });
  if (how.temperature == 0) {
    *close = V > 1 && scores[order[0]] - scores[order[1]] < kClose;
    return order[0];
  }
  std::vector<double> weights(V, 0.0);
  const bool filtered = 0 < how.top_k && how.top_k < V;
  if (filtered) *close |= scores[order[how.top_k - 1]] - scores[order[how.top_k]] < kClose;
  for (int64_t i = 0; i < (filtered ? how.top_k : V); ++i) {
    weights[order[i]] = std::exp((scores[order[i]] - scores[order[0]]) / how.temperature);
  }
  if (how.top_p < 1) {
    const double total = std::accumulate(weights.begin(), weights.end(), 0.0);
    double ahead = 0;
    for (int64_t i = 0; i < V; ++i) {
      const double own = weights[order[i]];
      if (own > 0 && i > 0) *close |= std::abs(ahead / total - how.top_p) < kClose;
      if (i > 0 && ahead >= how.top_p * total) weights[order[i]] = 0;
      ahead += own;
    }
  }
  const double total = std::accumulate(weights.begin(), weights.end(), 0.0);
  double running = 0;
  int64_t drawn = -1;
  for (int64_t v = 0; v < V; ++v) {
    running += weights[v];
    *close |= weights[v] > 0 && std::abs(running / total - u) < kClose && running < total;
    if (drawn < 0 && running > u * total) drawn = v;
  }
  return drawn;
}

// A model, what is drawn from it, and a check of that.
class Model {
 public:
  Model(int64_t layers, int64_t H, int64_t V, Cell cell, bool biases, unsigned seed)
      : layers_(layers), H_(H), V_(V), random_(seed) {
    table_ = fill(V * H, 1);
    W_ih_ = fill((layers - 1) * H * H, 1 / std::sqrt(H));
    W_hh_ = fill(layers * H * H, 1 / std::sqrt(H));
    bias_ = fill((layers - 1) * H, 1);
    W_out_ = fill(V * H, 2 / std::sqrt(H));
    b_out_ = fill(V, 1);
    tokens_.resize(kStreams);
    for (auto& token : tokens_) token = static_cast<int64_t>(random_() % V);
    uniforms_ = Memory(kSteps * kStreams, Dtype::kFloat32);
    for (int64_t i = 0; i < kSteps * kStreams; ++i)
      uniforms_.set(i, random_() % 1000003 / 1000003.0);
    uniforms_.set(0, 1 - 0x1p-24);  // the greatest that is drawn
    state_ = fill(layers * kStreams * H, 0.5);
    args_.S = kStreams;
    args_.N = kSteps;
    args_.H = H;
    args_.V = V;
    args_.layers = static_cast<int32_t>(layers);
    args_.cell = cell;
    args_.table = floats(table_);
    args_.W_ih = layers > 1 ? floats(W_ih_) : nullptr;
    args_.bias = layers > 1 && biases ? floats(bias_) : nullptr;
    args_.W_hh = floats(W_hh_);
    args_.W_out = floats(W_out_);
    args_.b_out = biases ? floats(b_out_) : nullptr;
    args_.uniforms = floats(uniforms_);
    args_.tokens = tokens_.data();
  }

  void run(const How& how) {
    Memory state = state_;
    Memory workspace(kStreams * (2 * layers_ * H_ + 2 * V_), Dtype::kFloat32);
    std::vector<int64_t> drawn(kSteps * kStreams, -1);
    args_.temperature = how.temperature;
    args_.top_k = how.top_k;
    args_.top_p = how.top_p;
    args_.state = floats(state);
    args_.drawn = drawn.data();
    args_.workspace = floats(workspace);
    const char* error = charrnn_fast_cuda_generate(&args_, nullptr);
    if (error != nullptr) return fail(std::string("generate: ") + error);
    if (!emulator::settings.fault.empty()) fail("generate: " + emulator::settings.fault);
    emulator::settings.fault.clear();
    if (!workspace.intact() || !state.intact()) fail("generate: a store outside");
    for (int64_t s = 0; s < kStreams; ++s) follow(s, how, drawn, state);
  }

  static int64_t draws, unsure;

 private:
  static constexpr int64_t kStreams = 3, kSteps = 6;

  Memory fill(int64_t size, double scale) {
    std::normal_distribution<double> normal;
    Memory memory(size, Dtype::kFloat32);
    for (int64_t i = 0; i < size; ++i) memory.set(i, scale * normal(random_));
    return memory;
  }
  static float* floats(Memory& memory) { return static_cast<float*>(memory.data()); }

  double act(double x) const {
    if (args_.cell == Cell::kTanh) return std::tanh(x);
    if (args_.cell == Cell::kSigmoid) return 1 / (1 + std::exp(-x));
    return x < 0 ? 0 : x;
  }

  // Goes with the characters of stream s, each of which must be what the ones before it lead to.
  void follow(int64_t s, const How& how, const std::vector<int64_t>& drawn, const Memory& state) {
    std::vector<std::vector<double>> h(layers_, std::vector<double>(H_));
    for (int64_t l = 0; l < layers_; ++l) {
      for (int64_t j = 0; j < H_; ++j) h[l][j] = state_.get((l * kStreams + s) * H_ + j);
    }
    int64_t id = tokens_[s];
    for (int64_t i = 0; i < kSteps; ++i) {
      for (int64_t l = 0; l < layers_; ++l) {
        std::vector<double> next(H_);
        for (int64_t j = 0; j < H_; ++j) {
          double sum = l == 0                  ? table_.get(id * H_ + j)
                       : args_.bias != nullptr ? bias_.get((l - 1) * H_ + j)
                                               : 0;
          for (int64_t k = 0; k < H_; ++k) {
            sum += W_hh_.get((l * H_ + j) * H_ + k) * h[l][k];
            if (l > 0) sum += W_ih_.get(((l - 1) * H_ + j) * H_ + k) * h[l - 1][k];
          }
          next[j] = act(sum);
        }
        h[l] = next;
      }
      std::vector<double> scores(V_);
      for (int64_t v = 0; v < V_; ++v) {
        scores[v] = args_.b_out != nullptr ? b_out_.get(v) : 0;
        for (int64_t k = 0; k < H_; ++k) scores[v] += W_out_.get(v * H_ + k) * h[layers_ - 1][k];
      }
      bool close = false;
      const int64_t expected = draw(scores, how, uniforms_.get(i * kStreams + s), &close);
      ++checks;
      ++draws;
      unsure += close;
      id = drawn[i * kStreams + s];
      if (id < 0 || id >= V_) return fail("generate: no character");
      if (id != expected && !close) {
        fail("generate: layers=" + std::to_string(layers_) + " H=" + std::to_string(H_) +
             " V=" + std::to_string(V_) + " temperature=" + std::to_string(how.temperature) +
             " top_k=" + std::to_string(how.top_k) + " top_p=" + std::to_string(how.top_p) +
             ": character " + std::to_string(id) + ", not " + std::to_string(expected));
      }
    }
    for (int64_t l = 0; l < layers_; ++l) {
      for (int64_t j = 0; j < H_; ++j) {
        const double found = state.get((l * kStreams + s) * H_ + j);
        if (!(std::abs(found - h[l][j]) < 1e-4 * std::max(1.0, std::abs(h[l][j])))) {
          return fail("generate: the state left behind");
        }
      }
    }
  }

  int64_t layers_, H_, V_;
  std::mt19937 random_;
  Memory table_, W_ih_, W_hh_, bias_, W_out_, b_out_, uniforms_, state_;
  std::vector<int64_t> tokens_;
  DrawArgs args_{};
};
int64_t Model::draws = 0;
int64_t Model::unsure = 0;

// What float32 makes of numbers that are none, and of a token that is none.
void odd_generation() {
  const int64_t V = 300;
  std::vector<float> zeros(V, 0), table(V, 0), scores(V, 0), uniforms{0.999f};
  std::vector<float> state{0}, workspace(2 + 2 * V);
  std::vector<int64_t> tokens{0}, drawn{-1};
  DrawArgs args{};
  args.S = args.N = args.H = args.layers = 1;
  args.V = V;
  args.table = table.data();
  args.W_hh = zeros.data();
  args.W_out = zeros.data();
  args.b_out = scores.data();
  args.top_p = 1;
  args.uniforms = uniforms.data();
  args.tokens = tokens.data();
  args.state = state.data();
  args.drawn = drawn.data();
  args.workspace = workspace.data();
  const auto expect = [&](const char* what, float temperature, int64_t expected) {
    ++checks;
    args.temperature = temperature;
    if (charrnn_fast_cuda_generate(&args, nullptr) != nullptr) fail("generate does not run");
    if (drawn[0] != expected) {
      fail(std::string("generate: ") + what + " draws " + std::to_string(drawn[0]) + ", not " +
           std::to_string(expected));
    }
  };
  expect("the greedy one of equals", 0, 0);
  expect("the last of equals", 1, V - 1);
  args.top_k = 1;
  expect("ties with the best", 1, V - 1);
  args.top_p = 0.01f;  // three of 300
  expect("the first of equals that reach p", 1, 2);
  args.top_p = 1e-9f;
  expect("the best, however small p is", 1, 0);
  args.top_k = 0;
  args.top_p = 1;
  scores[7] = scores[200] = INFINITY;
  expect("the greedy one of infinities", 0, 7);
  expect("of infinities", 1, 0);
  scores[100] = NAN;
  expect("the greedy one with a NaN", 0, 100);
  expect("of NaN", 1, 0);
  scores.assign(V, -INFINITY);
  scores[5] = 0;
  uniforms[0] = 1 - 0x1p-24f;
  expect("the only one that can be", 1, 5);
  scores.assign(V, 0);
  tokens[0] = V;
  expect("greedily after a token that is none", 0, 0);
  expect("after a token that is none", 1, 0);
}

}  // namespace

void generate_parity(bool quick) {
  const How hows[] = {{0.0f, 0, 1.0f}, {0.8f, 0, 1.0f}, {1.0f, 4, 1.0f},
                      {1.0f, 0, 0.7f}, {1.5f, 9, 0.9f}, {0.5f, 400, 0.5f}};
  unsigned number = 0;
  for (int64_t V : {1, 29, 256, 300}) {
    for (int64_t H : {5, 64, 150}) {
      for (int64_t layers = 1; layers <= 3; ++layers) {
        ++number;
        if (quick && number % 5 != 0) continue;
        Model model(layers, H, V, static_cast<Cell>(number % 3), number % 4 != 0, number);
        for (const How& how : hows) {
          in_every_order([&] { model.run(how); }, true);
        }
      }
    }
  }
  if (Model::unsure * 50 > Model::draws) fail("generate: too many draws that are not sure");
  odd_generation();
}

void generate_once() {
  Model model(2, 40, 300, Cell::kTanh, true, 5);
  model.run({0.0f, 0, 1.0f});
  model.run({1.0f, 60, 0.9f});
}

}  // namespace charrnn_fast::cuda
