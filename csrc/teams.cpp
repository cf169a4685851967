// How many threads a call takes, and how they divide it.
#include <ATen/Parallel.h>

#include <algorithm>

#include "layer.h"

namespace charrnn_fast {

namespace {

// Cycles are counted roughly, so many floats at a time.
constexpr double kLanes = 16;

// Of one step of the recurrence. Below two rows, loading the weights takes longer than multiplying
// by them.
double step_cycles(const Layer& layer, double rows) {
  return layer.H * layer.H / kLanes * std::max(rows, 2.0);
}

// The cheapest way by a rough count of cycles. Constants were measured on Zen 4 and Zen 5 cores
// with AVX-512; they decide speed only, never results.
Plan cheapest_plan(const Layer& layer, int threads, double passes) {
  // Between distant cores, whose round trip is half a microsecond; a tenth of it between close
  // ones.
  constexpr double kBarrierCycles = 2500;
  constexpr double kNeighbourCycles = 1000;  // a step beside rows that another core writes
  constexpr double kForeignCycles = 5;       // a number of delta or y that another core wrote
  constexpr double kStartCycles = 20000;     // waking the threads
  const int parts = gradient_parts(layer.cell, layer.B, layer.N, layer.H);
  const auto recurrence = [&](double rows) { return step_cycles(layer, rows); };
  const double products = static_cast<double>(layer.N) * layer.H / kLanes *
                          (layer.I + (passes > 1 ? layer.I + layer.H : 0));
  const auto exchange = [&](int members, bool by_parts) {
    const int groups = by_parts && members % parts == 0 ? parts : 1;
    const double foreign = layer.N * layer.H * (members - groups) / members;
    return passes > 1 ? 2 * kForeignCycles * foreign : 0;
  };
  const double steps = layer.T;
  Plan best{1, Split::kBatch, false};
  double best_cost = layer.D * (steps * recurrence(layer.B) + products);
  // `cost` of one direction, by as many threads.
  const auto consider = [&](int members, Split split, bool at_once, double cost) {
    if (members * (at_once ? 2 : 1) > 1) cost += kStartCycles;
    if (!at_once) cost *= layer.D;
    if (cost < best_cost) {
      best = {members, split, at_once};
      best_cost = cost;
    }
  };
  for (const bool at_once : {true, false}) {
    const int most = at_once ? threads / 2 : threads;
    if (at_once && (layer.D == 1 || most == 0)) continue;
    const int by_batch = static_cast<int>(std::clamp<int64_t>(layer.B, 1, most));
    const double rows = (layer.B + by_batch - 1) / by_batch;
    consider(by_batch, Split::kBatch, at_once,
             steps * (recurrence(rows) + (by_batch > 1 ? kNeighbourCycles : 0)) +
                 products / by_batch + exchange(by_batch, true));
    const int by_hidden = static_cast<int>(std::min<int64_t>(most, (layer.H + 63) / 64));
    if (by_hidden > 1) {
      consider(by_hidden, Split::kHidden, at_once,
               steps * (recurrence(layer.B) / by_hidden + kBarrierCycles) + products / by_hidden +
                   exchange(by_hidden, false));
    }
  }
  return best;
}

int threads_to_use(const Layer& layer, double passes) {
  const double rows = static_cast<double>(layer.N) / layer.T;
  const double step = step_cycles(layer, rows) + rows * layer.H * layer.I / kLanes;
  return threads_for(passes * layer.D * layer.T * step * kLanes);
}

Plan make_plan(const Layer& layer, double passes) {
  return cheapest_plan(layer, threads_to_use(layer, passes), passes);
}

}  // namespace

int threads_for(double products) {
  // Not worth waking a thread for less than some tens of microseconds.
  return at::in_parallel_region() || products < 100000 * kLanes ? 1 : at::get_num_threads();
}

Plan plan_forward(const Layer& layer) { return make_plan(layer, 1); }
Plan plan_backward(const Layer& layer) { return make_plan(layer, 3); }

}  // namespace charrnn_fast
