// Runs CUDA kernels on a CPU, for tests: each CUDA thread is a fiber, and all fibers of a block (of
// a whole grid, in a cooperative launch) take turns on one operating-system thread.
//
// A fiber runs until it waits: at a barrier of its block, at a shuffle of its warp, or in pause().
// Who goes next is chosen by Settings::order, so that code which lacks a barrier sees other
// interleavings than the obvious one. Dynamic shared memory begins as NaN, and so do its
// surroundings, which must stay so. ThreadSanitizer and AddressSanitizer are told of the fibers:
// the former sees a happens-before edge only where CUDA promises one (block barriers,
// arrive/arrivals, start and end of a launch), not at shuffles.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <iterator>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "fibers.h"

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
namespace emulator {

// kUneven: each warp has a random precedence and goes on as far as it can, before and after others;
// threads that spin look again at every turn, or (odd seeds) only when nobody else can go on.
enum class Order { kForward, kReverse, kRandom, kUneven };

// What a run is to look like, and what it found.
struct Settings {
  Order order = Order::kForward;
  unsigned seed = 1;
  int skip_site = 0;       // the barrier, shuffle or wait of this source line does nothing
  int shared_missing = 0;  // so many bytes less shared memory than the launch asks for
  bool skip_grid_barrier = false;
  bool refuse_launch = false;     // as when the device cannot
  int resident_blocks = 1 << 30;  // a cooperative launch of more fails, as on a device
  std::set<int> sites;            // source lines of the barriers that were met
  int64_t turns = 0;
  int64_t launches = 0;
  int64_t cooperative_launches = 0;
  std::string fault;  // the first fault found; empty: none
};
inline Settings settings;

inline void report(const std::string& fault) {
  if (settings.fault.empty()) settings.fault = fault;
}

// ---- Threads

struct Block;
enum class State { kReady, kAtBarrier, kAtShuffle, kDone };

inline void fiber_main();

// Runs one CUDA thread after the other.
struct Fiber {
  Context context{fiber_main};
  Block* block = nullptr;
  unsigned thread = 0;
  State state = State::kReady;
  int shuffles = 0;  // done so far
  bool spinning = false;
  unsigned precedence = 0;
};
inline Fiber* current = nullptr;

struct Warp {
  uint32_t slot[2][32];
  int arrived[2] = {0, 0};
};

struct Block {
  dim3 index;
  unsigned threads = 0;
  std::vector<Fiber*> fibers;
  std::vector<Warp> warps;
  char* shared = nullptr;
  int at_barrier = 0;
  int barrier_site = 0;
};

struct Machine {
  Context main;
  std::function<void()> kernel;
  dim3 grid;
  std::vector<Fiber*> ready;  // in the order in which they will run
  std::vector<Fiber*> later;
  std::mt19937 random;
  int64_t idle = 0;  // pauses since anything happened
};
inline Machine* machine = nullptr;

// Waits until it is this fiber's turn again.
inline void yield_from(Fiber* fiber) { fiber->context.switch_to(machine->main); }

inline void make_ready(Fiber* fiber) {
  fiber->state = State::kReady;
  machine->later.push_back(fiber);
}

inline void fiber_main() {
  Context::entered(machine->main);
  for (;;) {
    acquire(&machine->grid);
    machine->kernel();
    release(machine);
    Unobserved unobserved;
    current->state = State::kDone;
    machine->idle = 0;
    yield_from(current);
  }
}

// ---- What kernels call

inline bool skipped(int site) {
  settings.sites.insert(site);
  return settings.skip_site == site;
}

inline void block_barrier(int site) {
  Unobserved unobserved;
  if (skipped(site)) return;
  Fiber* self = current;
  Block* block = self->block;
  if (block->at_barrier > 0 && block->barrier_site != site) {
    report("threads of one block wait at different barriers, lines " +
           std::to_string(block->barrier_site) + " and " + std::to_string(site));
  }
  block->barrier_site = site;
  machine->idle = 0;
  release(block);
  if (++block->at_barrier == static_cast<int>(block->threads)) {
    block->at_barrier = 0;
    for (Fiber* fiber : block->fibers) {
      if (fiber != self) make_ready(fiber);
    }
    // Who arrives last has no precedence: it goes on when its turn comes.
    make_ready(self);
  } else {
    self->state = State::kAtBarrier;
  }
  yield_from(self);
  acquire(block);
}

// Slots alternate: one is written again only after all lanes have arrived at the shuffle in
// between.
inline uint32_t shuffle_xor(uint32_t value, int mask, int site) {
  Unobserved unobserved;
  if (skipped(site)) return value;
  Fiber* self = current;
  Warp& warp = self->block->warps[self->thread / 32];
  const unsigned lane = self->thread % 32;
  const int parity = self->shuffles++ % 2;
  warp.slot[parity][lane] = value;
  machine->idle = 0;
  if (++warp.arrived[parity] == 32) {
    warp.arrived[parity] = 0;
    const unsigned first = self->thread - lane;
    for (unsigned i = 0; i < 32; ++i) {
      if (i != lane) make_ready(self->block->fibers[first + i]);
    }
  } else {
    self->state = State::kAtShuffle;
    yield_from(self);
  }
  return warp.slot[parity][lane ^ static_cast<unsigned>(mask)];
}

inline void pause() {
  Unobserved unobserved;
  current->spinning = true;
  ++machine->idle;
  make_ready(current);
  yield_from(current);
  current->spinning = false;
}

// ---- Launch

class Launch {
 public:
  Launch(dim3 grid, unsigned threads, size_t shared_bytes, std::function<void()> kernel) {
    machine_.kernel = std::move(kernel);
    machine_.grid = grid;
    machine_.random.seed(settings.seed);
    threads_ = threads;
    shared_bytes_ = shared_bytes - std::min<size_t>(shared_bytes, settings.shared_missing);
  }

  void run(bool all_at_once) {
    release(&machine_.grid);
    std::vector<dim3> blocks;
    for (unsigned y = 0; y < machine_.grid.y; ++y) {
      for (unsigned x = 0; x < machine_.grid.x; ++x) blocks.push_back(dim3(x, y));
    }
    arrange(blocks);
    machine = &machine_;
    if (all_at_once) {
      run_blocks(blocks);
    } else {
      for (const dim3& index : blocks) run_blocks({index});
    }
    machine = nullptr;
    current = nullptr;
    acquire(&machine_);
    rest();
  }

 private:
  static constexpr size_t kMargin = 4096;
  static constexpr size_t kTired = 2048;

  // ThreadSanitizer takes what one fiber does to be ordered. So fibers that have run a block rest
  // until the launch is over, or else races between blocks would not be seen; there is a limit, as
  // it knows no more than some thousand fibers.
  static inline std::vector<std::unique_ptr<Fiber>> rested_;
  std::vector<std::unique_ptr<Fiber>> tired_;

  static std::unique_ptr<Fiber> take_fiber() {
    if (rested_.empty()) return std::make_unique<Fiber>();
    auto fiber = std::move(rested_.back());
    rested_.pop_back();
    return fiber;
  }

  void rest() {
    std::move(tired_.begin(), tired_.end(), std::back_inserter(rested_));
    tired_.clear();
  }

  template <typename T>
  void arrange(std::vector<T>& list) {
    if (settings.order == Order::kReverse) std::reverse(list.begin(), list.end());
    if (settings.order == Order::kRandom) std::shuffle(list.begin(), list.end(), machine_.random);
  }

  void run_blocks(const std::vector<dim3>& indices) {
    std::vector<std::unique_ptr<Block>> blocks;
    std::vector<std::unique_ptr<Fiber>> fibers;
    std::vector<std::vector<char>> memory;
    for (const dim3& index : indices) {
      auto block = std::make_unique<Block>();
      block->index = index;
      unsigned precedence = 0;
      block->threads = threads_;
      block->warps.resize((threads_ + 31) / 32);
      // All bits set is a NaN in every format. Margins on both sides must keep it.
      memory.emplace_back(shared_bytes_ + 2 * kMargin, static_cast<char>(0xff));
      block->shared = memory.back().data() + kMargin;
      block->shared += (16 - reinterpret_cast<uintptr_t>(block->shared) % 16) % 16;
#if defined(__SANITIZE_ADDRESS__)
      __asan_poison_memory_region(block->shared + shared_bytes_, 2048);
#endif
      for (unsigned i = 0; i < threads_; ++i) {
        auto fiber = take_fiber();
        fiber->block = block.get();
        fiber->thread = i;
        fiber->state = State::kReady;
        fiber->shuffles = 0;
        fiber->spinning = false;
        if (i % 32 == 0) precedence = 1 + machine_.random() % 1000000;
        fiber->precedence = precedence;
        block->fibers.push_back(fiber.get());
        machine_.later.push_back(fiber.get());
        fibers.push_back(std::move(fiber));
      }
      blocks.push_back(std::move(block));
    }
    loop(fibers.size());
    int64_t unfinished = 0;
    for (auto& fiber : fibers) {
      if (fiber->state == State::kDone) {
        tired_.push_back(std::move(fiber));
      } else {
        ++unfinished;  // and is not used again
      }
    }
    if (tired_.size() > kTired) rest();
    if (unfinished > 0 && settings.fault.empty()) {
      report(std::to_string(unfinished) + " threads wait for ever");
    }
    for (size_t i = 0; i < blocks.size(); ++i) {
      const char* begin = memory[i].data();
      const char* end = begin + memory[i].size();
#if defined(__SANITIZE_ADDRESS__)
      __asan_unpoison_memory_region(blocks[i]->shared + shared_bytes_, 2048);
#endif
      const char* shared = blocks[i]->shared;
      const auto touched = [](char c) { return c != static_cast<char>(0xff); };
      if (std::any_of(begin, shared, touched) ||
          std::any_of(shared + shared_bytes_, end, touched)) {
        report("a store outside shared memory");
      }
    }
    machine_.ready.clear();
    machine_.later.clear();
  }

  // Moves from `later` to `ready` those whose turn it is.
  void next() {
    if (settings.order != Order::kUneven) {
      machine_.ready.swap(machine_.later);
      arrange(machine_.ready);
      return;
    }
    unsigned highest = 0;
    for (const Fiber* fiber : machine_.later) {
      if (!fiber->spinning) highest = std::max(highest, fiber->precedence);
    }
    std::vector<Fiber*> left;
    for (Fiber* fiber : machine_.later) {
      const bool turn =
          fiber->spinning ? settings.seed % 2 == 0 || highest == 0 : fiber->precedence == highest;
      (turn ? machine_.ready : left).push_back(fiber);
    }
    machine_.later.swap(left);
  }

  void loop(size_t fibers) {
    const int64_t patience = 200 * static_cast<int64_t>(fibers) + 100000;
    while (!machine_.later.empty()) {
      next();
      for (Fiber* fiber : machine_.ready) {
        current = fiber;
        ++settings.turns;
        machine_.main.switch_to(fiber->context);
      }
      machine_.ready.clear();
      if (machine_.idle > patience) {
        report("blocks wait for ever at a grid barrier");
        return;
      }
    }
  }

  Machine machine_;
  unsigned threads_;
  size_t shared_bytes_;
};

}  // namespace emulator
