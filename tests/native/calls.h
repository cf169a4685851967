// One layer run forward and backward on a problem, into buffers that are NaN before.
#pragma once

#include <cmath>
#include <cstdint>
#include <memory>

#include "buffers.h"
#include "case.h"
#include "dtypes.h"
#include "kernels/rnn.h"
#include "problem.h"
#include "running.h"

namespace charrnn_fast::native {

template <typename scalar>
struct Forward {
  std::unique_ptr<Array<scalar>> y, h_n;
};

template <typename scalar>
struct Backward {
  std::unique_ptr<Array<scalar>> dx, dh0, dW_ih, dW_hh, db;
};

// What both kinds of call are told of a problem.
template <typename scalar, typename Args>
void describe(const Problem<scalar>& p, Split split, Args* args) {
  args->seq = p.sequences();
  args->I = p.I;
  args->H = p.H;
  args->cell = p.cell;
  args->reverse = p.reverse;
  args->split = split;
  args->x = pointer(p.x);
  args->ldx = p.x ? p.x->ld : 0;
  args->ids = pointer(p.ids);
  args->W_ih = p.W_ih->data;
  args->W_hh = p.W_hh->data;
  args->h0 = pointer(p.h0);
}

template <typename scalar>
Forward<scalar> forward(const Kernels<scalar>& kernels, const Problem<scalar>& p, Split split,
                        int team) {
  Forward<scalar> out{array<scalar>(p.N, p.H, p.y_gap), array<scalar>(p.B, p.H)};
  out.y->fill(made<scalar>(NAN));
  out.h_n->fill(made<scalar>(NAN));
  ForwardArgs<scalar> args{};
  describe(p, split, &args);
  args.b_ih = pointer(p.b_ih);
  args.b_hh = pointer(p.b_hh);
  args.y = out.y->data;
  args.ldy = out.y->ld;
  args.h_n = out.h_n->data;
  Guarded workspace(kernels.forward_workspace(args, team), coin(), 64);
  args.workspace = workspace.data;
  run_team(team, [&](const Team& member) { kernels.forward(args, member); });
  if (overrun >= 0)
    read_past({out.y->end(), out.h_n->end(), p.W_ih->end(), p.W_hh->end(), p.x->end(), p.h0->end(),
               p.b_ih->end(), p.b_hh->end(), p.lengths_array->end(), p.order_array->end()});
  return out;
}

// Bits of `wanted`: dx, dh0, dW_ih, dW_hh, db.
template <typename scalar>
Backward<scalar> backward(const Kernels<scalar>& kernels, const Problem<scalar>& p,
                          const Array<scalar>& y, Split split, int team, int wanted) {
  Backward<scalar> out;
  const scalar nan = made<scalar>(NAN);
  const auto output = [&](int bit, int64_t rows, int64_t width) {
    std::unique_ptr<Array<scalar>> a;
    if (wanted >> bit & 1) {
      a = array<scalar>(rows, width);
      a->fill(nan);
    }
    return a;
  };
  if (p.x) out.dx = output(0, p.N, p.I);
  out.dh0 = output(1, p.B, p.H);
  out.dW_ih = output(2, p.H, p.I);
  out.dW_hh = output(3, p.H, p.H);
  out.db = output(4, 1, p.H);
  auto delta = array<scalar>(p.N, p.H);
  delta->fill(nan);
  BackwardArgs<scalar> args{};
  describe(p, split, &args);
  args.y = y.data;
  args.ldy = y.ld;
  args.dy = pointer(p.dy);
  args.lddy = p.dy ? p.dy->ld : 0;
  args.dh_n = pointer(p.dh_n);
  args.delta = delta->data;
  args.dx = pointer(out.dx);
  args.dh0 = pointer(out.dh0);
  args.dW_ih = pointer(out.dW_ih);
  args.dW_hh = pointer(out.dW_hh);
  args.db_ih = pointer(out.db);
  Guarded workspace(kernels.backward_workspace(args, team), coin(), 64);
  args.workspace = workspace.data;
  run_team(team, [&](const Team& member) { kernels.backward(args, member); });
  return out;
}

}  // namespace charrnn_fast::native
