// The kernels for every CPU of the architecture.
#define CHARRNN_FAST_VECTORS "baseline-inl.h"
#include "kernels-inl.h"
#include "rnn.h"

namespace charrnn_fast {
namespace {

bool supported() { return true; }

}  // namespace

extern const Isa kBaseline;
const Isa kBaseline = {"baseline", supported, nullptr, &kernels<float>, &kernels<double>, nullptr};

}  // namespace charrnn_fast
