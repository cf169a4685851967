// Cases of one layer, run forward and backward by one thread and by teams, and a sequence alone.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <utility>

#include "buffers.h"
#include "calls.h"
#include "case.h"
#include "comparison.h"
#include "dtypes.h"
#include "formula.h"
#include "kernels/rnn.h"
#include "problem.h"

namespace charrnn_fast::native {

// y of one sequence run alone has the bits that it has among the others.
template <typename scalar>
void check_alone(const Kernels<scalar>& kernels, Problem<scalar>& p, Forward<scalar>& all) {
  const int64_t slot = below(p.B);
  Problem<scalar> one{};
  one.T = one.N = p.lengths[slot];
  one.B = one.states = one.step_rows = 1;
  one.I = p.I;
  one.H = p.H;
  one.cell = p.cell;
  one.reverse = p.reverse;
  one.lengths.assign(1, one.T);
  one.order.assign(1, 0);
  if (p.ids) one.ids = array<int64_t>(1, one.T);
  if (p.x) one.x = array<scalar>(one.T, one.I);
  const int64_t start = p.start(slot);
  if (p.h0 && start >= 0) one.h0 = array<scalar>(1, one.H);
  if (p.c0 && start >= 0) one.c0 = array<scalar>(1, one.H);
  for (int64_t t = 0; t < one.T; ++t) {
    const int64_t row = p.row(t, slot);
    if (p.ids) one.ids->data[t] = p.ids->data[row];
    if (p.x) std::copy_n(&p.x->at(row, 0), p.I, &one.x->at(t, 0));
  }
  if (one.h0) std::copy_n(&p.h0->at(start, 0), p.H, one.h0->data);
  if (one.c0) std::copy_n(&p.c0->at(start, 0), p.H, one.c0->data);
  std::swap(one.W_ih, p.W_ih);
  std::swap(one.W_hh, p.W_hh);
  std::swap(one.b_ih, p.b_ih);
  std::swap(one.b_hh, p.b_hh);
  Forward<scalar> alone = forward(kernels, one, Split::kBatch, 1);
  std::swap(one.W_ih, p.W_ih);
  std::swap(one.W_hh, p.W_hh);
  std::swap(one.b_ih, p.b_ih);
  std::swap(one.b_hh, p.b_hh);
  for (int64_t t = 0; t < one.T; ++t)
    if (std::memcmp(&alone.y->at(t, 0), &all.y->at(p.row(t, slot), 0),
                    static_cast<size_t>(p.H) * sizeof(scalar)) != 0)
      fail("y of a sequence depends on the others in the batch");
}

// A layer against the formula, with the same bits for every team and split.
template <typename scalar>
void run_layer_case(const Kernels<scalar>& kernels) {
  const Sizes sizes = random_sizes();
  Problem<scalar> p = random_problem<scalar>(sizes, below(3) == 0);
  const int wanted = below(2) ? 127 : static_cast<int>(below(128));
  const bool cells = coin();
  char text[300];
  std::snprintf(text, sizeof text,
                "%s, %s: T=%ld B=%ld N=%ld I=%ld H=%ld cell=%d reverse=%d ragged=%d ids=%d "
                "bias=%d h0=%d dy=%d dh_n=%d wanted=%d",
                current.c_str(), kName<scalar>, static_cast<long>(p.T), static_cast<long>(p.B),
                static_cast<long>(p.N), static_cast<long>(p.I), static_cast<long>(p.H),
                static_cast<int>(p.cell), p.reverse, p.ragged, p.ids != nullptr, p.b_ih != nullptr,
                p.h0 != nullptr, p.dy != nullptr, p.dh_n != nullptr, wanted);
  current = text;
  Forward<scalar> y = forward(kernels, p, Split::kBatch, 1, true, cells);
  check_forward(p, y);
  Backward<scalar> gradients = backward(kernels, p, y, Split::kBatch, 1, wanted);
  check_backward(p, *y.y, gradients);
  for (Split split : {Split::kBatch, Split::kHidden}) {
    const int team = 1 + static_cast<int>(below(5));
    Forward<scalar> other = forward(kernels, p, split, team, coin(), cells);
    expect_same_bits("y", y.y, other.y);
    expect_same_bits("h_n", y.h_n, other.h_n);
    if (y.c_n) expect_same_bits("c_n", y.c_n, other.c_n);
    if (y.cells) expect_same_bits("cells", y.cells, other.cells);
    Backward<scalar> again = backward(kernels, p, y, split, team, wanted);
    expect_same_bits("dc0", gradients.dc0, again.dc0);
    expect_same_bits("dx", gradients.dx, again.dx);
    expect_same_bits("dh0", gradients.dh0, again.dh0);
    expect_same_bits("dW_ih", gradients.dW_ih, again.dW_ih);
    expect_same_bits("dW_hh", gradients.dW_hh, again.dW_hh);
    expect_same_bits("db_ih", gradients.db_ih, again.db_ih);
    expect_same_bits("db_hh", gradients.db_hh, again.db_hh);
  }
  check_alone(kernels, p, y);
}

// The gradients of ids whose units are fewer than the members: some of those have nothing to add.
template <typename scalar>
void run_few_units_case(const Kernels<scalar>& kernels) {
  current += ", few units";
  for (const int64_t H : {1, 3}) {
    const Problem<scalar> p = random_problem<scalar>({40, 16, 38, H}, true);
    const Forward<scalar> y = forward(kernels, p, Split::kBatch, 1);
    const Backward<scalar> one = backward(kernels, p, y, Split::kBatch, 1, 31);
    for (const int team : {4, 8, 10}) {
      const Backward<scalar> many = backward(kernels, p, y, Split::kBatch, team, 31);
      expect_same_bits("dW_ih", one.dW_ih, many.dW_ih);
    }
  }
}

// A problem with every buffer, past one of which forward() then reads.
inline void run_overrun() {
  for (;;) {
    Problem<float> p = random_problem<float>(random_sizes(), false);
    if (p.x && p.h0 && p.b_ih && p.lengths_array && p.order_array) {
      forward(*isa().f32, p, Split::kBatch, 1);
      return;
    }
  }
}

}  // namespace charrnn_fast::native
