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

inline double sigmoid(double a) { return 1 / (1 + std::exp(-a)); }

inline double apply(Cell cell, double a) {
  switch (cell) {
    case Cell::kTanh:
      return std::tanh(a);
    case Cell::kRelu:
      return a > 0 ? a : 0;
    default:
      return sigmoid(a);
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

// One unit in one step. x and h are the sums of its gates, of the input and of the state, in the
// order in which torch keeps weights; h and c before the step become those after it.
struct Unit {
  double x[4], h[4];
};

inline void step_forward(Cell cell, const Unit& a, double* h, double* c) {
  if (cell == Cell::kLstm) {
    const double i = sigmoid(a.x[0] + a.h[0]), f = sigmoid(a.x[1] + a.h[1]);
    const double g = std::tanh(a.x[2] + a.h[2]), o = sigmoid(a.x[3] + a.h[3]);
    *c = f * *c + i * g;
    *h = o * std::tanh(*c);
  } else if (cell == Cell::kGru) {
    const double r = sigmoid(a.x[0] + a.h[0]), z = sigmoid(a.x[1] + a.h[1]);
    const double n = std::tanh(a.x[2] + r * a.h[2]);
    *h = (1 - z) * n + z * *h;
  } else {
    *h = apply(cell, a.x[0] + a.h[0]);
  }
}

// Gradients of the sums from those of h and c after the step, which become what goes to h and c
// before it elementwise. y is h after the step.
inline Unit step_backward(Cell cell, const Unit& a, double h, double c, double y, double* dh,
                          double* dc) {
  Unit d{};
  if (cell == Cell::kLstm) {
    const double i = sigmoid(a.x[0] + a.h[0]), f = sigmoid(a.x[1] + a.h[1]);
    const double g = std::tanh(a.x[2] + a.h[2]), o = sigmoid(a.x[3] + a.h[3]);
    const double t = std::tanh(f * c + i * g);
    const double d_c = *dc + *dh * o * (1 - t * t);
    d.x[0] = d_c * g * i * (1 - i);
    d.x[1] = d_c * c * f * (1 - f);
    d.x[2] = d_c * i * (1 - g * g);
    d.x[3] = *dh * t * o * (1 - o);
    for (int k = 0; k < 4; ++k) d.h[k] = d.x[k];
    *dc = d_c * f;
    *dh = 0;
  } else if (cell == Cell::kGru) {
    const double r = sigmoid(a.x[0] + a.h[0]), z = sigmoid(a.x[1] + a.h[1]);
    const double n = std::tanh(a.x[2] + r * a.h[2]);
    d.x[2] = *dh * (1 - z) * (1 - n * n);
    d.h[2] = d.x[2] * r;
    d.x[0] = d.h[0] = d.x[2] * a.h[2] * r * (1 - r);
    d.x[1] = d.h[1] = *dh * (h - n) * z * (1 - z);
    *dh *= z;
  } else {
    d.x[0] = d.h[0] = *dh * slope(cell, y);
    *dh = 0;
  }
  return d;
}

// Order of the steps of a sequence.
inline int64_t step(bool reverse, int64_t length, int64_t k) {
  return reverse ? length - 1 - k : k;
}

// The sums of all units in a step, by x of a row and h before it.
template <typename scalar>
std::vector<Unit> sums_of(Problem<scalar>& p, int64_t row, const std::vector<double>& h) {
  std::vector<Unit> units(p.H);
  for (int64_t g = 0; g < p.gates(); ++g) {
    for (int64_t j = 0; j < p.H; ++j) {
      const int64_t r = g * p.H + j;
      double x = p.b_ih ? number(p.b_ih->data[r]) : 0, state = p.b_hh ? number(p.b_hh->data[r]) : 0;
      if (p.ids) x += number(p.W_ih->at(r, p.ids->data[row]));
      for (int64_t i = 0; p.x && i < p.I; ++i)
        x += number(p.x->at(row, i)) * number(p.W_ih->at(r, i));
      for (int64_t i = 0; i < p.H; ++i) state += h[i] * number(p.W_hh->at(r, i));
      units[j].x[g] = x;
      units[j].h[g] = state;
    }
  }
  return units;
}

// A row of states as numbers; zeros where there is none.
template <typename scalar>
std::vector<double> state_of(const std::unique_ptr<Array<scalar>>& states, int64_t row, int64_t H) {
  std::vector<double> state(H, 0.0);
  for (int64_t j = 0; states && row >= 0 && j < H; ++j) state[j] = number(states->at(row, j));
  return state;
}

template <typename scalar>
void check_forward(Problem<scalar>& p, Forward<scalar>& out) {
  const bool has_state = sizes_of(p.cell).has_state;
  std::vector<double> y(p.N * p.H, NAN), cells(p.N * p.H, NAN);
  std::vector<double> h_n(p.states * p.H, NAN), c_n(p.states * p.H, NAN);
  for (int64_t slot = 0; slot < p.B; ++slot) {
    std::vector<double> h = state_of(p.h0, p.start(slot), p.H);
    std::vector<double> c = state_of(p.c0, p.start(slot), p.H);
    for (int64_t k = 0; k < p.lengths[slot]; ++k) {
      const int64_t row = p.row(step(p.reverse, p.lengths[slot], k), slot);
      const std::vector<Unit> units = sums_of(p, row, h);
      for (int64_t j = 0; j < p.H; ++j) step_forward(p.cell, units[j], &h[j], &c[j]);
      std::copy(h.begin(), h.end(), y.begin() + row * p.H);
      std::copy(c.begin(), c.end(), cells.begin() + row * p.H);
    }
    if (p.end(slot) < 0) continue;
    std::copy(h.begin(), h.end(), h_n.begin() + p.end(slot) * p.H);
    std::copy(c.begin(), c.end(), c_n.begin() + p.end(slot) * p.H);
  }
  expect_close("y", *out.y, y);
  expect_close("h_n", *out.h_n, h_n);
  if (has_state) expect_close("c_n", *out.c_n, c_n);
  if (out.cells) expect_close("cells", *out.cells, cells);
}

template <typename scalar>
void check_backward(Problem<scalar>& p, Array<scalar>& y, Backward<scalar>& out) {
  const int64_t G = p.gates(), H = p.H;
  std::vector<double> dx(p.N * p.I, NAN), dh0(p.states * H, NAN), dc0(p.states * H, NAN);
  std::vector<double> dW_ih(G * H * p.I), dW_hh(G * H * H), db_ih(G * H), db_hh(G * H);
  std::vector<double> sizes(G * H), sizes_hh(G * H * H);
  for (int64_t slot = 0; slot < p.B; ++slot) {
    const int64_t length = p.lengths[slot];
    // Forward once more, on the states that backward is given.
    std::vector<std::vector<double>> h(length + 1), c(length + 1);
    std::vector<std::vector<Unit>> units(length);
    h[0] = state_of(p.h0, p.start(slot), H);
    c[0] = state_of(p.c0, p.start(slot), H);
    for (int64_t k = 0; k < length; ++k) {
      const int64_t row = p.row(step(p.reverse, length, k), slot);
      units[k] = sums_of(p, row, h[k]);
      c[k + 1] = c[k];
      h[k + 1].resize(H);
      for (int64_t j = 0; j < H; ++j) {
        double unused = h[k][j];
        step_forward(p.cell, units[k][j], &unused, &c[k + 1][j]);
        h[k + 1][j] = number(y.at(row, j));
      }
    }
    std::vector<double> dh = state_of(p.dh_n, p.end(slot), H);
    std::vector<double> dc = state_of(p.dc_n, p.end(slot), H);
    for (int64_t k = length - 1; k >= 0; --k) {
      const int64_t row = p.row(step(p.reverse, length, k), slot);
      std::vector<Unit> delta(H);
      for (int64_t j = 0; j < H; ++j) {
        if (p.dy) dh[j] += number(p.dy->at(row, j));
        if (p.dcells) dc[j] += number(p.dcells->at(row, j));
        delta[j] =
            step_backward(p.cell, units[k][j], h[k][j], c[k][j], h[k + 1][j], &dh[j], &dc[j]);
      }
      for (int64_t i = 0; i < p.I; ++i) dx[row * p.I + i] = 0;
      for (int64_t g = 0; g < G; ++g) {
        for (int64_t j = 0; j < H; ++j) {
          const int64_t r = g * H + j;
          const double d_x = delta[j].x[g], d_h = delta[j].h[g];
          db_ih[r] += d_x;
          db_hh[r] += d_h;
          sizes[r] += std::abs(d_x);
          if (p.ids) dW_ih[r * p.I + p.ids->data[row]] += d_x;
          for (int64_t i = 0; i < p.I; ++i) {
            dx[row * p.I + i] += d_x * number(p.W_ih->at(r, i));
            if (p.x) dW_ih[r * p.I + i] += d_x * number(p.x->at(row, i));
          }
          for (int64_t i = 0; i < H; ++i) {
            dh[i] += d_h * number(p.W_hh->at(r, i));
            dW_hh[r * H + i] += d_h * h[k][i];
            sizes_hh[r * H + i] += std::abs(d_h * h[k][i]);
          }
        }
      }
    }
    if (p.start(slot) < 0) continue;
    std::copy(dh.begin(), dh.end(), dh0.begin() + p.start(slot) * H);
    std::copy(dc.begin(), dc.end(), dc0.begin() + p.start(slot) * H);
  }
  if (out.dx) expect_close("dx", *out.dx, dx);
  if (out.dh0) expect_close("dh0", *out.dh0, dh0);
  if (out.dc0) expect_close("dc0", *out.dc0, dc0);
  // Sums may be small beside their terms, whose errors of half a per cent in bfloat16 they have.
  const bool coarse = std::is_same_v<scalar, bfloat16>;
  const auto size_of = [&](const std::vector<double>& terms) {
    return coarse ? std::max(1.0, std::ranges::max(terms) / 8) : 1;
  };
  const double size = size_of(sizes);
  if (out.dW_ih) expect_close("dW_ih", *out.dW_ih, dW_ih, size);
  if (out.dW_hh) expect_close("dW_hh", *out.dW_hh, dW_hh, size_of(sizes_hh));
  if (out.db_ih) expect_close("db_ih", *out.db_ih, db_ih, size);
  if (out.db_hh) expect_close("db_hh", *out.db_hh, db_hh, size);
}

}  // namespace charrnn_fast::native
