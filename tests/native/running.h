// Runs a call as one thread, whose floating-point modes and exceptions are looked at, or as a team.
#pragma once

#include <fenv.h>
#include <pthread.h>

#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "case.h"
#include "kernels/rnn.h"

namespace charrnn_fast::native {

inline void wait_at(void* state) { pthread_barrier_wait(static_cast<pthread_barrier_t*>(state)); }

// What a call may not change: rounding, flushing of denormals, which exceptions trap.
inline unsigned modes() {
#if defined(__x86_64__)
  return _mm_getcsr() & ~0x3fu;
#else
  return static_cast<unsigned>(fegetround());
#endif
}

template <typename Call>
void run_alone(const Call& call) {
  const unsigned before = modes();
  feclearexcept(FE_ALL_EXCEPT);
  call(Team{0, 1, nullptr, nullptr});
  if (modes() != before) fail("the modes of floating-point arithmetic were changed");
  if (fetestexcept(FE_INVALID | FE_DIVBYZERO | FE_OVERFLOW)) {
    fail("a floating-point exception was raised by sound input");
  }
}

template <typename Call>
void run_team(int size, const Call& call) {
  if (size == 1) return run_alone(call);
  pthread_barrier_t barrier;
  pthread_barrier_init(&barrier, nullptr, static_cast<unsigned>(size));
  std::vector<std::thread> members;
  for (int rank = 0; rank < size; ++rank)
    members.emplace_back([&, rank] { call(Team{rank, size, wait_at, &barrier}); });
  for (auto& member : members) member.join();
  pthread_barrier_destroy(&barrier);
}

}  // namespace charrnn_fast::native
