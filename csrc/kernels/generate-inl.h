// Generation: characters drawn one after the other, each from the scores that the one before gave.
#pragma once

#include "cells-inl.h"
#include "one-step-inl.h"
#include "pack-inl.h"
#include "sequences-inl.h"
#include "tile-inl.h"

namespace charrnn_fast {
namespace {

// Streams that draw together: a running sum waits for each addition, so several go side by side.
constexpr int kDrawTogether = 4;

template <typename CellType, typename scalar>
struct GenerateSpace {
  Panels<scalar> hidden;
  Panels<scalar> scores;
  int64_t layers;
  int64_t block;      // streams that run together
  int64_t width;      // of a row of all sums of every unit
  scalar* table;      // [V][width]: W_ih' of the first layer + biases
  scalar* input;      // [layers - 1] of W_ih' in panels
  scalar* recurrent;  // [layers] of W_hh' in panels
  scalar* bias;       // [layers][width]
  scalar* head;       // W_out' in panels
  scalar* head_bias;  // [padded V]
  scalar* states;     // [2][layers][block][padded H]: before a step and after it, in turns
  scalar* c;          // [layers][block][padded H]
  scalar* sums;       // [layers - 1][block][width]: of a layer's input
  scalar* logits;     // [block][padded V], -infinity beyond V
  double* weights;    // [kDrawTogether][padded V]: of some streams' characters, zero beyond V
  scalar* totals;     // [kDrawTogether][padded V]: their running sums
  size_t bytes;

  GenerateSpace(const GenerateArgs<scalar>& args, void* base)
      : hidden(args.H, kGates<CellType>),
        scores(args.V),
        layers(args.layers),
        block(args.S < kBlockSlots ? args.S : kBlockSlots),
        width(hidden.padded_columns() * kSums<CellType>) {
    const int64_t H = hidden.padded_columns(), V = scores.padded_columns();
    Arena arena(base);
    table = arena.take<scalar>(args.V * width);
    input = arena.take<scalar>((layers - 1) * packed_size<scalar>(hidden, args.H));
    recurrent = arena.take<scalar>(layers * packed_size<scalar>(hidden, args.H));
    bias = arena.take<scalar>(layers * width);
    head = arena.take<scalar>(args.H * V);
    head_bias = arena.take<scalar>(V);
    states = arena.take<scalar>(2 * layers * block * H);
    c = arena.take<scalar>(kHasState<CellType> ? layers * block * H : 0);
    sums = arena.take<scalar>((layers - 1) * block * width);
    logits = arena.take<scalar>(block * V);
    weights = arena.take<double>(kDrawTogether * V);
    totals = arena.take<scalar>(kDrawTogether * V);
    bytes = arena.used();
  }

  scalar* state(int64_t step, int64_t layer, int64_t stream) const {
    return states + ((step % 2 * layers + layer) * block + stream) * hidden.padded_columns();
  }
  scalar* c_of(int64_t layer, int64_t stream) const {
    return c + (layer * block + stream) * hidden.padded_columns();
  }
};

template <typename scalar>
size_t generate_workspace(const GenerateArgs<scalar>& args) {
  return with_cell(args.cell, [&](auto cell) {
    return GenerateSpace<decltype(cell), scalar>(args, nullptr).bytes;
  });
}

template <typename CellType, typename scalar>
void pack_generate(const GenerateArgs<scalar>& args, const GenerateSpace<CellType, scalar>& space) {
  constexpr int64_t L = kLanes<scalar>;
  const Panels<scalar>& hidden = space.hidden;
  const int64_t weights = packed_size<scalar>(hidden, args.H);
  const auto block = [](int g) { return input_block<CellType>(g); };
  for (int64_t layer = 0; layer < args.layers; ++layer) {
    ForwardArgs<scalar> of_layer{};
    of_layer.H = args.H;
    of_layer.b_ih = args.b_ih != nullptr ? args.b_ih[layer] : nullptr;
    of_layer.b_hh = args.b_hh != nullptr ? args.b_hh[layer] : nullptr;
    for (int64_t j = 0; j < hidden.padded_columns(); j += L) {
      for (int s = 0; s < kSums<CellType>; ++s) {
        add_biases<CellType>(of_layer, s, j, j + L,
                             space.bias + layer * space.width + j * kSums<CellType> + s * L);
      }
    }
    pack_transposed(args.W_hh[layer], args.H, hidden, 0, hidden.count,
                    space.recurrent + layer * weights);
    if (layer > 0) {
      pack_transposed(args.W_ih[layer], args.H, hidden, 0, hidden.count,
                      space.input + (layer - 1) * weights, block);
      for (int64_t s = 0; s < space.block; ++s) {
        std::memcpy(space.sums + ((layer - 1) * space.block + s) * space.width,
                    space.bias + layer * space.width, space.width * sizeof(scalar));
      }
    }
  }
  for (int64_t i = 0; i < space.width; ++i) {
    const int64_t j = i / (kSums<CellType> * L) * L + i % L;
    const int sum = static_cast<int>(i / L % kSums<CellType>);
    const int64_t row = block(sum) * args.H + j;
    const bool of_input = sum < kGates<CellType> && j < args.H;
    for (int64_t v = 0; v < args.V; ++v) {
      space.table[v * space.width + i] =
          of_input ? args.W_ih[0][row * args.V + v] + space.bias[i] : space.bias[i];
    }
  }
  pack_transposed(args.W_out, args.H, space.scores, 0, space.scores.count, space.head);
  const int64_t width = space.scores.padded_columns();
  for (int64_t v = 0; v < width; ++v) {
    space.head_bias[v] = v < args.V && args.b_out != nullptr ? args.b_out[v] : 0;
  }
  for (int64_t i = 0; i < space.block * width; ++i) {
    space.logits[i] = -std::numeric_limits<scalar>::infinity();
  }
  for (int64_t i = 0; i < kDrawTogether * width; ++i) space.weights[i] = 0;
}

// The first of the greatest; a NaN is greater than everything.
template <typename scalar>
int64_t greatest(const scalar* x, int64_t n) {
  int64_t best = 0;
  for (int64_t i = 1; i < n && x[best] == x[best]; ++i) {
    if (x[i] > x[best] || x[i] != x[i]) best = i;
  }
  return best;
}

// One value from the lanes of a vector.
template <typename scalar, typename Join>
ALWAYS_INLINE scalar across(Vec<scalar> v, const Join& join) {
  scalar lanes[kLanes<scalar>];
  store(lanes, v);
#pragma GCC unroll 8
  for (int half = kLanes<scalar> / 2; half > 0; half /= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < half; ++i) lanes[i] = join(lanes[i], lanes[i + half]);
  }
  return lanes[0];
}

// Of n numbers (in whole vectors, padded by what is not above `low`), the greatest whose followers,
// itself among them, are enough: `enough` is asked with their count, or their sum. Followers of a
// number are all that reach it. The answer is known to be above `low`. Bisects values, and moves
// both ends to numbers that exist: a dozen passes, whatever the order and the ties.
template <bool kCount, typename scalar, typename Enough>
scalar cut(const scalar* x, int64_t n, scalar low, const Enough& enough) {
  constexpr int L = kLanes<scalar>;
  const auto less = [](scalar a, scalar b) { return a < b ? a : b; };
  const auto more = [](scalar a, scalar b) { return a > b ? a : b; };
  const auto plus = [](scalar a, scalar b) { return a + b; };
  const Vec<scalar> infinity = broadcast(std::numeric_limits<scalar>::infinity());
  Vec<scalar> least = infinity, most = -infinity;
  for (int64_t i = 0; i < n; i += L) {
    const Vec<scalar> v = load(x + i);
    most = select<scalar>(v > most, v, most);
    least = select<scalar>((v < least) & (v > low), v, least);
  }
  // The answer is not below `from`, and not above `to`.
  scalar from = across<scalar>(least, less), to = across<scalar>(most, more);
  while (from < to) {
    scalar middle = from + (to - from) / 2;
    if (!(middle > from)) middle = to;  // neighbours, or infinities
    Vec<scalar> measure = {}, above = infinity, below = -infinity;
    for (int64_t i = 0; i < n; i += L) {
      const Vec<scalar> v = load(x + i);
      const Vec<Bits<scalar>> reaches = v >= middle;
      measure += select<scalar>(reaches, kCount ? broadcast(scalar{1}) : v, Vec<scalar>{});
      above = select<scalar>(reaches & (v < above), v, above);
      below = select<scalar>((v < middle) & (v > below), v, below);
    }
    if (enough(across<scalar>(measure, plus))) {
      from = across<scalar>(above, less);
    } else {
      to = across<scalar>(below, more);
    }
  }
  return to;
}

// weights = exp((logits - the greatest) / temperature), in whole vectors.
template <typename scalar>
void weigh(const scalar* logits, int64_t n, scalar temperature, scalar* weights) {
  constexpr int L = kLanes<scalar>;
  Vec<scalar> most = load(logits);
  for (int64_t i = L; i < n; i += L) {
    const Vec<scalar> x = load(logits + i);
    most = select<scalar>(x > most, x, most);
  }
  const scalar best = across<scalar>(most, [](scalar a, scalar b) { return a > b ? a : b; });
  for (int64_t i = 0; i < n; i += L) {
    const Vec<scalar> x = (load(logits + i) - best) / temperature;
    store(weights + i, exp_of_nonpositive<scalar>(x));
  }
}

// Sets to zero the weights that are not among the fewest, heaviest first, whose sum reaches a
// threshold; of equal ones the first are kept.
template <typename scalar>
void keep_heaviest(double* weights, int64_t n, double sum, scalar threshold) {
  constexpr int L = kLanes<double>;
  // Whatever is lighter than `low` can go all at once.
  const double low = (sum - threshold) / (2 * n);
  const double lightest = cut<false>(
      weights, n, low, [=](double reached) { return static_cast<scalar>(reached) >= threshold; });
  Vec<double> heavier = {};
  for (int64_t i = 0; i < n; i += L) {
    const Vec<double> w = load(weights + i);
    heavier += select<double>(w > broadcast(lightest), w, Vec<double>{});
    store(weights + i, select<double>(w < broadcast(lightest), Vec<double>{}, w));
  }
  double reached = across<double>(heavier, [](double a, double b) { return a + b; });
  for (int64_t v = 0; v < n; ++v) {
    if (weights[v] != lightest) continue;
    if (static_cast<scalar>(reached) >= threshold && reached > 0) weights[v] = 0;
    reached += weights[v];
  }
}

// A draw follows `draw` in charrnn_fast/charlm/sample.py: the same rules, in the same order and
// with sums in double as torch.cumsum has them.

// The weights of one stream's characters from its logits, which may be overwritten; `scratch` is
// for as many.
template <typename scalar>
void weigh_characters(const GenerateArgs<scalar>& args, scalar* logits, scalar* scratch,
                      double* weights) {
  constexpr int L = kLanes<scalar>;
  const int64_t V = args.V;
  if (0 < args.top_k && args.top_k < V) {
    const scalar never = -std::numeric_limits<scalar>::infinity();
    const scalar enough = args.top_k;
    const scalar least = cut<true>(logits, V, never, [=](scalar count) { return count >= enough; });
    for (int64_t i = 0; i < V; i += L) {
      const Vec<scalar> x = load(logits + i);
      store(logits + i, select<scalar>(x < broadcast(least), broadcast(never), x));
    }
  }
  weigh(logits, V, static_cast<scalar>(args.temperature), scratch);
  for (int64_t v = 0; v < V; ++v) weights[v] = scratch[v];
  if (args.top_p < 1) {
    double sum = 0;
    for (int64_t v = 0; v < V; ++v) sum += weights[v];
    const scalar threshold = static_cast<scalar>(args.top_p) * static_cast<scalar>(sum);
    if (threshold == threshold) keep_heaviest(weights, V, sum, threshold);
  }
}

// The running sums of the weights of `n` streams, whose rows are `ld` apart.
template <int n, typename scalar>
void add_up(const double* weights, int64_t V, int64_t ld, scalar* totals) {
  double sums[n] = {};
  for (int64_t v = 0; v < V; ++v) {
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) {
      sums[i] += weights[i * ld + v];
      totals[i * ld + v] = static_cast<scalar>(sums[i]);
    }
  }
}

template <typename scalar>
int64_t choose(const double* weights, const scalar* totals, int64_t V, scalar uniform) {
  const scalar wanted = uniform * totals[V - 1];
  int64_t chosen = 0;
  for (int64_t v = 0; v < V; ++v) chosen += totals[v] <= wanted;
  // Rounding may put `wanted` at the total itself: the last character that has any weight is meant.
  if (chosen == V) {
    do --chosen;
    while (chosen > 0 && !(weights[chosen] > 0));
  }
  return chosen;
}

// Draws one character for each of n streams.
template <typename CellType, typename scalar>
void draw(const GenerateArgs<scalar>& args, const GenerateSpace<CellType, scalar>& space,
          scalar* const* logits, const scalar* uniforms, int64_t n, int64_t* drawn) {
  const int64_t V = args.V, ld = space.scores.padded_columns();
  if (args.temperature < std::numeric_limits<scalar>::min()) {
    for (int64_t s = 0; s < n; ++s) drawn[s] = greatest(logits[s], V);
    return;
  }
  for (int64_t first = 0; first < n; first += kDrawTogether) {
    const int64_t count = n - first < kDrawTogether ? n - first : kDrawTogether;
    for (int64_t i = 0; i < count; ++i) {
      weigh_characters(args, logits[first + i], space.totals + i * ld, space.weights + i * ld);
    }
    if (count == 1) {
      add_up<1>(space.weights, V, ld, space.totals);
    } else {  // of streams that are not there it adds up what was before
      add_up<kDrawTogether>(space.weights, V, ld, space.totals);
    }
    for (int64_t i = 0; i < count; ++i) {
      drawn[first + i] =
          choose(space.weights + i * ld, space.totals + i * ld, V, uniforms[first + i]);
    }
  }
}

// Runs streams [streams.first, streams.last), at most kBlockSlots of them, through all steps. False
// when it was told to stop.
template <typename CellType, typename scalar>
bool generate_block(const GenerateArgs<scalar>& args, const GenerateSpace<CellType, scalar>& space,
                    Range streams) {
  const int64_t H = args.H;
  const int64_t width = space.scores.padded_columns();
  const int64_t n = streams.last - streams.first;
  const auto state_row = [&](scalar* state, int64_t layer, int64_t stream) {
    return state + (layer * args.ld + streams.first + stream) * H;
  };
  if constexpr (kHasState<CellType>) {  // whole vectors of it are computed
    std::memset(space.c, 0,
                space.layers * space.block * space.hidden.padded_columns() * sizeof(scalar));
  }
  for (int64_t layer = 0; layer < args.layers; ++layer) {
    for (int64_t s = 0; s < n; ++s) {
      std::memcpy(space.state(0, layer, s), state_row(args.state, layer, s), H * sizeof(scalar));
      if constexpr (kHasState<CellType>) {
        std::memcpy(space.c_of(layer, s), state_row(args.cell_state, layer, s), H * sizeof(scalar));
      }
    }
  }
  const int64_t weights = packed_size<scalar>(space.hidden, H);
  const int64_t products = n * H * (kGates<CellType> * (2 * args.layers - 1) * H + args.V);
  const int64_t patience = kStopProducts / products + 1;  // steps between questions

  const scalar* init[kBlockSlots];
  const scalar* previous[kBlockSlots];
  const scalar* below[kBlockSlots];
  scalar* current[kBlockSlots];
  scalar* sums[kBlockSlots];
  scalar* c[kBlockSlots];
  scalar* logits[kBlockSlots];
  for (int64_t s = 0; s < n; ++s) logits[s] = space.logits + s * width;

  const int64_t* tokens = args.tokens + streams.first;
  for (int64_t i = 0; i < args.N; ++i) {
    if ((i + 1) % patience == 0 && args.stop != nullptr && args.stop(args.stop_state)) return false;
    for (int64_t layer = 0; layer < args.layers; ++layer) {
      for (int64_t s = 0; s < n; ++s) {
        previous[s] = space.state(i, layer, s);
        current[s] = space.state(i + 1, layer, s);
        init[s] =
            layer == 0 ? space.table + tokens[s] * space.width : space.bias + layer * space.width;
        if constexpr (kHasState<CellType>) c[s] = space.c_of(layer, s);
      }
      if (layer > 0) {
        for (int64_t s = 0; s < n; ++s) {
          below[s] = space.state(i + 1, layer - 1, s);
          sums[s] = space.sums + ((layer - 1) * space.block + s) * space.width;
        }
        TileArgs<scalar> input = {.a = below, .K = H, .init = init, .out = sums};
        multiply<Store<kSums<CellType>>>(input, n, space.hidden, {0, space.hidden.count},
                                         space.input + (layer - 1) * weights);
        for (int64_t s = 0; s < n; ++s) init[s] = sums[s];
      }
      TileArgs<scalar> recurrence = {.a = previous, .K = H, .init = init, .out = current};
      recurrence.H = H;
      recurrence.projected = init;
      recurrence.carry = c;
      multiply<ForwardOf<CellType>>(recurrence, n, space.hidden, {0, space.hidden.count},
                                    space.recurrent + layer * weights);
    }
    for (int64_t s = 0; s < n; ++s) {
      previous[s] = current[s];
      init[s] = space.head_bias;
    }
    TileArgs<scalar> scores = {.a = previous, .K = H, .init = init, .out = logits};
    multiply<Store<>>(scores, n, space.scores, {0, space.scores.count}, space.head);
    int64_t* drawn = args.drawn + i * args.ld + streams.first;
    const scalar* uniforms = args.uniforms + i * args.ld + streams.first;
    draw(args, space, logits, uniforms, n, drawn);
    tokens = drawn;
  }
  for (int64_t layer = 0; layer < args.layers; ++layer) {
    for (int64_t s = 0; s < n; ++s) {
      std::memcpy(state_row(args.state, layer, s), space.state(args.N, layer, s),
                  H * sizeof(scalar));
      if constexpr (kHasState<CellType>) {
        std::memcpy(state_row(args.cell_state, layer, s), space.c_of(layer, s), H * sizeof(scalar));
      }
    }
  }
  return true;
}

template <typename scalar>
void generate(const GenerateArgs<scalar>& args) {
  with_cell(args.cell, [&](auto cell) {
    const GenerateSpace<decltype(cell), scalar> space(args, args.workspace);
    pack_generate(args, space);
    for (int64_t first = 0; first < args.S; first += space.block) {
      const int64_t last = first + space.block < args.S ? first + space.block : args.S;
      if (!generate_block(args, space, {first, last})) return;
    }
  });
}

}  // namespace
}  // namespace charrnn_fast
