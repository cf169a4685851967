// The threads that there are, and what runs on them.
#include "teams.h"

#include <ATen/Parallel.h>
#include <dlfcn.h>
#include <omp.h>
#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <climits>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <mutex>
#include <optional>
#include <sstream>
#include <thread>

namespace charrnn_fast {

namespace {

// A thread that starts parallel regions for another one, from a pool of its own.
class Leader {
 public:
  Leader() {
    std::thread([this] { serve(); }).detach();
  }

  void run(c10::function_ref<void()> work) {
    std::unique_lock lock(mutex_);
    work_.emplace(work);
    changed_.notify_all();
    changed_.wait(lock, [this] { return !work_.has_value(); });
  }

 private:
  void serve() {
    std::unique_lock lock(mutex_);
    for (;;) {
      changed_.wait(lock, [this] { return work_.has_value(); });
      (*work_)();
      work_.reset();
      changed_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::optional<c10::function_ref<void()>> work_;
};

// Of the thread that called fork(), in the child. A leader lives as long as the process, as nothing
// tells it that its thread has ended; one that is forked again leaves it behind.
thread_local bool pool_is_lost = false;
thread_local Leader* leader = nullptr;
// What SurvivesFork has set aside; 0: at::get_num_threads() is right.
thread_local int threads_aside = 0;

[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] {
  pool_is_lost = true;
  leader = nullptr;
});

// omp_set_num_threads of the runtime that ATen uses, which is not ours where another compiler built
// torch: g++ and clang bring one each. Looked up before there is any fork, as dlopen takes a lock.
void (*const set_threads_of_aten)(int) = [] {
  Dl_info torch{};
  void* library = dladdr(reinterpret_cast<void*>(&at::get_num_threads), &torch) != 0
                      ? dlopen(torch.dli_fname, RTLD_NOLOAD | RTLD_LAZY)
                      : nullptr;
  void* found = library != nullptr ? dlsym(library, "omp_set_num_threads") : nullptr;
  return found != nullptr ? reinterpret_cast<void (*)(int)>(found) : omp_set_num_threads;
}();

int torch_threads() { return threads_aside > 0 ? threads_aside : at::get_num_threads(); }

int mask_cpus() {
  cpu_set_t set;
  // Fails where there are more CPUs than fit into the set: no mask, then.
  return sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : INT_MAX;
}

// What torch answers before anybody has told it a number; 0 where the environment did.
const int default_threads = std::getenv("OMP_NUM_THREADS") != nullptr ? 0 : at::get_num_threads();

// A limit in a file of two numbers, CPU time and its period, or of the first, and the other.
int cpus_of(const std::string& first, const std::string& second = "") {
  std::string text;
  for (const std::string& path : {first, second}) {
    std::ifstream file(path);
    std::string line;
    if (std::getline(file, line)) text += line + " ";
  }
  std::istringstream numbers(text);
  double time = 0, period = 0;
  if (!(numbers >> time >> period) || time <= 0 || period <= 0) return 0;  // "max", -1, no file
  return std::max(1, static_cast<int>(std::min(1e6, (time + period - 1) / period)));
}

// "0-3,8,10-11" is 7 CPUs, of which those in `set` count.
int cpus_in_list(const std::string& list, const cpu_set_t& set) {
  std::istringstream ranges(list);
  int count = 0;
  for (std::string range; std::getline(ranges, range, ',');) {
    int first = 0, last = 0;
    const int read = std::sscanf(range.c_str(), "%d-%d", &first, &last);
    if (read < 1) continue;
    for (int cpu = first; cpu <= (read == 2 ? last : first) && cpu < CPU_SETSIZE; ++cpu) {
      count += CPU_ISSET(cpu, &set) ? 1 : 0;
    }
  }
  return count;
}

std::string first_line(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

// Of the largest NUMA node, among the CPUs that the process started with; no limit where all of
// them lie in one node.
int node_cores() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) != 0) return INT_MAX;
  int largest = 0, nodes = 0;
  for (int node = 0; node < 64; ++node) {
    const std::string folder = "/sys/devices/system/node/node" + std::to_string(node);
    const int cpus = cpus_in_list(first_line(folder + "/cpulist"), set);
    largest = std::max(largest, cpus);
    nodes += cpus > 0 ? 1 : 0;
  }
  if (nodes < 2) return INT_MAX;
  const bool two_a_core = first_line("/sys/devices/system/cpu/smt/active") == "1";
  return std::max(2, two_a_core ? largest / 2 : largest);
}

double l2_bytes() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  const long bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (bytes > 0) return static_cast<double>(bytes);
#endif
  return 1 << 20;
}

// Not worth waking a thread for less than some tens of microseconds.
constexpr double kLeastProducts = 1600000;

Plan make_plan(const Layer& layer, Pass pass) {
  const double rows = static_cast<double>(layer.N) / layer.T;
  const double gates = sizes_of(layer.cell).gates;
  const double step = gates * layer.H * (layer.H * std::max(rows, 2.0) + rows * layer.I);
  const double products = (pass == Pass::kForward ? 1 : 3) * layer.D * layer.T * step;
  // Neither the threads nor the machine are asked for, where one thread is enough.
  if (layer.N == 0 || products < kLeastProducts || at::in_parallel_region()) {
    return {1, Split::kBatch, false};
  }
  return cheapest_plan(layer, this_machine(), pass);
}

}  // namespace

int cgroup_cpus(const std::string& root, const std::string& membership) {
  int least = 0;
  const auto consider = [&](int cpus) {
    if (cpus > 0 && (least == 0 || cpus < least)) least = cpus;
  };
  std::ifstream file(membership);
  for (std::string line; std::getline(file, line);) {
    // "0::/path" of version 2, "4:cpu,cpuacct:/path" of version 1. A container may see its own
    // group as the root, so that the path leads nowhere: every folder above it is asked, too.
    const size_t name = line.find(':'), end = line.find(':', name + 1);
    if (name == std::string::npos || end == std::string::npos) continue;
    const std::string controllers = "," + line.substr(name + 1, end - name - 1) + ",";
    const bool second = controllers == ",,";
    if (!second && controllers.find(",cpu,") == std::string::npos) continue;
    std::string path = line.substr(end + 1);
    if (path.empty() || path[0] != '/') continue;
    for (bool top = false; !top;) {
      top = path.size() <= 1;
      const std::string folder = root + (second ? "" : "/cpu") + (top ? "" : path) + "/";
      consider(second ? cpus_of(folder + "cpu.max")
                      : cpus_of(folder + "cpu.cfs_quota_us", folder + "cpu.cfs_period_us"));
      path.resize(top ? 0 : path.find_last_of('/'));
    }
  }
  return least;
}

Machine this_machine() {
  static const int cores = node_cores();
  static const double l2 = l2_bytes();
  int threads = torch_threads();
  if (threads > 1 && threads == default_threads) {
    static const int limit = cgroup_cpus("/sys/fs/cgroup", "/proc/self/cgroup");
    if (limit > 0) threads = std::min(threads, limit);
    threads = std::min(threads, mask_cpus());
  }
  return {threads, cores, l2};
}

bool run_threads(int size, c10::function_ref<void(int)> body) {
  bool complete = true;
  // The runtime ends the threads that a smaller team leaves over, and starts them anew for the next
  // region of torch: all of them take part, and those that have no rank pass through.
  const int launched = std::max(size, torch_threads());
  const auto region = [&] {
#pragma omp parallel num_threads(launched)
    {
      // OpenMP may give fewer threads than asked for.
      const int rank = omp_get_thread_num();
      if (omp_get_num_threads() < size) {
        if (rank == 0) complete = false;
      } else if (rank < size) {
        body(rank);
      }
    }
  };
  if (pool_is_lost) {
    if (leader == nullptr) leader = new Leader;
    leader->run(region);
  } else {
    region();
  }
  return complete;
}

SurvivesFork::SurvivesFork() : before_(pool_is_lost ? at::get_num_threads() : 0) {
  if (before_ == 0) return;
  if (threads_aside == 0) threads_aside = before_;
  set_threads_of_aten(1);  // of this thread; what at::get_num_threads answers
}

SurvivesFork::~SurvivesFork() {
  if (before_ == 0) return;
  set_threads_of_aten(before_);
  if (before_ == threads_aside) threads_aside = 0;
}

bool crowded(int threads) { return threads > mask_cpus(); }

void Barrier::Member::await(int64_t round, int spins) const {
  for (int spun = 0; rounds.load(std::memory_order_acquire) < round;) {
    if (++spun < spins) {
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    } else {
      sched_yield();
    }
  }
}

int threads_for(double products) {
  if (products < kLeastProducts || at::in_parallel_region()) return 1;
  return static_cast<int>(std::min<double>(this_machine().threads, 1 + products / kLeastProducts));
}

Plan plan_forward(const Layer& layer) { return make_plan(layer, Pass::kForward); }
Plan plan_backward(const Layer& layer) { return make_plan(layer, Pass::kBackward); }

}  // namespace charrnn_fast
