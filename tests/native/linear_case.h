// Cases of a linear layer, run by one thread and by a team.
#pragma once

#include <cstdint>
#include <cstdio>
#include <vector>

#include "buffers.h"
#include "case.h"
#include "comparison.h"
#include "dtypes.h"
#include "kernels/rnn.h"
#include "running.h"

namespace charrnn_fast::native {

// A linear layer against the formula, and with the same bits for a team.
template <typename scalar>
void run_linear_case(const Kernels<scalar>& kernels) {
  const int64_t N = random_size(9, 400), I = random_size(40, 300), H = random_size(40, 150);
  auto x = randoms<scalar>(N, I, 1.0), W = randoms<scalar>(H, I, 1.0),
       b = randoms<scalar>(1, H, 1.0);
  const int team = 2 + static_cast<int>(below(4));
  char text[120];
  std::snprintf(text, sizeof text, "%s, linear: N=%ld I=%ld H=%ld team=%d", current.c_str(),
                static_cast<long>(N), static_cast<long>(I), static_cast<long>(H), team);
  current = text;
  const auto run = [&](int size) {
    auto y = array<scalar>(N, H);
    LinearArgs<scalar> args = {N, I, H, x->data, W->data, b->data, y->data, nullptr};
    Guarded workspace(kernels.linear_workspace(args), coin(), 64);
    args.workspace = workspace.data;
    run_team(size, [&](const Team& member) { kernels.linear(args, member); });
    return y;
  };
  const auto y = run(1), again = run(team);
  expect_same_bits("y", y, again);
  std::vector<double> want(N * H);
  for (int64_t n = 0; n < N; ++n) {
    for (int64_t j = 0; j < H; ++j) {
      want[n * H + j] = b->data[j];
      for (int64_t i = 0; i < I; ++i) want[n * H + j] += number(x->at(n, i)) * number(W->at(j, i));
    }
  }
  expect_close("y", *y, want);
}

}  // namespace charrnn_fast::native
