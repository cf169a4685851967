// The case being run: its random numbers, its description, and what is said when it fails.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>

namespace charrnn_fast::native {

inline std::mt19937_64 generator;
inline std::string current;  // what is being run, for messages

[[noreturn]] inline void fail(const std::string& what) {
  std::fprintf(stderr, "FAILED: %s\n  in %s\n", what.c_str(), current.c_str());
  std::exit(1);
}

inline int64_t below(int64_t n) {
  return static_cast<int64_t>(generator() % static_cast<uint64_t>(n));
}
inline bool coin() { return below(2) == 1; }
inline int64_t random_size(int64_t small, int64_t large) {
  return 1 + below(below(8) ? small : large);
}

}  // namespace charrnn_fast::native
