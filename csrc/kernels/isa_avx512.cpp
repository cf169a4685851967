// The kernels for AVX-512 (F, BW, DQ, VL).
#define CHARRNN_FAST_VECTORS "avx512-inl.h"
#include "kernels-inl.h"
#include "rnn.h"

namespace charrnn_fast {
namespace {

bool supported() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

}  // namespace

// Shared with the ISAs that add to this one.
extern const Kernels<float> kAvx512F32;
extern const Kernels<double> kAvx512F64;
const Kernels<float> kAvx512F32 = kernels<float>;
const Kernels<double> kAvx512F64 = kernels<double>;

extern const Isa kAvx512;
const Isa kAvx512 = {"avx512", supported, nullptr, &kAvx512F32, &kAvx512F64, nullptr};

}  // namespace charrnn_fast
