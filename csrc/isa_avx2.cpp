// AVX2 with FMA: 16 registers of 8 floats.
#include <immintrin.h>

#include "isa-prologue.h"
#include "rnn.h"

namespace charrnn_fast {
namespace {

constexpr int kVectorBytes = 32;
constexpr int kTileRows = 6;  // 6 rows x 2 vectors: 12 accumulators
constexpr int kTileVectors = 2;

ALWAYS_INLINE __m256 multiply_add(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
ALWAYS_INLINE __m256d multiply_add(__m256d a, __m256d b, __m256d c) {
  return _mm256_fmadd_pd(a, b, c);
}

#include "kernels-inl.h"

bool supported() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

}  // namespace

extern const Isa kAvx2;
const Isa kAvx2 = {"avx2", supported, &kernels<float>, &kernels<double>, nullptr};

}  // namespace charrnn_fast
