// Everything generic, in order of dependence; included by each isa_*.cpp inside its namespace.
// clang-format off
#include "vec-inl.h"
#include "format-inl.h"
#ifdef CHARRNN_FAST_BFLOAT16
#include "bfloat16-inl.h"
#endif
#include "activations-inl.h"
#include "cells-inl.h"
#include "sequences-inl.h"
#include "epilogues-inl.h"
#include "tile-inl.h"
#include "pack-inl.h"
#include "one-step-inl.h"
#include "forward-inl.h"
#include "outer-inl.h"
#include "thin-inl.h"
#include "backward-space-inl.h"
#include "backward-weights-inl.h"
#include "backward-inl.h"
#include "linear-inl.h"
#include "generate-inl.h"
// clang-format on

template <typename scalar>
constexpr Kernels<scalar> kernels = {
    all_finite<scalar>, forward_workspace<scalar>, forward<scalar>, backward_workspace<scalar>,
    backward<scalar>,   linear_workspace<scalar>,  linear<scalar>,  generate_workspace<scalar>,
    generate<scalar>};
