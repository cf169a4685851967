// What kernels use of CUDA, for a compiler that is not nvcc: the names that compat.cuh would have,
// on a machine made of fibers.
#pragma once

#include "machine.h"

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

namespace emulator {

// A variable that has another value in every thread.
struct ThreadIndex {
  struct X {
    operator unsigned() const { return current->thread; }
  } x;
};
struct BlockIndex {
  struct X {
    operator unsigned() const { return current->block->index.x; }
  } x;
  struct Y {
    operator unsigned() const { return current->block->index.y; }
  } y;
};
struct GridDim {
  struct X {
    operator unsigned() const { return machine->grid.x; }
  } x;
};

}  // namespace emulator

inline const emulator::ThreadIndex threadIdx;
inline const emulator::BlockIndex blockIdx;
inline const emulator::GridDim gridDim;

namespace charrnn_fast::cuda {

inline char* dynamic_shared() { return emulator::current->block->shared; }

inline void block_barrier(int site = __builtin_LINE()) { emulator::block_barrier(site); }

inline unsigned bits_of(float value) { return __builtin_bit_cast(unsigned, value); }
inline float float_of(unsigned bits) { return __builtin_bit_cast(float, bits); }

inline float shuffle_xor(float value, int mask, int site = __builtin_LINE()) {
  return float_of(emulator::shuffle_xor(bits_of(value), mask, site));
}
inline int shuffle_xor(int value, int mask, int site = __builtin_LINE()) {
  return static_cast<int>(emulator::shuffle_xor(static_cast<uint32_t>(value), mask, site));
}

template <typename T>
T load_l2(const T* p) {
  return *p;
}

inline void arrive(unsigned* counter) {
  {
    emulator::Unobserved unobserved;
    emulator::machine->idle = 0;
  }
  __atomic_fetch_add(counter, 1u, __ATOMIC_RELEASE);
}
inline unsigned arrivals(const unsigned* counter) {
  // As if enough had arrived already.
  if (emulator::settings.skip_grid_barrier)
    return __atomic_load_n(counter, __ATOMIC_RELAXED) + (1u << 30);
  return __atomic_load_n(counter, __ATOMIC_ACQUIRE);
}
inline void pause() { emulator::pause(); }

inline float from_float16(uint16_t bits) {
  return static_cast<float>(__builtin_bit_cast(_Float16, bits));
}
inline uint16_t to_float16(float value) {
  return __builtin_bit_cast(uint16_t, static_cast<_Float16>(value));
}

inline float2 unpack_float16(unsigned bits) {
  return {from_float16(static_cast<uint16_t>(bits)),
          from_float16(static_cast<uint16_t>(bits >> 16))};
}
inline float2 unpack_bfloat16(unsigned bits) {
  return {float_of(bits << 16), float_of(bits & 0xffff0000u)};
}

template <typename Args>
const char* launch(void (*kernel)(Args), dim3 grid, int threads, int shared_bytes, bool cooperative,
                   void* /*stream*/, Args args) {
  if (emulator::settings.refuse_launch) return "invalid argument";
  if (cooperative && static_cast<int>(grid.x * grid.y) > emulator::settings.resident_blocks) {
    return "too many blocks in cooperative launch";
  }
  emulator::Unobserved unobserved;
  ++emulator::settings.launches;
  emulator::settings.cooperative_launches += cooperative;
  emulator::Launch(grid, threads, shared_bytes, [=] { kernel(args); }).run(cooperative);
  return nullptr;
}

}  // namespace charrnn_fast::cuda
