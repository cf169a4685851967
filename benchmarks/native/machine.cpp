// What this core can do at best: register-only FMA loops, reads from L2, and its clock.
// Built for the machine it runs on (-march=native); nothing here is shipped.
#include <sched.h>

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <thread>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif
typedef float Vector __attribute__((vector_size(kBytes), aligned(kBytes)));
constexpr int kLanes = kBytes / sizeof(float);
// Enough independent chains to cover the latency of two FMA pipes, few enough to stay in registers.
constexpr int kChains = 12;

// Makes a value unknown to the compiler, so that a loop over it is not computed beforehand.
template <typename T>
void hide(T* value) {
  asm volatile("" : "+m"(*value));
}

// Starts each chain from a value of its own as far as the compiler knows: equal chains are computed
// once.
template <typename T, int n>
void start(T (&chains)[n]) {
#pragma GCC unroll 16
  for (int c = 0; c < n; ++c) {
    T zero = {};
    hide(&zero);
    chains[c] = zero;
  }
}

// Calls work(i) in a thread of its own on each of two CPUs, i being 0 and 1, at the same time.
template <typename Work>
void on_two(int32_t first_cpu, int32_t second_cpu, const Work& work) {
  std::atomic<int> ready{0};
  const auto run = [&](int i, int cpu) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    sched_setaffinity(0, sizeof(set), &set);
    // The other one may have been started on this very CPU.
    for (++ready; ready < 2;) std::this_thread::yield();
    work(i);
  };
  std::thread a(run, 0, first_cpu), b(run, 1, second_cpu);
  a.join();
  b.join();
}

// Makes the chains count as used. Only their total has an address, so that they stay in registers.
template <typename T, int n>
void keep(const T (&chains)[n]) {
  T total = chains[0];
#pragma GCC unroll 16
  for (int c = 1; c < n; ++c) total += chains[c];
  hide(&total);
}

}  // namespace

extern "C" {

// Runs `rounds` rounds of independent fp32 FMAs; returns the operations done (an FMA counts two).
double fma_loop(int64_t rounds) {
  Vector a = {}, b = {}, sum[kChains];
  hide(&a);
  hide(&b);
  start(sum);
  for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 16
    for (int c = 0; c < kChains; ++c) sum[c] = a * b + sum[c];
  }
  keep(sum);
  return 2.0 * kLanes * kChains * static_cast<double>(rounds);
}

// The same with bf16 pairs accumulated in fp32; 0 where the CPU has no such instruction.
double bf16_loop(int64_t rounds) {
#if defined(__AVX512BF16__)
  __m512bh a, b;
  std::memset(&a, 0, sizeof(a));
  std::memset(&b, 0, sizeof(b));
  __m512 sum[kChains];
  hide(&a);
  hide(&b);
  start(sum);
  for (int64_t r = 0; r < rounds; ++r) {
#pragma GCC unroll 16
    for (int c = 0; c < kChains; ++c) sum[c] = _mm512_dpbf16_ps(sum[c], a, b);
  }
  keep(sum);
  return 2.0 * 32 * kChains * static_cast<double>(rounds);
#else
  (void)rounds;
  return 0.0;
#endif
}

// fma_loop on two CPUs at once, half of the rounds on each; returns the operations of both.
double fma_loop_on_two(int32_t first_cpu, int32_t second_cpu, int64_t rounds) {
  double operations[2];
  on_two(first_cpu, second_cpu, [&](int i) { operations[i] = fma_loop(rounds / 2); });
  return operations[0] + operations[1];
}

// Reads `bytes` of `data` (a multiple of 8 vectors) `rounds` times; returns the bytes read. With
// `in_turns` there and back, as a program that must read all of it each time may: what was read
// last is still in L1 then.
double read_loop(const float* data, int64_t bytes, int64_t rounds, int32_t in_turns) {
  const Vector* p = reinterpret_cast<const Vector*>(data);
  const int64_t n = bytes / kBytes / 8 * 8;
  Vector sum[8];
  start(sum);
  for (int64_t r = 0; r < rounds; ++r) {
    const bool back = in_turns && r % 2 != 0;
    const Vector* block = back ? p + n - 8 : p;
    const int64_t step = back ? -8 : 8;
    for (int64_t i = 0; i < n; i += 8, block += step) {
#pragma GCC unroll 8
      for (int c = 0; c < 8; ++c) sum[c] += block[c];
    }
    asm volatile("" ::: "memory");
  }
  keep(sum);
  return static_cast<double>(n) * kBytes * static_cast<double>(rounds);
}

// A chain of integer operations, one a cycle: returns the cycles it takes. Additions alone will not
// do: there are cores that take a constant's to the register renamer, where many are one. Neither
// operand here is a constant, and no addition passes an exclusive or.
double cycle_loop(int64_t cycles) {
  int64_t x = 0, a = 0x9E3779B97F4A7C15, b = 0x2545F4914F6CDD1D;
  asm volatile("" : "+r"(a), "+r"(b));
  for (int64_t i = 0; i < cycles; i += 32) {
// The empty asm keeps the compiler from merging what follows each other.
#define TWO                   \
  x += a;                     \
  asm volatile("" : "+r"(x)); \
  x ^= b;                     \
  asm volatile("" : "+r"(x));
    TWO TWO TWO TWO TWO TWO TWO TWO TWO TWO TWO TWO TWO TWO TWO TWO
#undef TWO
  }
  return static_cast<double>((cycles + 31) / 32 * 32);
}

// Share of the time that two spinning threads, on the CPUs given, do not get: with nothing else
// running, what a hypervisor keeps from a virtual machine whose cores are all busy.
double lost_share(int32_t first_cpu, int32_t second_cpu, double seconds) {
  double shares[2];
  on_two(first_cpu, second_cpu, [&](int i) {
    using Clock = std::chrono::steady_clock;
    const auto begin = Clock::now();
    std::chrono::duration<double> gaps{}, passed{};
    for (auto last = begin; passed.count() < seconds;) {
      const auto now = Clock::now();
      if (now - last > std::chrono::microseconds(50)) gaps += now - last;
      last = now;
      passed = now - begin;
    }
    shares[i] = gaps.count() / passed.count();
  });
  return shares[0] > shares[1] ? shares[0] : shares[1];
}

}  // extern "C"
