// The vector type of one ISA: GCC/Clang vector extensions, and the few operations they lack.
//
// An isa_*.cpp defines CHARRNN_FAST_VECTORS first: the file that has kVectorBytes, the sizes of
// tiles and multiply_add() of its ISA. That file, this one and all that is built on it lie in an
// unnamed namespace, so that the linker shares nothing between ISAs.
#pragma once

#include "isa-prologue.h"

#ifndef CHARRNN_FAST_VECTORS
#define CHARRNN_FAST_VECTORS "baseline-inl.h"  // parsed alone
#endif
#include CHARRNN_FAST_VECTORS

namespace charrnn_fast {
namespace {

template <typename scalar>
struct VectorTraits {
  typedef scalar type __attribute__((vector_size(kVectorBytes)));
  typedef scalar in_memory
      __attribute__((vector_size(kVectorBytes), aligned(sizeof(scalar)), may_alias));
};
template <typename scalar>
using Vec = typename VectorTraits<scalar>::type;

template <typename scalar>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(scalar));

// The signed integer as wide as a scalar, and vectors of it: what comparisons yield.
template <typename scalar>
using Bits = std::conditional_t<sizeof(scalar) == 4, int32_t, int64_t>;

template <typename To, typename From>
ALWAYS_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

template <typename scalar>
ALWAYS_INLINE Vec<scalar> load(const scalar* p) {
  return *reinterpret_cast<const typename VectorTraits<scalar>::in_memory*>(p);
}

template <typename scalar>
ALWAYS_INLINE void store(scalar* p, Vec<scalar> v) {
  *reinterpret_cast<typename VectorTraits<scalar>::in_memory*>(p) = v;
}

template <typename scalar>
ALWAYS_INLINE Vec<scalar> broadcast(scalar s) {
  return s - Vec<scalar>{};  // s - 0 keeps the sign of a zero, as s + 0 would not
}

// The first n lanes; the others are zero, and their memory is not touched.
template <typename scalar>
ALWAYS_INLINE Vec<scalar> load_first(const scalar* p, int64_t n) {
#ifdef CHARRNN_FAST_MASKED_LOAD
  return masked_load(p, n);
#else
  scalar lanes[kLanes<scalar>] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
  return load(lanes);
#endif
}

template <typename scalar>
ALWAYS_INLINE void store_first(scalar* p, Vec<scalar> v, int64_t n) {
#ifdef CHARRNN_FAST_MASKED_STORE
  masked_store(p, v, n);
#else
  scalar lanes[kLanes<scalar>];
  store(lanes, v);
  for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
#endif
}

// The lanes i, j, k, l of the eight of two four-lane vectors.
#if defined(__clang__)
#define SHUFFLE4(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
typedef int32_t FourIndices __attribute__((vector_size(16)));
#define SHUFFLE4(a, b, i, j, k, l) __builtin_shuffle(a, b, FourIndices{i, j, k, l})
#endif

// mask ? a : b, lane by lane; the mask is a comparison of Vec<scalar>.
template <typename scalar>
ALWAYS_INLINE Vec<scalar> select(Vec<Bits<scalar>> mask, Vec<scalar> a, Vec<scalar> b) {
  return mask ? a : b;
}

}  // namespace
}  // namespace charrnn_fast
