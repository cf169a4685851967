// Buffers between inaccessible pages: raw memory, and rows of elements with gaps.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "case.h"
#include "dtypes.h"

namespace charrnn_fast::native {

inline int overrun = -1;  // the buffer to read past, to see that it is noticed

// Memory with an inaccessible page at one end. Buffers that end at it start at any multiple of the
// element size, as views into tensors may.
class Guarded {
 public:
  Guarded(size_t bytes, bool at_end, size_t alignment = 1) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t body = (bytes + page - 1) / page * page + page;
    size_ = body + 2 * page;
    base_ = static_cast<char*>(mmap(nullptr, size_, PROT_READ | PROT_WRITE,
                                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (base_ == MAP_FAILED) fail("mmap");
    mprotect(base_, page, PROT_NONE);
    mprotect(base_ + page + body, page, PROT_NONE);
    const size_t padded = (bytes + alignment - 1) / alignment * alignment;
    data = at_end ? base_ + page + body - padded : base_ + page;
  }
  ~Guarded() { munmap(base_, size_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  char* data;

 private:
  char* base_;
  size_t size_;
};

// `rows` rows of `width` elements, ld apart; the last row ends where the buffer ends. Of gaps
// longer than a page only the beginning is filled and looked at.
template <typename T>
struct Array {
  Array(int64_t rows, int64_t width, int64_t ld, bool at_end)
      : rows(rows),
        width(width),
        ld(ld),
        size(rows > 0 ? (rows - 1) * ld + width : 0),
        memory(static_cast<size_t>(size) * sizeof(T), at_end),
        data(reinterpret_cast<T*>(memory.data)) {}
  T& at(int64_t row, int64_t column) { return data[row * ld + column]; }
  // Elements of a row, and of the gap after it, to fill and look at.
  int64_t columns(int64_t row) const {
    return row == rows - 1 ? width : std::min<int64_t>(ld, width + 1024);
  }
  void fill(T value) {
    for (int64_t row = 0; row < rows; ++row) std::fill_n(&at(row, 0), columns(row), value);
  }
  const char* end() const { return reinterpret_cast<const char*>(data + size); }

  int64_t rows, width, ld, size;
  Guarded memory;
  T* data;
};

template <typename T>
std::unique_ptr<Array<T>> array(int64_t rows, int64_t width, int64_t gap = 0) {
  return std::make_unique<Array<T>>(rows, width, width + gap, overrun >= 0 || below(4) != 0);
}

template <typename T>
std::unique_ptr<Array<T>> randoms(int64_t rows, int64_t width, double scale, int64_t gap = 0) {
  auto a = array<T>(rows, width, gap);
  a->fill(made<T>(NAN));  // in the gaps
  std::normal_distribution<double> normal(0.0, scale);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < width; ++j) a->at(i, j) = made<T>(normal(generator));
  return a;
}

template <typename T>
T* pointer(const std::unique_ptr<Array<T>>& a) {
  return a ? a->data : nullptr;
}

inline std::unique_ptr<Array<int64_t>> copied(const std::vector<int64_t>& values) {
  auto a = array<int64_t>(1, static_cast<int64_t>(values.size()));
  std::copy(values.begin(), values.end(), a->data);
  return a;
}

// Stands for a kernel that reads past the end of one buffer.
inline void read_past(const std::vector<const char*>& ends) {
  if (overrun >= static_cast<int>(ends.size())) std::exit(2);
  std::printf("read %d\n", *static_cast<const volatile char*>(ends[overrun]));
}

}  // namespace charrnn_fast::native
