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
  std::unique_ptr<Array<scalar>> y, h_n, c_n, cells, saved;
};

template <typename scalar>
struct Backward {
  std::unique_ptr<Array<scalar>> dx, dh0, dW_ih, dW_hh, db_ih, db_hh, dc0;
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
  args->c0 = pointer(p.c0);
}

// `keep`: what backward wants is saved; `cells`: c of every step.
template <typename scalar>
Forward<scalar> forward(const Kernels<scalar>& kernels, const Problem<scalar>& p, Split split,
                        int team, bool keep = true, bool cells = false) {
  const CellSizes sizes = sizes_of(p.cell);
  Forward<scalar> out{array<scalar>(p.N, p.H, p.y_gap), array<scalar>(p.states, p.H), nullptr,
                      nullptr, nullptr};
  if (sizes.has_state) out.c_n = array<scalar>(p.states, p.H);
  if (sizes.has_state && cells) out.cells = array<scalar>(p.N, p.H, p.y_gap);
  if (sizes.saved > 0 && keep) out.saved = array<scalar>(p.N, sizes.saved * p.H);
  for (const auto* result : {&out.y, &out.h_n, &out.c_n, &out.cells, &out.saved}) {
    if (*result) (*result)->fill(made<scalar>(NAN));
  }
  ForwardArgs<scalar> args{};
  describe(p, split, &args);
  args.b_ih = pointer(p.b_ih);
  args.b_hh = pointer(p.b_hh);
  args.y = out.y->data;
  args.ldy = out.y->ld;
  args.h_n = out.h_n->data;
  args.c_n = pointer(out.c_n);
  args.cells = pointer(out.cells);
  args.ldcells = out.cells ? out.cells->ld : 0;
  args.saved = pointer(out.saved);
  Guarded workspace(kernels.forward_workspace(args, team), coin(), 64);
  args.workspace = workspace.data;
  run_team(team, [&](const Team& member) { kernels.forward(args, member); });
  if (overrun >= 0)
    read_past({out.y->end(), out.h_n->end(), p.W_ih->end(), p.W_hh->end(), p.x->end(), p.h0->end(),
               p.b_ih->end(), p.b_hh->end(), p.lengths_array->end(), p.order_array->end()});
  return out;
}

// Bits of `wanted`: dx, dh0, dW_ih, dW_hh, db_ih, db_hh, dc0.
template <typename scalar>
Backward<scalar> backward(const Kernels<scalar>& kernels, const Problem<scalar>& p,
                          const Forward<scalar>& result, Split split, int team, int wanted) {
  const CellSizes sizes = sizes_of(p.cell);
  const Array<scalar>& y = *result.y;
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
  const int64_t rows = sizes.gates * p.H;
  if (p.x) out.dx = output(0, p.N, p.I);
  out.dh0 = output(1, p.states, p.H);
  out.dW_ih = output(2, rows, p.I);
  out.dW_hh = output(3, rows, p.H);
  out.db_ih = output(4, 1, rows);
  out.db_hh = output(5, 1, rows);
  if (sizes.has_state) out.dc0 = output(6, p.states, p.H);
  BackwardArgs<scalar> args{};
  describe(p, split, &args);
  args.y = y.data;
  args.ldy = y.ld;
  args.saved = pointer(result.saved);
  args.dy = pointer(p.dy);
  args.lddy = p.dy ? p.dy->ld : 0;
  args.dcells = pointer(p.dcells);
  args.lddcells = p.dcells ? p.dcells->ld : 0;
  args.dh_n = pointer(p.dh_n);
  args.dc_n = pointer(p.dc_n);
  args.dx = pointer(out.dx);
  args.dh0 = pointer(out.dh0);
  args.dc0 = pointer(out.dc0);
  args.dW_ih = pointer(out.dW_ih);
  args.dW_hh = pointer(out.dW_hh);
  args.db_ih = pointer(out.db_ih);
  args.db_hh = pointer(out.db_hh);
  Guarded workspace(kernels.backward_workspace(args, team), coin(), 64);
  args.workspace = workspace.data;
  run_team(team, [&](const Team& member) { kernels.backward(args, member); });
  return out;
}

}  // namespace charrnn_fast::native
