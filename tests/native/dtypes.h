// The dtypes: what they are called, how close their results come, and their numbers as double.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels/rnn.h"

namespace charrnn_fast::native {

template <typename scalar>
inline constexpr const char* kName = "float";
template <>
inline constexpr const char* kName<double> = "double";
template <>
inline constexpr const char* kName<bfloat16> = "bfloat16";

template <typename scalar>
inline constexpr double kTolerance = 1e-4;
template <>
inline constexpr double kTolerance<double> = 1e-11;
// Eight times its rounding: of each state and delta.
template <>
inline constexpr double kTolerance<bfloat16> = 0x1p-5;

inline double number(double value) { return value; }
inline double number(bfloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

template <typename T>
T made(double value) {
  return static_cast<T>(value);
}
template <>
inline bfloat16 made<bfloat16>(double value) {  // cut off, which will do for random numbers
  const float single = static_cast<float>(value);
  uint32_t bits;
  std::memcpy(&bits, &single, sizeof(bits));
  return {static_cast<uint16_t>(bits >> 16)};
}

}  // namespace charrnn_fast::native
