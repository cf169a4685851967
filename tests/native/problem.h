// One layer as a problem: random sizes, strides and orders, and the tensors that go with them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <numeric>
#include <vector>

#include "buffers.h"
#include "case.h"
#include "kernels/rnn.h"

namespace charrnn_fast::native {

template <typename scalar>
struct Problem {
  int64_t T, B, N, I, H;
  int64_t states;  // rows of h0 and h_n
  Cell cell;
  bool reverse, ragged;
  std::vector<int64_t> lengths, order;  // of each slot: steps, row within a step
  std::vector<int64_t> starts, ends;    // of each slot: rows of states; empty: as order
  std::vector<int64_t> step_row;
  int64_t step_rows;
  std::unique_ptr<Array<int64_t>> lengths_array, order_array, step_row_array, ids;
  std::unique_ptr<Array<int64_t>> starts_array, ends_array;
  std::unique_ptr<Array<scalar>> x, W_ih, W_hh, b_ih, b_hh, h0, c0, dy, dh_n, dc_n, dcells;
  int64_t y_gap;

  int64_t gates() const { return sizes_of(cell).gates; }
  int64_t start(int64_t slot) const { return starts.empty() ? order[slot] : starts[slot]; }
  int64_t end(int64_t slot) const { return ends.empty() ? order[slot] : ends[slot]; }

  int64_t row(int64_t t, int64_t slot) const {
    return (step_row.empty() ? t * step_rows : step_row[t]) + order[slot];
  }
  Sequences sequences() const {
    return {T,
            B,
            N,
            step_rows,
            pointer(step_row_array),
            pointer(lengths_array),
            pointer(order_array),
            pointer(starts_array),
            pointer(ends_array)};
  }
};

// Between rows: mostly none or few elements, sometimes so many that 32 bits do not count them; with
// -DDENSE never, as emulators and ThreadSanitizer keep notes of every page, used or not; nor
// between so many rows that addresses run out.
inline int64_t random_gap(int64_t width, int64_t rows) {
#ifdef DENSE
  const int64_t kind = 1 + below(39);
#else
  const int64_t kind = below(40);
#endif
  const bool huge = kind == 0 && rows <= 1000;
  return huge ? (int64_t{1} << 31) + below(9) : kind < 20 ? below(5) : kind < 25 ? width : 0;
}

struct Sizes {
  int64_t T, B, I, H;
};
inline Sizes random_sizes() {
  const int64_t T = random_size(9, 90), B = random_size(9, 70);
  const int64_t I = random_size(40, 150), H = random_size(40, 300);
  return {T, B, I, H};
}

// Cuts the sequences of a padded batch at random steps: each piece is a sequence of its own, and
// only those at the ends of what was cut have a state.
template <typename scalar>
void cut_in_pieces(Problem<scalar>& p) {
  struct Piece {
    int64_t row, length, start, end;
  };
  std::vector<Piece> pieces;
  const int64_t odds = 1 + below(6);
  for (int64_t b = 0; b < p.B; ++b) {
    const int64_t length = 1 + below(p.T);
    for (int64_t t = 0; t < length;) {
      int64_t end = t + 1;
      while (end < length && below(odds) > 0) ++end;
      const int64_t before = t == 0 && below(4) > 0 ? b : -1, after = end == length ? b : -1;
      pieces.push_back(
          {t * p.B + b, end - t, p.reverse ? after : before, p.reverse ? before : after});
      t = end;
    }
  }
  std::stable_sort(pieces.begin(), pieces.end(),
                   [](const Piece& a, const Piece& b) { return a.length > b.length; });
  p.B = static_cast<int64_t>(pieces.size());
  p.T = pieces[0].length;
  p.order.clear();
  p.lengths.clear();
  for (const Piece& piece : pieces) {
    p.order.push_back(piece.row);
    p.lengths.push_back(piece.length);
    p.starts.push_back(piece.start);
    p.ends.push_back(piece.end);
  }
  p.lengths_array = copied(p.lengths);
  p.order_array = copied(p.order);
  p.starts_array = copied(p.starts);
  p.ends_array = copied(p.ends);
}

template <typename scalar>
Problem<scalar> random_problem(const Sizes& sizes, bool ids) {
  Problem<scalar> p;
  p.T = sizes.T, p.B = sizes.B, p.I = sizes.I, p.H = sizes.H;
  p.cell = static_cast<Cell>(below(5));
  p.reverse = coin();
  p.lengths.assign(p.B, p.T);
  p.order.resize(p.B);
  std::iota(p.order.begin(), p.order.end(), 0);
  p.N = p.T * p.B;
  p.states = p.step_rows = p.B;
  const int64_t layout = below(4);  // padded; packed; padded with lengths; in pieces
  p.ragged = layout != 0;
  if (layout == 3) cut_in_pieces(p);
  if (layout == 1 || layout == 2) {
    for (auto& length : p.lengths) length = 1 + below(p.T);
    std::sort(p.lengths.rbegin(), p.lengths.rend());
    p.lengths[0] = p.T;
    p.lengths_array = copied(p.lengths);
  }
  if (layout == 1) {
    int64_t row = 0;
    for (int64_t t = 0; t < p.T; ++t) {
      p.step_row.push_back(row);
      for (int64_t i = 0; i < p.B; ++i) row += p.lengths[i] > t;
    }
    p.N = row;
    p.step_row_array = copied(p.step_row);
  }
  if (layout == 2) {
    std::shuffle(p.order.begin(), p.order.end(), generator);
    p.order_array = copied(p.order);
  }
  const double scale = 0.7 / std::sqrt(static_cast<double>(p.H));
  if (ids) {
    p.ids = array<int64_t>(1, p.N);
    for (int64_t i = 0; i < p.N; ++i) p.ids->data[i] = below(p.I);
  } else {
    p.x = randoms<scalar>(p.N, p.I, 1.0, random_gap(p.I, p.N));
  }
  const int64_t rows = p.gates() * p.H;
  const bool has_state = sizes_of(p.cell).has_state;
  p.W_ih = randoms<scalar>(rows, p.I, 1 / std::sqrt(static_cast<double>(p.I)));
  p.W_hh = randoms<scalar>(rows, p.H, scale);
  if (coin()) p.b_ih = randoms<scalar>(1, rows, 0.3);
  if (p.b_ih) p.b_hh = randoms<scalar>(1, rows, 0.3);
  if (coin()) p.h0 = randoms<scalar>(p.states, p.H, 0.5);
  if (has_state && coin()) p.c0 = randoms<scalar>(p.states, p.H, 0.5);
  p.y_gap = random_gap(p.H, p.N);
  if (below(5)) p.dy = randoms<scalar>(p.N, p.H, 1.0, random_gap(p.H, p.N));
  if (coin() || !p.dy) p.dh_n = randoms<scalar>(p.states, p.H, 1.0);
  if (has_state && coin()) p.dc_n = randoms<scalar>(p.states, p.H, 1.0);
  if (has_state && coin()) p.dcells = randoms<scalar>(p.N, p.H, 1.0, random_gap(p.H, p.N));
  return p;
}

}  // namespace charrnn_fast::native
