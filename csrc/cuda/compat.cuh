// Everything of CUDA that the kernels use beyond plain C++, in one place: launches, barriers,
// shuffles, loads that bypass L1, conversions in PTX. A compiler that is not nvcc takes the same
// names from emulator.h, which is part of the tests and runs the kernels on a CPU.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__

#include <cuda_runtime.h>

namespace charrnn_fast::cuda {

__device__ inline char* dynamic_shared() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

__device__ inline void block_barrier() { __syncthreads(); }

// All 32 lanes of the warp must take part.
__device__ inline float shuffle_xor(float value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
__device__ inline int shuffle_xor(int value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// What other blocks have written lies in L2; a line in L1 may be older.
__device__ inline float load_l2(const float* p) { return __ldcg(p); }
__device__ inline float4 load_l2(const float4* p) { return __ldcg(p); }

// A counter in global memory that blocks wait on.
__device__ inline void arrive(unsigned* counter) {
  __threadfence();
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}
__device__ inline unsigned arrivals(const unsigned* counter) {
  unsigned count;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(count) : "l"(counter) : "memory");
  return count;
}
__device__ inline void pause() { __nanosleep(20); }

__device__ inline float from_float16(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}
__device__ inline uint16_t to_float16(float value) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

// Two numbers of 16 bits, the lower first. Volatile, or the compiler would unpack all weights
// before the loop over steps, in twice the registers.
__device__ inline float2 unpack_float16(unsigned bits) {
  float2 two;
  asm volatile(
      "{.reg .b16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high;}"
      : "=f"(two.x), "=f"(two.y)
      : "r"(bits));
  return two;
}
__device__ inline float2 unpack_bfloat16(unsigned bits) {
  float2 two;
  asm volatile(
      "{.reg .b32 low, high; shl.b32 low, %2, 16; and.b32 high, %2, 0xffff0000;"
      " mov.b32 %0, low; mov.b32 %1, high;}"
      : "=f"(two.x), "=f"(two.y)
      : "r"(bits));
  return two;
}

__device__ inline unsigned bits_of(float value) { return __float_as_uint(value); }
__device__ inline float float_of(unsigned bits) { return __uint_as_float(bits); }

// Kernels take one struct by value. Returns null or the error's text.
template <typename Args>
const char* launch(void (*kernel)(Args), dim3 grid, int threads, int shared_bytes, bool cooperative,
                   void* stream, Args args) {
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) {
      (void)cudaGetLastError();  // else the next call of anyone would report it
      return cudaGetErrorString(error);
    }
  }
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeCooperative;
  attribute.val.cooperative = cooperative ? 1 : 0;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = cooperative ? 1 : 0;
  void* params[] = {&args};
  const cudaError_t error =
      cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), params);
  if (error == cudaSuccess) return nullptr;
  (void)cudaGetLastError();
  return cudaGetErrorString(error);
}

}  // namespace charrnn_fast::cuda

#else
#include "emulator.h"
#endif

namespace charrnn_fast::cuda {

// Waits until `target` blocks have arrived since the counter was zero; the difference may wrap
// around.
__device__ inline void grid_wait(unsigned* counter, unsigned target) {
  if (threadIdx.x == 0) {
    arrive(counter);
    while (static_cast<int>(arrivals(counter) - target) < 0) pause();
  }
}

__device__ inline float from_bfloat16(uint16_t bits) {
  return float_of(static_cast<unsigned>(bits) << 16);
}

// To the nearest, ties to even; NaN stays NaN.
__device__ inline uint16_t to_bfloat16(float value) {
  const unsigned bits = bits_of(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

}  // namespace charrnn_fast::cuda
