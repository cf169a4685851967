// Memory of the ops on CPU tensors: what a call works in, and its results.
#pragma once

#include <ATen/EmptyTensor.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>
#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <optional>
#include <utility>

#include "kernels/rnn.h"

namespace charrnn_fast {

inline size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

// So that what follows in the same block begins a page.
inline size_t whole_pages(size_t bytes) { return round_up(bytes, kPage); }

// Blocks of so many bytes begin a huge page and ask for as many as they fill. Fresh memory comes
// from the system page by page: of small pages that took a tenth of the time of large layers. And
// every step of a sequence reads all of W_hh, where cores have translations of small pages for
// about 8 MB at hand. NumPy asks from the same size on.
inline constexpr size_t kLarge = size_t{4} << 20;
inline constexpr size_t kHugePage = size_t{2} << 20;

// Where a block begins in memory that has room for one unit more.
inline std::byte* first_page(void* memory, size_t bytes) {
  const size_t page = bytes < kLarge ? kPage : kHugePage;
  auto* const data =
      reinterpret_cast<std::byte*>(round_up(reinterpret_cast<uintptr_t>(memory), page));
#ifdef MADV_HUGEPAGE  // advice: where the system does not take it, nothing is lost
  if (page == kHugePage) madvise(data, bytes / kHugePage * kHugePage, MADV_HUGEPAGE);
#endif
  return data;
}

// Memory for the length of one call, from the beginning of a page. A thread keeps the largest block
// of moderate size that its calls needed: fresh memory took up to two fifths of the time of a
// training step.
class Scratch {
 public:
  explicit Scratch(size_t bytes) {
    if (bytes <= kept.bytes) {
      std::swap(block_, kept);
      return;
    }
    // Throws what at::empty throws.
    block_.memory.reset(c10::alloc_cpu(bytes + (bytes < kLarge ? kPage : kHugePage)));
    block_.data = first_page(block_.memory.get(), bytes);
    block_.bytes = bytes;
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() {
    if (kept.bytes < block_.bytes && block_.bytes <= kKeptBytes) std::swap(block_, kept);
  }

  std::byte* data() const { return block_.data; }

 private:
  static constexpr size_t kKeptBytes = size_t{32} << 20;

  // Plain memory: it is freed when its thread ends, when a tensor's allocator may be gone.
  struct Free {
    void operator()(void* memory) const { c10::free_cpu(memory); }
  };
  struct Block {
    std::unique_ptr<void, Free> memory;
    std::byte* data = nullptr;  // where its first page begins
    size_t bytes = 0;           // from there on
  };

  Block block_{};
  static thread_local Block kept;
};
inline thread_local Scratch::Block Scratch::kept;

// Memory of results, large blocks as above. Small ones are malloc's, which keeps those that a
// thread frees for the next call; for aligned ones, as torch's allocator wants all of them, it
// searches anew each time.
class ResultAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes >= kLarge) {
      void* const memory = c10::alloc_cpu(bytes + kHugePage);
      void* const large = first_page(memory, bytes);
      c10::profiledCPUMemoryReporter().New(memory, bytes);
      return {large, memory, release_large, at::kCPU};
    }
    void* data = bytes > 0 && bytes <= kSmall ? std::malloc(bytes) : nullptr;
    if (data == nullptr) return c10::GetCPUAllocator()->allocate(bytes);
    c10::profiledCPUMemoryReporter().New(data, bytes);
    return {data, data, release, at::kCPU};
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }

 private:
  static constexpr size_t kSmall = 4096;

  static void release_large(void* memory) {
    c10::profiledCPUMemoryReporter().Delete(memory);
    c10::free_cpu(memory);
  }
  static void release(void* data) {
    c10::profiledCPUMemoryReporter().Delete(data);
    std::free(data);
  }
};

// at::empty without the dispatcher.
inline at::Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype) {
  static ResultAllocator allocator;
  const c10::DispatchKeySet keys(c10::DispatchKey::CPU);
  return at::Tensor(at::detail::empty_generic(sizes, &allocator, keys, dtype, std::nullopt));
}

}  // namespace charrnn_fast
