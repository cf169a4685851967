// Walking over the steps of a block of sequences, and over all of their rows.
#pragma once

#include "isa-prologue.h"
#include "rnn.h"

namespace charrnn_fast {
namespace {

struct Range {
  int64_t first, last;
};

inline int64_t row_of(const Sequences& seq, int64_t t, int64_t slot) {
  const int64_t first = seq.step_row != nullptr ? seq.step_row[t] : t * seq.step_rows;
  return first + (seq.slot_row != nullptr ? seq.slot_row[slot] : slot);
}

// Rows of states; negative where there is none.
inline int64_t slot_row_of(const Sequences& seq, int64_t slot) {
  return seq.slot_row != nullptr ? seq.slot_row[slot] : slot;
}
inline int64_t start_row_of(const Sequences& seq, int64_t slot) {
  return seq.start_row != nullptr ? seq.start_row[slot] : slot_row_of(seq, slot);
}
inline int64_t end_row_of(const Sequences& seq, int64_t slot) {
  return seq.end_row != nullptr ? seq.end_row[slot] : slot_row_of(seq, slot);
}
// The row of a state, or `none` where the array is not given or has no such row.
template <typename scalar>
ALWAYS_INLINE const scalar* state_or(const scalar* states, int64_t row, int64_t H,
                                     const scalar* none) {
  return states != nullptr && row >= 0 ? states + row * H : none;
}

inline int64_t length_of(const Sequences& seq, int64_t slot) {
  return seq.lengths != nullptr ? seq.lengths[slot] : seq.T;
}

// How many slots have more than one step; they come first.
inline int64_t slots_longer_than_one(const Sequences& seq) {
  int64_t n = seq.T > 1 ? seq.B : 0;
  while (seq.lengths != nullptr && n > 0 && seq.lengths[n - 1] == 1) --n;
  return n;
}

// The first and last step that a direction runs of one sequence.
inline int64_t first_step(const Sequences& seq, int64_t slot, bool down) {
  return down ? length_of(seq, slot) - 1 : 0;
}
inline int64_t last_step(const Sequences& seq, int64_t slot, bool down) {
  return first_step(seq, slot, !down);
}

// The steps of slots [first, last), up (t = 0, 1, ...) or down, that lie in a range. At each one
// the slots [first, first + running) run; of these the first `continuing` ran at the step before,
// and the others start.
class StepWalk {
 public:
  StepWalk(const Sequences& seq, int64_t first, int64_t last, bool down)
      : StepWalk(seq, first, last, down, {0, seq.T}) {}
  StepWalk(const Sequences& seq, int64_t first, int64_t last, bool down, Range steps)
      : seq_(seq), first_(first), last_(last), steps_(steps), end_(first), down_(down) {
    const int64_t longest = first < last ? length_of(seq, first) : 0;  // lengths fall
    if (longest < steps_.last) steps_.last = longest;
    t = down ? steps_.last : steps_.first - 1;
    if (t >= 0) end_ = running_at(t);
  }

  bool next() {
    const int64_t before = end_;
    t += down_ ? -1 : 1;
    if (t < steps_.first || t >= steps_.last) return false;
    if (down_) {
      end_ = running_at(t);
      continuing = before - first_;
    } else {
      if (t == 0) end_ = last_;
      while (end_ > first_ && length_of(seq_, end_ - 1) <= t) --end_;
      continuing = t == 0 ? 0 : end_ - first_;
    }
    running = end_ - first_;
    return true;
  }

  // How many steps, from this one on, run the same slots in rows equally far apart.
  int64_t steady() const {
    if (seq_.step_row != nullptr) return 1;
    if (down_) {
      const int64_t joined = end_ < last_ ? length_of(seq_, end_) : 0;
      return t + 1 - (joined > steps_.first ? joined : steps_.first);
    }
    const int64_t left = length_of(seq_, end_ - 1);
    return (left < steps_.last ? left : steps_.last) - t;
  }
  // Passes over all but the last of n steady steps.
  void run(int64_t n) { t += down_ ? 1 - n : n - 1; }

  int64_t t;
  int64_t running = 0;
  int64_t continuing = 0;

 private:
  // The end of the slots that run at a step, where those before end_ do.
  int64_t running_at(int64_t step) const {
    int64_t end = end_;
    while (end < last_ && length_of(seq_, end) > step) ++end;
    return end;
  }

  const Sequences& seq_;
  int64_t first_, last_;
  Range steps_;
  int64_t end_;
  bool down_;
};

// The rows of slots [slots.first, slots.last), in order of step, up or down, and slot.
class RowWalk {
 public:
  RowWalk(const Sequences& seq, Range slots, bool down)
      : t(0), slot(slots.first), seq_(seq), slots_(slots), end_(slots.last), down_(down) {
    if (slots.first == slots.last) return;
    if (down) {
      t = length_of(seq, slots.first) - 1;  // lengths fall
      if (seq.lengths != nullptr) end_ = slots.first;
    }
    settle();
  }

  // Skips to the row of a place in this order.
  void seek(int64_t place) {
    while (place > 0) {
      const int64_t left = end_ - slot;
      if (place < left) {
        slot += place;
        return;
      }
      place -= left;
      step();
    }
  }
  void next() {
    if (++slot == end_) step();
  }
  bool ended() const { return t < 0 || t >= seq_.T || end_ == slots_.first; }

  int64_t t;
  int64_t slot;

 private:
  void step() {
    t += down_ ? -1 : 1;
    slot = slots_.first;
    settle();
  }
  void settle() {
    if (seq_.lengths == nullptr) return;
    if (down_) {
      while (end_ < slots_.last && seq_.lengths[end_] > t) ++end_;
    } else {
      while (end_ > slots_.first && seq_.lengths[end_ - 1] <= t) --end_;
    }
  }

  const Sequences& seq_;
  Range slots_;
  int64_t end_;  // of the slots that run at t
  bool down_;
};

// The i-th slot of a range in the order in which its rows are written at every step: from both ends
// inwards. A core's prefetcher then runs into rows of the same thread; beyond the ends lie rows of
// another thread, which would lose cache lines that it is about to write (false sharing).
inline int64_t inwards(const Sequences& seq, Range slots, int64_t i) {
  if (seq.lengths != nullptr) return slots.first + i;  // those that run come first
  return i % 2 == 0 ? slots.first + i / 2 : slots.last - 1 - i / 2;
}

// Rows of some slots at the steps in a range.
inline int64_t rows_in(const Sequences& seq, Range slots, Range steps) {
  if (seq.lengths == nullptr) return (steps.last - steps.first) * (slots.last - slots.first);
  int64_t rows = 0;
  for (int64_t i = slots.first; i < slots.last && seq.lengths[i] > steps.first; ++i) {
    rows += (seq.lengths[i] < steps.last ? seq.lengths[i] : steps.last) - steps.first;
  }
  return rows;
}
inline int64_t rows_in(const Sequences& seq) { return rows_in(seq, {0, seq.B}, {0, seq.T}); }

inline Range share(Range range, const Team& team) {
  const int64_t n = range.last - range.first;
  return {range.first + n * team.rank / team.size, range.first + n * (team.rank + 1) / team.size};
}
inline Range share(int64_t n, const Team& team) { return share(Range{0, n}, team); }

// The part of a team that a member is in, when it is divided into `parts`. A barrier is the whole
// team's: every part must meet equally often.
inline Team subteam(const Team& team, int parts) {
  const int size = team.size / parts;
  return {team.rank % size, size, team.barrier, team.state};
}

// The most weights that each member of a team that divides the batch packs for itself: up to here
// packing takes less time than fetching the packed weights from another core's cache.
constexpr int64_t kPackedByAll = 1 << 15;

// Where the slots of a part of gradient_parts begin: all parts have about as many rows.
inline int64_t first_slot_of_part(const Sequences& seq, int64_t part, int64_t parts) {
  if (seq.lengths == nullptr) return seq.B * part / parts;
  const int64_t before = rows_in(seq) * part / parts;
  int64_t slot = 0;
  for (int64_t rows = 0; rows < before; ++slot) rows += seq.lengths[slot];
  return slot;
}

inline void wait_for(const Team& team) {
  if (team.size > 1) team.barrier(team.state);
}

// Waits at the barrier, then prefetches all cache lines of some rows: other threads have written
// parts of them, and a product would miss the cache line by line.
template <typename scalar>
void wait_for_rows(const Team& team, scalar* const* rows, int64_t count, int64_t columns) {
  wait_for(team);
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t j = 0; j < columns; j += 64 / sizeof(scalar)) __builtin_prefetch(rows[i] + j);
  }
}

// Hands out 64-byte aligned pieces of the workspace; with a null base it only measures.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <typename T>
  T* take(int64_t n) {
    T* piece = base_ != nullptr ? reinterpret_cast<T*>(base_ + used_) : nullptr;
    used_ += (static_cast<size_t>(n) * sizeof(T) + 63) / 64 * 64;
    return piece;
  }
  size_t used() const { return used_; }

  void next_page() { used_ = (used_ + kPage - 1) / kPage * kPage; }

  // Calls take() for each of `count` owners of pieces alike; last for number `mine`, whose pieces
  // it so leaves in its variables.
  template <typename Take>
  void take_each(int count, int mine, const Take& take) {
    next_page();
    const size_t first = used_;
    take();
    next_page();
    const size_t size = used_ - first;
    used_ = first + mine * size;
    take();
    used_ = first + count * size;
  }

 private:
  char* base_;
  size_t used_ = 0;
};

// Slots run together through all steps: enough to read the weights seldom, few enough to stay in
// cache.
constexpr int64_t kBlockSlots = 96;
// Rows of a chunk of steps, whose projections are made together just before they are used, at most;
// and all their sums. Few rows would read a large W_ih from L3 at every step, which takes longer
// than to write their sums there and read them back.
constexpr int64_t kChunkRows = 192;
constexpr int64_t kChunkSums = 1 << 19;

}  // namespace
}  // namespace charrnn_fast
