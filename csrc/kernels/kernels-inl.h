// The kernels of one ISA; included by each isa_*.cpp.
//
// Every -inl.h includes what it needs: an editor or clang++ parses it alone, for the baseline where
// it does not belong to another ISA. `make lint` does.
#pragma once

#include "backward-inl.h"
#include "forward-inl.h"
#include "generate-inl.h"
#include "linear-inl.h"
#include "rnn.h"

namespace charrnn_fast {
namespace {

template <typename scalar>
constexpr Kernels<scalar> kernels = {
    all_finite<scalar>, forward_workspace<scalar>, forward<scalar>, backward_workspace<scalar>,
    backward<scalar>,   linear_workspace<scalar>,  linear<scalar>,  generate_workspace<scalar>,
    generate<scalar>};

}  // namespace
}  // namespace charrnn_fast
