// Cases of generate: the characters that streams draw from random models.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "buffers.h"
#include "case.h"
#include "comparison.h"
#include "formula.h"
#include "kernels/rnn.h"

namespace charrnn_fast::native {

// The draw of the kernels by the plainest means: the first character whose share, with those of all
// before it, exceeds u.
template <typename scalar>
int64_t naive_draw(std::vector<double> scores, const GenerateArgs<scalar>& args, double u) {
  const auto best = std::max_element(scores.begin(), scores.end());
  if (args.temperature == 0) return best - scores.begin();
  std::vector<double> falling = scores;
  std::sort(falling.rbegin(), falling.rend());
  const double least = args.top_k > 0 && args.top_k < args.V ? falling[args.top_k - 1] : -INFINITY;
  const double most = *best;
  for (double& x : scores) x = x < least ? 0 : std::exp((x - most) / args.temperature);
  double sum = std::accumulate(scores.begin(), scores.end(), 0.0), reached = 0;
  // Of equals the first ones stay: where all units of relu are at zero, all scores may be equal.
  std::vector<size_t> order(scores.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return scores[a] > scores[b]; });
  for (size_t i = 0; args.top_p < 1 && i < order.size(); ++i) {
    const double weight = scores[order[i]];
    if (reached >= args.top_p * sum) scores[order[i]] = 0;
    reached += weight;
  }
  sum = std::accumulate(scores.begin(), scores.end(), 0.0);
  reached = 0;
  for (int64_t v = 0; v < args.V; ++v) {
    reached += scores[v];
    if (reached > u * sum) return v;
  }
  return args.V - 1;
}

inline bool never_stop(void*) { return false; }

// Characters of random streams against the formula, and of some of the streams alone.
template <typename scalar>
void run_generate_case(const Kernels<scalar>& kernels) {
  const int64_t N = 1 + below(12), S = random_size(9, 120), V = random_size(40, 300);
  const int64_t H = random_size(40, 150), layers = 1 + below(3);
  std::vector<std::unique_ptr<Array<scalar>>> own;
  std::array<std::vector<const scalar*>, 4> weights;
  const bool biases = coin();
  const auto cell = static_cast<Cell>(below(5));
  const int64_t G = sizes_of(cell).gates;
  for (int64_t i = 0; i < layers; ++i) {
    const auto add = [&](int kind, int64_t rows, int64_t columns, double scale) {
      own.push_back(randoms<scalar>(rows, columns, scale));
      weights[kind].push_back(own.back()->data);
    };
    const double scale = 0.7 / std::sqrt(static_cast<double>(H));
    add(0, G * H, i == 0 ? V : H, i == 0 ? 1.0 : scale);
    add(1, G * H, H, scale);
    if (biases) add(2, 1, G * H, 0.3);
    if (biases) add(3, 1, G * H, 0.3);
  }
  auto W_out = randoms<scalar>(V, H, 3 / std::sqrt(static_cast<double>(H)));
  auto b_out = coin() ? randoms<scalar>(1, V, 0.3) : nullptr;
  auto state = randoms<scalar>(layers * S, H, 0.5);
  auto cells = randoms<scalar>(layers * S, H, 0.5);
  auto uniforms = array<scalar>(N, S);
  std::uniform_real_distribution<double> uniform(0.0, 0.999);
  for (int64_t i = 0; i < N * S; ++i) uniforms->data[i] = static_cast<scalar>(uniform(generator));
  auto tokens = array<int64_t>(1, S);
  for (int64_t s = 0; s < S; ++s) tokens->data[s] = below(V);
  GenerateArgs<scalar> args{};
  args.N = N;
  args.V = V;
  args.H = H;
  args.layers = layers;
  args.ld = S;
  args.cell = cell;
  args.W_ih = weights[0].data();
  args.W_hh = weights[1].data();
  args.b_ih = biases ? weights[2].data() : nullptr;
  args.b_hh = biases ? weights[3].data() : nullptr;
  args.W_out = W_out->data;
  args.b_out = pointer(b_out);
  args.temperature = below(4) ? 0.3 + static_cast<double>(below(10)) / 7 : 0;
  args.top_k = coin() ? below(V + 3) : 0;
  args.top_p = coin() ? 1 : 0.1 + static_cast<double>(below(90)) / 101;
  args.stop = coin() ? never_stop : nullptr;
  char text[200];
  std::snprintf(text, sizeof text, "%s, generate: N=%ld S=%ld V=%ld H=%ld layers=%ld k=%ld p=%g",
                current.c_str(), static_cast<long>(N), static_cast<long>(S), static_cast<long>(V),
                static_cast<long>(H), static_cast<long>(layers), static_cast<long>(args.top_k),
                args.top_p);
  current = text;

  // Streams [first, last) of all of them.
  const auto run = [&](int64_t first, int64_t last, Array<int64_t>& drawn, Array<scalar>& after,
                       Array<scalar>& cells_after) {
    GenerateArgs<scalar> part = args;
    part.S = last - first;
    part.uniforms = uniforms->data + first;
    part.tokens = tokens->data + first;
    part.state = after.data + first * H;
    part.cell_state = sizes_of(cell).has_state ? cells_after.data + first * H : nullptr;
    part.drawn = drawn.data + first;
    Guarded workspace(kernels.generate_workspace(part), coin(), 64);
    part.workspace = workspace.data;
    kernels.generate(part);
  };
  auto drawn = array<int64_t>(N, S), again = array<int64_t>(N, S);
  auto after = array<scalar>(layers * S, H), after_again = array<scalar>(layers * S, H);
  auto cells_after = array<scalar>(layers * S, H), cells_again = array<scalar>(layers * S, H);
  std::copy_n(state->data, state->size, after->data);
  std::copy_n(state->data, state->size, after_again->data);
  std::copy_n(cells->data, cells->size, cells_after->data);
  std::copy_n(cells->data, cells->size, cells_again->data);
  run(0, S, *drawn, *after, *cells_after);
  const int64_t cut = below(S);
  if (cut > 0) run(0, cut, *again, *after_again, *cells_again);
  run(cut, S, *again, *after_again, *cells_again);
  if (std::memcmp(drawn->data, again->data, static_cast<size_t>(N * S) * sizeof(int64_t)) != 0)
    fail("the characters of a stream depend on the others");
  expect_same_bits("state", after, after_again);
  expect_same_bits("cell_state", cells_after, cells_again);

  int64_t other = 0;
  std::vector<double> x(H), scores(V);
  std::vector<Unit> units(H);
  for (int64_t s = 0; s < S; ++s) {
    int64_t id = tokens->data[s];
    for (int64_t i = 0; i < N; ++i) {
      for (int64_t l = 0; l < layers; ++l) {
        scalar* h = &state->at(l * S + s, 0);
        scalar* c = &cells->at(l * S + s, 0);
        for (int64_t r = 0; r < G * H; ++r) {
          double of_x = biases ? args.b_ih[l][r] : 0, of_h = biases ? args.b_hh[l][r] : 0;
          if (l == 0) of_x += args.W_ih[0][r * V + id];
          for (int64_t k = 0; l > 0 && k < H; ++k) of_x += x[k] * args.W_ih[l][r * H + k];
          for (int64_t k = 0; k < H; ++k)
            of_h += static_cast<double>(h[k]) * args.W_hh[l][r * H + k];
          units[r % H].x[r / H] = of_x;
          units[r % H].h[r / H] = of_h;
        }
        for (int64_t j = 0; j < H; ++j) {
          double new_h = h[j], new_c = c[j];
          step_forward(cell, units[j], &new_h, &new_c);
          x[j] = new_h;
          h[j] = static_cast<scalar>(new_h);
          c[j] = static_cast<scalar>(new_c);
        }
      }
      for (int64_t v = 0; v < V; ++v) {
        scores[v] = b_out ? b_out->data[v] : 0;
        for (int64_t k = 0; k < H; ++k) scores[v] += x[k] * args.W_out[v * H + k];
      }
      id = drawn->at(i, s);  // goes on from what was drawn, so that a difference stays one
      if (id < 0 || id >= V) fail("a character is outside the vocabulary");
      other += naive_draw(scores, args, uniforms->at(i, s)) != id;
    }
  }
  if (other > (sizeof(scalar) == 4 ? 1 + N * S / 500 : 0))
    fail(std::to_string(other) + " characters are not those of the formula");
}

}  // namespace charrnn_fast::native
