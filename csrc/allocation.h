// Memory of the ops on CPU tensors: what a call works in, and its results.
#pragma once

#include <ATen/EmptyTensor.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <optional>
#include <utility>

#include "kernels/rnn.h"

namespace charrnn_fast {

// So that what follows in the same block begins a page.
inline size_t whole_pages(size_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

// Memory for the length of one call, from the beginning of a page. A thread keeps the largest block
// of moderate size that its calls needed: fresh memory comes from the system page by page, which
// took up to two fifths of the time of a training step.
class Scratch {
 public:
  explicit Scratch(size_t bytes) {
    bytes += kPage;
    if (bytes <= kept.bytes) {
      std::swap(block_, kept);
    } else {
      block_.data.reset(c10::alloc_cpu(bytes));  // 64-byte aligned; throws what at::empty throws
      block_.bytes = bytes;
    }
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() {
    if (kept.bytes < block_.bytes && block_.bytes <= kKeptBytes) std::swap(block_, kept);
  }

  std::byte* data() const {
    const auto address = reinterpret_cast<uintptr_t>(block_.data.get());
    return reinterpret_cast<std::byte*>(whole_pages(address));
  }

 private:
  static constexpr size_t kKeptBytes = size_t{32} << 20;

  // Plain memory: it is freed when its thread ends, when a tensor's allocator may be gone.
  struct Free {
    void operator()(void* data) const { c10::free_cpu(data); }
  };
  struct Block {
    std::unique_ptr<void, Free> data;
    size_t bytes;
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
