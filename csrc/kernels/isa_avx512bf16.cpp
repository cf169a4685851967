// The kernels for AVX-512 with dot products of bfloat16. float and double run those of AVX-512.
#define CHARRNN_FAST_VECTORS "avx512-inl.h"
#define CHARRNN_FAST_BFLOAT16
#include "kernels-inl.h"
#include "rnn.h"

namespace charrnn_fast {

extern const Kernels<float> kAvx512F32;
extern const Kernels<double> kAvx512F64;

namespace {

constexpr Kernels<bfloat16> kBFloat16 = {all_finite<bfloat16>,
                                         forward_workspace<bfloat16>,
                                         forward<bfloat16>,
                                         backward_workspace<bfloat16>,
                                         backward<bfloat16>,
                                         nullptr,
                                         nullptr,
                                         nullptr,
                                         nullptr};

bool supported() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bf16");
}

// Its products must run at the rate of float32's multiply-adds, as on Zen 4 and 5, to do twice the
// work. Intel's cores run one for two of those (measured on Emerald Rapids: 0.54 times as fast as
// float32): there bfloat16 is converted, and float32 multiplied. The CPU alone decides, so that the
// same machine gives the same bits.
bool pays() {
  __builtin_cpu_init();
  return !__builtin_cpu_is("intel");
}

}  // namespace

extern const Isa kAvx512BFloat16;
const Isa kAvx512BFloat16 = {"avx512bf16", supported, pays, &kAvx512F32, &kAvx512F64, &kBFloat16};

}  // namespace charrnn_fast
