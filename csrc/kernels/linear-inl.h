// A linear layer, forward. (Backward is that of one step of an RNN.)
#pragma once

#include "pack-inl.h"
#include "rnn.h"
#include "sequences-inl.h"
#include "tile-inl.h"

namespace charrnn_fast {
namespace {

template <typename scalar>
struct LinearSpace {
  Panels<scalar> panels;
  scalar* packed;  // W' in panels
  size_t bytes;

  LinearSpace(const LinearArgs<scalar>& args, void* base) : panels(args.H) {
    Arena arena(base);
    packed = arena.take<scalar>(args.I * panels.padded_columns());
    bytes = arena.used();
  }
};

template <typename scalar>
size_t linear_workspace(const LinearArgs<scalar>& args) {
  return LinearSpace<scalar>(args, nullptr).bytes;
}

template <typename scalar>
void linear(const LinearArgs<scalar>& args, const Team& team) {
  const LinearSpace<scalar> space(args, args.workspace);
  const Panels<scalar>& panels = space.panels;
  const Range packs = share(panels.count, team);
  pack_transposed(args.W, args.I, panels, packs.first, packs.last, space.packed);
  wait_for(team);
  const scalar* x[kChunkRows];
  const scalar* init[kChunkRows];
  scalar* y[kChunkRows];
  TileArgs<scalar> product = {.a = x, .K = args.I, .init = init, .out = y};
  const Range mine = share(args.N, team);
  for (int64_t done = mine.first; done < mine.last;) {
    const int64_t count = mine.last - done < kChunkRows ? mine.last - done : kChunkRows;
    for (int64_t i = 0; i < count; ++i) {
      x[i] = args.x + (done + i) * args.I;
      init[i] = args.b;
      y[i] = args.y + (done + i) * args.H;
    }
    done += count;
    multiply<Store<>>(product, count, panels, {0, panels.count}, space.packed);
  }
}

}  // namespace
}  // namespace charrnn_fast
