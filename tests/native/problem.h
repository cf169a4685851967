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
  Cell cell;
  bool reverse, ragged;
  std::vector<int64_t> lengths, order;  // of each slot: steps, row within a step
  std::vector<int64_t> step_row;
  std::unique_ptr<Array<int64_t>> lengths_array, order_array, step_row_array, ids;
  std::unique_ptr<Array<scalar>> x, W_ih, W_hh, b_ih, b_hh, h0, dy, dh_n;
  int64_t y_gap;

  int64_t row(int64_t t, int64_t slot) const {
    return (step_row.empty() ? t * B : step_row[t]) + order[slot];
  }
  Sequences sequences() const {
    return {T,
            B,
            N,
            B,
            pointer(step_row_array),
            pointer(lengths_array),
            pointer(order_array),
            nullptr,
            nullptr};
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

template <typename scalar>
Problem<scalar> random_problem(const Sizes& sizes, bool ids) {
  Problem<scalar> p;
  p.T = sizes.T, p.B = sizes.B, p.I = sizes.I, p.H = sizes.H;
  p.cell = static_cast<Cell>(below(3));
  p.reverse = coin();
  p.lengths.assign(p.B, p.T);
  p.order.resize(p.B);
  std::iota(p.order.begin(), p.order.end(), 0);
  p.N = p.T * p.B;
  const int64_t layout = below(3);  // padded; packed; padded with lengths
  p.ragged = layout != 0;
  if (p.ragged) {
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
  p.W_ih = randoms<scalar>(p.H, p.I, 1 / std::sqrt(static_cast<double>(p.I)));
  p.W_hh = randoms<scalar>(p.H, p.H, scale);
  if (coin()) p.b_ih = randoms<scalar>(1, p.H, 0.3);
  if (p.b_ih) p.b_hh = randoms<scalar>(1, p.H, 0.3);
  if (coin()) p.h0 = randoms<scalar>(p.B, p.H, 0.5);
  p.y_gap = random_gap(p.H, p.N);
  if (below(5)) p.dy = randoms<scalar>(p.N, p.H, 1.0, random_gap(p.H, p.N));
  if (coin() || !p.dy) p.dh_n = randoms<scalar>(p.B, p.H, 1.0);
  return p;
}

}  // namespace charrnn_fast::native
