// What the tests of kernels are made of: counting failures, a device's memory, comparing.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <string>
#include <vector>

#include "../../csrc/cuda/compat.cuh"
#include "../../csrc/cuda/rnn_cuda.h"

namespace charrnn_fast::cuda {

inline int failures = 0;
inline int64_t checks = 0;

inline void fail(const std::string& what) {
  ++failures;
  if (failures <= 40) std::printf("FAIL %s\n", what.c_str());
}

// A device's memory: guarded on both sides, and NaN until written.
class Memory {
 public:
  Memory() = default;
  Memory(size_t elements, Dtype dtype) : dtype_(dtype), elements_(elements) {
    bytes_.assign(size() + 2 * kMargin, static_cast<char>(0xff));
  }
  size_t size() const { return elements_ * (dtype_ == Dtype::kFloat32 ? 4 : 2); }
  void* data() { return bytes_.empty() ? nullptr : bytes_.data() + kMargin; }
  double get(size_t i) const {
    const char* at = bytes_.data() + kMargin;
    if (dtype_ == Dtype::kFloat32) return reinterpret_cast<const float*>(at)[i];
    const uint16_t bits = reinterpret_cast<const uint16_t*>(at)[i];
    return dtype_ == Dtype::kFloat16 ? from_float16(bits) : from_bfloat16(bits);
  }
  void set(size_t i, double value) {
    char* at = bytes_.data() + kMargin;
    if (dtype_ == Dtype::kFloat32) {
      reinterpret_cast<float*>(at)[i] = static_cast<float>(value);
    } else {
      reinterpret_cast<uint16_t*>(at)[i] = dtype_ == Dtype::kFloat16
                                               ? to_float16(static_cast<float>(value))
                                               : to_bfloat16(static_cast<float>(value));
    }
  }
  bool intact() const {
    const auto touched = [](char c) { return c != static_cast<char>(0xff); };
    return std::none_of(bytes_.begin(), bytes_.begin() + kMargin, touched) &&
           std::none_of(bytes_.end() - kMargin, bytes_.end(), touched);
  }

 private:
  static constexpr size_t kMargin = 256;
  Dtype dtype_ = Dtype::kFloat32;
  size_t elements_ = 0;
  std::vector<char> bytes_;
};

inline const char* const kDtypes[] = {"float32", "float16", "bfloat16"};

// The greatest error in units of 2^-bits of a tensor's greatest value; NaN and untouched guards are
// failures.
inline void compare(const std::string& where, const char* name, const Memory& found,
                    const std::vector<double>& expected, double tolerance) {
  ++checks;
  double scale = 1, worst = 0;
  size_t at = 0;
  for (double value : expected) scale = std::max(scale, std::abs(value));
  for (size_t i = 0; i < expected.size(); ++i) {
    const double error = std::abs(found.get(i) - expected[i]);
    if (!(error <= worst)) {  // a NaN is the worst
      worst = error;
      at = i;
      if (std::isnan(worst)) break;
    }
  }
  if (!(worst <= tolerance * scale)) {
    fail(where + ": " + name + "[" + std::to_string(at) + "] is " + std::to_string(found.get(at)) +
         ", not " + std::to_string(expected[at]));
  }
  if (!found.intact()) fail(where + ": a store outside " + name);
}

// Runs a body in several orders of threads.
inline void in_every_order(const std::function<void()>& body, bool quick) {
  using emulator::Order;
  for (Order order : {Order::kForward, Order::kReverse, Order::kRandom, Order::kUneven}) {
    if (quick && (order == Order::kForward || order == Order::kReverse)) continue;
    emulator::settings.order = order;
    ++emulator::settings.seed;
    body();
  }
  emulator::settings.order = Order::kForward;
}

// Of the recurrence only this tile; -1: all.
inline int wanted_tile = -1;

// Groups of checks, each in a file of its own.
void block_parity(bool quick);
void grid_parity(bool quick);
void step_parity();
void token_parity();
void generate_parity(bool quick);
// Generation to which some fault was done: fails if its results show it.
void generate_once();
void plans(bool print);
void rooflines();

}  // namespace charrnn_fast::cuda
