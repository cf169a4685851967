// Contexts of execution that take turns on one operating-system thread, and what the sanitizers
// have to know of them.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdio>
#include <cstdlib>

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulator {

// The emulator's own memory is shared by fibers without any order that CUDA promises:
// ThreadSanitizer is not to look at it within such a scope. Whoever switches to another context is
// within exactly one, which the switch suspends: nobody is away, or gone for ever, with one open.
#if defined(__SANITIZE_THREAD__)
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
struct Unobserved {
  static void begin() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  static void end() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
  Unobserved() { begin(); }
  ~Unobserved() { end(); }
};
// Edges of happens-before, where CUDA promises one.
inline void release(void* at) { __tsan_release(at); }
inline void acquire(void* at) { __tsan_acquire(at); }
#define CHARRNN_FAST_NO_TSAN __attribute__((no_sanitize_thread, noinline))
#else
struct Unobserved {
  Unobserved() {}
};
inline void release(void*) {}
inline void acquire(void*) {}
#define CHARRNN_FAST_NO_TSAN
#endif

#if defined(__x86_64__)
// Saves the registers a callee must keep.
extern "C" void charrnn_fast_switch(void** from, void* to);
asm(R"(
.text
.weak charrnn_fast_switch
.type charrnn_fast_switch,@function
charrnn_fast_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size charrnn_fast_switch,.-charrnn_fast_switch
)");
#endif

class Context {
 public:
  // The one that is running.
  Context() {
#if defined(__SANITIZE_THREAD__)
    tsan_ = __tsan_get_current_fiber();
#endif
  }

  // One that will begin at `entry`, which must not return, on a stack of its own. The page below
  // the stack may not be touched.
  explicit Context(void (*entry)()) : size_(kStack) {
    void* memory = mmap(nullptr, kStack + kGuard, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
      std::perror("emulator: no memory for a stack");
      std::abort();
    }
    mprotect(memory, kGuard, PROT_NONE);
    bottom_ = stack_ = static_cast<char*>(memory) + kGuard;
#if defined(__SANITIZE_THREAD__)
    tsan_ = __tsan_create_fiber(0);
#endif
#if defined(__x86_64__)
    // As if entry had been called from nowhere: aligned, and six registers to pop before it.
    void** top = reinterpret_cast<void**>(stack_ + kStack - 64);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    saved_ = top;
#else
    getcontext(&saved_);
    saved_.uc_stack.ss_sp = stack_;
    saved_.uc_stack.ss_size = kStack;
    makecontext(&saved_, entry, 0);
#endif
  }

  ~Context() {
    if (stack_ == nullptr) return;
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack_, kStack);
#endif
#if defined(__SANITIZE_THREAD__)
    __tsan_destroy_fiber(tsan_);
#endif
    munmap(stack_ - kGuard, kStack + kGuard);
  }

  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

  // The first thing that an entry calls, with the context that it was begun from.
  static void entered(Context& from) {
#if defined(__SANITIZE_ADDRESS__)
    // The stack of the one that began it all is learnt here.
    __sanitizer_finish_switch_fiber(nullptr, &from.bottom_, &from.size_);
#else
    (void)from;
#endif
  }

  // Leaves this context, which is the one that runs, until somebody switches to it.
  CHARRNN_FAST_NO_TSAN void switch_to(Context& to) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&fake_stack_, to.bottom_, to.size_);
#endif
#if defined(__SANITIZE_THREAD__)
    Unobserved::end();
    __tsan_switch_to_fiber(to.tsan_, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__x86_64__)
    charrnn_fast_switch(&saved_, to.saved_);
#else
    swapcontext(&saved_, &to.saved_);
#endif
#if defined(__SANITIZE_THREAD__)
    Unobserved::begin();
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack_, nullptr, nullptr);
#endif
  }

 private:
  static constexpr size_t kStack = 64 * 1024, kGuard = 4096;
#if defined(__x86_64__)
  void* saved_ = nullptr;  // the stack pointer
#else
  ucontext_t saved_;
#endif
  char* stack_ = nullptr;
  const void* bottom_ = nullptr;
  size_t size_ = 0;
#if defined(__SANITIZE_THREAD__)
  void* tsan_ = nullptr;
#endif
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack_ = nullptr;
#endif
};

}  // namespace emulator
