// The division of a call among threads: teams that meet at barriers.
#pragma once

#include <omp.h>
#include <sched.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <vector>

#include "layer.h"

namespace charrnn_fast {

// Members wait here for each other by spinning, since a step may last less than a microsecond; they
// offer the core to others when the wait is long, as it is when another program holds a core.
//
// Each has a line of cache of its own that only it writes, so that one transfer between two cores
// is all that a meeting takes.
class Barrier {
 public:
  explicit Barrier(int size) : members_(size) {
    for (Member& member : members_) member.all = &members_;
  }

  void* member(int rank) { return &members_[rank]; }
  static void wait(void* member) { static_cast<Member*>(member)->wait(); }

 private:
  struct alignas(128) Member {  // two lines: the one beside a line may be fetched with it
    std::atomic<int64_t> arrivals{0};
    const std::vector<Member>* all = nullptr;

    void wait() {
      const int64_t now = arrivals.load(std::memory_order_relaxed) + 1;
      arrivals.store(now, std::memory_order_release);
      for (const Member& other : *all) {
        for (int spins = 0; other.arrivals.load(std::memory_order_acquire) < now;) {
          if (++spins < kSpins) {
#if defined(__x86_64__)
            __builtin_ia32_pause();
#endif
          } else {
            sched_yield();
          }
        }
      }
    }
  };

  static constexpr int kSpins = 1000;
  std::vector<Member> members_;
};

// Runs call(direction, team) for each direction, in teams of plan.members, both at once where
// plan.at_once says so.
template <typename Call>
void run_teams(int64_t directions, const Plan& plan, const Call& call) {
  const int members = plan.members;
  const auto run = [&](int64_t first, int64_t last) {
    const int size = static_cast<int>(last - first) * members;
    if (size == 1) return call(first, Team{0, 1, nullptr, nullptr});
    std::array<Barrier, 2> barriers{Barrier(members), Barrier(members)};
    bool complete = true;
#pragma omp parallel num_threads(size)
    {
      // OpenMP may give fewer threads than asked for; then one does everything.
      const int rank = omp_get_thread_num();
      if (omp_get_num_threads() == size) {
        const int64_t direction = rank / members;
        call(first + direction, Team{rank % members, members, Barrier::wait,
                                     barriers[direction].member(rank % members)});
      } else if (rank == 0) {
        complete = false;
      }
    }
    if (complete) return;
    for (int64_t d = first; d < last; ++d) call(d, Team{0, 1, nullptr, nullptr});
  };
  if (plan.at_once) return run(0, directions);
  for (int64_t d = 0; d < directions; ++d) run(d, d + 1);
}

}  // namespace charrnn_fast
