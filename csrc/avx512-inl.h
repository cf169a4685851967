// The vectors of AVX-512 (F, BW, DQ, VL): 32 registers of 16 floats. Included as vec-inl.h is.

constexpr int kVectorBytes = 64;
constexpr int kTileRows = 6;  // 6 rows x 4 vectors: 24 accumulators
constexpr int kTileVectors = 4;

ALWAYS_INLINE __m512 multiply_add(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
ALWAYS_INLINE __m512d multiply_add(__m512d a, __m512d b, __m512d c) {
  return _mm512_fmadd_pd(a, b, c);
}

#define CHARRNN_FAST_MASKED_MEMORY
ALWAYS_INLINE __m512 masked_load(const float* p, int64_t n) {
  return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
}
ALWAYS_INLINE __m512d masked_load(const double* p, int64_t n) {
  return _mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << n) - 1), p);
}
ALWAYS_INLINE void masked_store(float* p, __m512 v, int64_t n) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), v);
}
ALWAYS_INLINE void masked_store(double* p, __m512d v, int64_t n) {
  _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << n) - 1), v);
}
