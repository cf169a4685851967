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

// Memory for the length of one call, from the beginning of a page. A thread keeps the largest block
// of moderate size that its calls needed: fresh memory comes from the system page by page, which
// took up to two fifths of the time of a training step.
//
// Large blocks ask for huge pages, as far as they fill them: every step of a sequence reads all of
// W_hh, and cores have translations of small pages for about 8 MB at hand.
class Scratch {
 public:
  explicit Scratch(size_t bytes) {
    if (bytes <= kept.bytes) {
      std::swap(block_, kept);
      return;
    }
    const size_t page = bytes < kLarge ? kPage : kHugePage;
    block_.memory.reset(c10::alloc_cpu(bytes + page));  // throws what at::empty throws
    const auto address = reinterpret_cast<uintptr_t>(block_.memory.get());
    block_.data = reinterpret_cast<std::byte*>(round_up(address, page));
    block_.bytes = bytes;
#ifdef MADV_HUGEPAGE  // advice: where the system does not take it, nothing is lost
    if (page == kHugePage) madvise(block_.data, bytes / kHugePage * kHugePage, MADV_HUGEPAGE);
#endif
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() {
    if (kept.bytes < block_.bytes && block_.bytes <= kKeptBytes) std::swap(block_, kept);
  }

  std::byte* data() const { return block_.data; }

 private:
  static constexpr size_t kKeptBytes = size_t{32} << 20;
  static constexpr size_t kLarge = size_t{8} << 20;
  static constexpr size_t kHugePage = size_t{2} << 20;

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

// Memory of results. Small blocks are malloc's, which keeps those that a thread frees for the next
// call; for aligned ones, as torch's allocator wants all of them, it searches anew each time.
class ResultAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
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
