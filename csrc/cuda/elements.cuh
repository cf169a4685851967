// Elements of tensors, and what is done to one of them.
#pragma once

#include <cmath>

#include "compat.cuh"
#include "rnn_cuda.h"

namespace charrnn_fast::cuda {

// The dtype is looked at here, at run time: outputs are few beside the products, and one instance
// of each kernel serves three dtypes.
__device__ inline float load(const void* base, int64_t i, Dtype dtype) {
  if (dtype == Dtype::kFloat32) return static_cast<const float*>(base)[i];
  const uint16_t bits = static_cast<const uint16_t*>(base)[i];
  return dtype == Dtype::kFloat16 ? from_float16(bits) : from_bfloat16(bits);
}

__device__ inline void store(void* base, int64_t i, Dtype dtype, float value) {
  if (dtype == Dtype::kFloat32) {
    static_cast<float*>(base)[i] = value;
  } else {
    static_cast<uint16_t*>(base)[i] =
        dtype == Dtype::kFloat16 ? to_float16(value) : to_bfloat16(value);
  }
}

__device__ inline float activate(Cell cell, float x) {
  if (cell == Cell::kTanh) return tanhf(x);
  if (cell == Cell::kSigmoid) return 1.0f / (1.0f + expf(-x));
  return x < 0.0f ? 0.0f : x;  // this way round a NaN stays
}

// g * act'(sum inside act), from y = act(that sum).
__device__ inline float activate_backward(Cell cell, float g, float y) {
  if (cell == Cell::kTanh) return g * (1.0f - y * y);
  if (cell == Cell::kSigmoid) return g * (y * (1.0f - y));
  return y <= 0.0f ? 0.0f : g;
}

__device__ inline int64_t length_of(const int64_t* lengths, int64_t b, int64_t T) {
  return lengths != nullptr ? lengths[b] : T;
}

}  // namespace charrnn_fast::cuda
