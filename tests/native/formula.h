// The formula of one layer and of its gradients, written naively in double, and results held to it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "buffers.h"
#include "calls.h"
#include "comparison.h"
#include "dtypes.h"
#include "kernels/rnn.h"
#include "problem.h"

namespace charrnn_fast::native {

inline double apply(Cell cell, double a) {
  switch (cell) {
    case Cell::kTanh:
      return std::tanh(a);
    case Cell::kRelu:
      return a > 0 ? a : 0;
    default:
      return 1 / (1 + std::exp(-a));
  }
}

inline double slope(Cell cell, double y) {
  switch (cell) {
    case Cell::kTanh:
      return 1 - y * y;
    case Cell::kRelu:
      return y > 0 ? 1 : 0;
    default:
      return y * (1 - y);
  }
}

// Order of the steps of a sequence.
inline int64_t step(bool reverse, int64_t length, int64_t k) {
  return reverse ? length - 1 - k : k;
}

template <typename scalar>
void check_forward(Problem<scalar>& p, Forward<scalar>& out) {
  std::vector<double> y(p.N * p.H, NAN), h_n(p.B * p.H), previous(p.H), sum(p.H);
  for (int64_t slot = 0; slot < p.B; ++slot) {
    for (int64_t j = 0; j < p.H; ++j) previous[j] = p.h0 ? number(p.h0->at(p.order[slot], j)) : 0;
    for (int64_t k = 0; k < p.lengths[slot]; ++k) {
      const int64_t row = p.row(step(p.reverse, p.lengths[slot], k), slot);
      for (int64_t j = 0; j < p.H; ++j) {
        double a = p.b_ih ? number(p.b_ih->data[j]) + number(p.b_hh->data[j]) : 0;
        if (p.ids) a += number(p.W_ih->at(j, p.ids->data[row]));
        for (int64_t i = 0; p.x && i < p.I; ++i)
          a += number(p.x->at(row, i)) * number(p.W_ih->at(j, i));
        for (int64_t i = 0; i < p.H; ++i) a += previous[i] * number(p.W_hh->at(j, i));
        sum[j] = apply(p.cell, a);
      }
      previous = sum;
      std::copy(sum.begin(), sum.end(), y.begin() + row * p.H);
    }
    std::copy(previous.begin(), previous.end(), h_n.begin() + p.order[slot] * p.H);
  }
  expect_close("y", *out.y, y);
  expect_close("h_n", *out.h_n, h_n);
}

template <typename scalar>
void check_backward(Problem<scalar>& p, Array<scalar>& y, Backward<scalar>& out) {
  std::vector<double> dx(p.N * p.I, NAN), dh0(p.B * p.H), dW_ih(p.H * p.I), dW_hh(p.H * p.H),
      db(p.H), dh(p.H), delta(p.H), sizes(p.H), sizes_hh(p.H * p.H);
  for (int64_t slot = 0; slot < p.B; ++slot) {
    const int64_t place = p.order[slot], length = p.lengths[slot];
    for (int64_t j = 0; j < p.H; ++j) dh[j] = p.dh_n ? number(p.dh_n->at(place, j)) : 0;
    for (int64_t k = length - 1; k >= 0; --k) {
      const int64_t row = p.row(step(p.reverse, length, k), slot);
      const int64_t before = k > 0 ? p.row(step(p.reverse, length, k - 1), slot) : -1;
      for (int64_t j = 0; j < p.H; ++j)
        delta[j] =
            (dh[j] + (p.dy ? number(p.dy->at(row, j)) : 0)) * slope(p.cell, number(y.at(row, j)));
      std::fill(dh.begin(), dh.end(), 0.0);
      for (int64_t i = 0; i < p.I; ++i) dx[row * p.I + i] = 0;
      for (int64_t j = 0; j < p.H; ++j) {
        db[j] += delta[j];
        sizes[j] += std::abs(delta[j]);
        if (p.ids) dW_ih[j * p.I + p.ids->data[row]] += delta[j];
        for (int64_t i = 0; i < p.I; ++i) {
          dx[row * p.I + i] += delta[j] * number(p.W_ih->at(j, i));
          if (p.x) dW_ih[j * p.I + i] += delta[j] * number(p.x->at(row, i));
        }
        for (int64_t i = 0; i < p.H; ++i) {
          dh[i] += delta[j] * number(p.W_hh->at(j, i));
          const double h = before >= 0 ? number(y.at(before, i))
                           : p.h0      ? number(p.h0->at(place, i))
                                       : 0;
          dW_hh[j * p.H + i] += delta[j] * h;
          sizes_hh[j * p.H + i] += std::abs(delta[j] * h);
        }
      }
    }
    std::copy(dh.begin(), dh.end(), dh0.begin() + place * p.H);
  }
  if (out.dx) expect_close("dx", *out.dx, dx);
  if (out.dh0) expect_close("dh0", *out.dh0, dh0);
  // Sums may be small beside their terms, whose errors of half a per cent in bfloat16 they have.
  const bool coarse = std::is_same_v<scalar, bfloat16>;
  const auto size_of = [&](const std::vector<double>& terms) {
    return coarse ? std::max(1.0, std::ranges::max(terms) / 8) : 1;
  };
  const double size = size_of(sizes);
  if (out.dW_ih) expect_close("dW_ih", *out.dW_ih, dW_ih, size);
  if (out.dW_hh) expect_close("dW_hh", *out.dW_hh, dW_hh, size_of(sizes_hh));
  if (out.db) expect_close("db", *out.db, db, size);
}

}  // namespace charrnn_fast::native
