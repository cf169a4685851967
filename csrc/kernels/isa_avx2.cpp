// The kernels for AVX2 with FMA.
#define CHARRNN_FAST_VECTORS "avx2-inl.h"
#include "kernels-inl.h"
#include "rnn.h"

namespace charrnn_fast {
namespace {

bool supported() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

}  // namespace

extern const Isa kAvx2;
const Isa kAvx2 = {"avx2", supported, nullptr, &kernels<float>, &kernels<double>, nullptr};

}  // namespace charrnn_fast
