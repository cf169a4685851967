// What a buffer holds against what it should: numbers within a tolerance, or the same bits.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "buffers.h"
#include "case.h"
#include "dtypes.h"

namespace charrnn_fast::native {

// `largest` is the least size by which errors are judged.
template <typename scalar>
void expect_close(const char* name, Array<scalar>& got, const std::vector<double>& want,
                  double largest = 1) {
  for (double value : want) largest = std::max(largest, std::isnan(value) ? 0 : std::abs(value));
  const double tolerance = kTolerance<scalar> * largest;
  for (int64_t i = 0; i < got.rows; ++i) {
    for (int64_t j = 0; j < got.columns(i); ++j) {
      const double value = number(got.at(i, j));
      const double expected = j < got.width ? want[i * got.width + j] : NAN;  // NAN: not theirs
      if (std::isnan(expected) ? !std::isnan(value) : !(std::abs(value - expected) <= tolerance)) {
        char text[200];
        std::snprintf(text, sizeof text, "%s[%ld,%ld] is %.9g, expected %.9g", name,
                      static_cast<long>(i), static_cast<long>(j), value, expected);
        fail(text);
      }
    }
  }
}

template <typename scalar>
void expect_same_bits(const char* name, const std::unique_ptr<Array<scalar>>& a,
                      const std::unique_ptr<Array<scalar>>& b) {
  for (int64_t i = 0; a && i < a->rows; ++i) {
    const size_t bytes = static_cast<size_t>(a->columns(i)) * sizeof(scalar);
    if (std::memcmp(&a->at(i, 0), &b->at(i, 0), bytes) != 0)
      fail(std::string(name) + " differs in bits from the result of one thread");
  }
}

}  // namespace charrnn_fast::native
