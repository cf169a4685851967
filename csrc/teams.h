// The division of a call among threads: teams that meet at barriers.
#pragma once

#include <c10/util/FunctionRef.h>

#include <array>
#include <atomic>
#include <cstdint>
#include <string>
#include <vector>

#include "layer.h"
#include "thread_model.h"

namespace charrnn_fast {

// The threads that a call may use here and now: as many as torch uses, which OMP_NUM_THREADS and
// torch.set_num_threads say. Where neither does, no more than the CPUs of this thread's affinity
// mask and of the process's cgroup, which torch asks for once or not at all.
Machine this_machine();

// The CPUs that the cgroups of a process are allowed, rounded up; 0 where nothing limits them.
// `root` is where cgroups are mounted, `membership` a file like /proc/self/cgroup.
int cgroup_cpus(const std::string& root, const std::string& membership);

// Calls body(rank) for every rank below `size` at the same time, each on a thread of its own, and
// returns once all are done. False, and nothing was called, where there are not so many threads.
bool run_threads(int size, c10::function_ref<void(int)> body);

// The thread that called fork() has lost the threads of its OpenMP pool in the child, of which the
// runtime there knows nothing: the first parallel region would wait for them for ever. On such a
// thread run_threads hands the work to a thread that has a pool of its own. What ATen computes
// within our ops must stay on the thread itself: each op holds one of these while it runs.
class SurvivesFork {
 public:
  SurvivesFork();
  ~SurvivesFork();
  SurvivesFork(const SurvivesFork&) = delete;
  SurvivesFork& operator=(const SurvivesFork&) = delete;

 private:
  const int before_;  // the thread's number of threads; 0: there is nothing to restore
};

// Members wait here for each other by spinning, since a step may last less than a microsecond; they
// offer the core to others when the wait is long, as it is when another program holds a core, and
// at once where there are fewer cores than members.
//
// Each has a line of cache of its own that only it writes. In a round a member reads the lines of
// kFan - 1 others, who in the round before have heard of kFan members each: up to kFan members know
// of all others after one transfer between two cores, 64 after three.
class Barrier {
 public:
  Barrier(int size, bool crowded) : members_(size) {
    for (int rank = 0; rank < size; ++rank) {
      members_[rank].all = members_.data();
      members_[rank].rank = rank;
      members_[rank].size = size;
      members_[rank].spins = crowded ? 1 : kSpins;
    }
  }

  void* member(int rank) { return &members_[rank]; }
  static void wait(void* member) { static_cast<Member*>(member)->wait(); }

 private:
  static constexpr int kFan = 4;
  static constexpr int kSpins = 1000;

  struct alignas(128) Member {       // two lines: the one beside a line may be fetched with it
    std::atomic<int64_t> rounds{0};  // that it has entered, of all barriers
    const Member* all = nullptr;
    int rank = 0, size = 0, spins = 0;

    void wait() {
      int64_t round = rounds.load(std::memory_order_relaxed);
      for (int64_t distance = 1; distance < size; distance *= kFan) {
        rounds.store(++round, std::memory_order_release);
        for (int64_t i = 1; i < kFan && i * distance < size; ++i) {
          const int64_t other = rank - i * distance;
          all[other < 0 ? other + size : other].await(round, spins);
        }
      }
    }
    void await(int64_t round, int spins) const;
  };

  std::vector<Member> members_;
};

// Whether so many threads are more than the CPUs that this thread may run on.
bool crowded(int threads);

// Runs call(direction, team) for each direction, in teams of plan.members, both at once where
// plan.at_once says so.
template <typename Call>
void run_teams(int64_t directions, const Plan& plan, const Call& call) {
  const int members = plan.members;
  const auto run = [&](int64_t first, int64_t last) {
    const int size = static_cast<int>(last - first) * members;
    if (size == 1) return call(first, Team{0, 1, nullptr, nullptr});
    const bool yield = crowded(size);
    std::array<Barrier, 2> barriers{Barrier(members, yield), Barrier(members, yield)};
    const bool done = run_threads(size, [&](int rank) {
      const int64_t direction = rank / members;
      call(first + direction, Team{rank % members, members, Barrier::wait,
                                   barriers[direction].member(rank % members)});
    });
    if (done) return;
    for (int64_t d = first; d < last; ++d) call(d, Team{0, 1, nullptr, nullptr});
  };
  if (plan.at_once) return run(0, directions);
  for (int64_t d = 0; d < directions; ++d) run(d, d + 1);
}

}  // namespace charrnn_fast
