// The kernels for NEON of aarch64.
#define CHARRNN_FAST_VECTORS "neon-inl.h"
#include "kernels-inl.h"
#include "rnn.h"

namespace charrnn_fast {
namespace {

bool supported() { return true; }  // part of every aarch64

}  // namespace

extern const Isa kNeon;
const Isa kNeon = {"neon", supported, nullptr, &kernels<float>, &kernels<double>, nullptr};

}  // namespace charrnn_fast
