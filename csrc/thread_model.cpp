#include "thread_model.h"

#include <algorithm>

namespace charrnn_fast {

namespace {

// Measured with two threads on Zen 4 and Zen 5 cores with AVX-512. Cycles are counted roughly, so
// many floats at a time.
constexpr double kLanes = 16;
// Between distant cores, whose round trip is half a microsecond; a tenth of it between close ones.
constexpr double kBarrierCycles = 2500;
constexpr double kNeighbourCycles = 1000;  // a step beside rows that another core writes
constexpr double kForeignCycles = 5;       // a number of delta or y that another core wrote
constexpr double kStartCycles = 20000;     // waking the first thread

// Of more threads: from the data sheets of servers, on the careful side. None of these changes what
// one or two threads cost, of which the constants above were measured.
constexpr double kNextStartCycles = 500;  // waking each further thread
constexpr double kNextLineCycles = 300;   // each further line that a barrier reads in one round
// Bytes a cycle of all cores from the cache or the memory that they share: as many as eight of them
// want, who load weights as fast as the rows above say.
constexpr double kSharedBytes = 256;
constexpr double kLeastGain = 1.03;  // what more threads must be faster by: others want them

// Rounds of a barrier whose members each read the lines of three others in a round.
int barrier_rounds(int members) {
  int rounds = 0;
  for (int64_t reached = 1; reached < members; reached *= 4) ++rounds;
  return rounds;
}

double barrier_cycles(int members) {
  const int lines = std::min(members, 4) - 1;
  return barrier_rounds(members) * (kBarrierCycles + (lines - 1) * kNextLineCycles);
}

int64_t panels(const Layer& layer) {
  const int units = panel_units(layer.cell);
  return (layer.H + units - 1) / units;
}

// Of one step by one of so many threads, that has so many rows and such a part of the units.
double step_cycles(const Layer& layer, const Machine& machine, double rows, double part,
                   int threads) {
  const double weights = part * sizes_of(layer.cell).gates * layer.H * layer.H;
  // Below two rows, loading the weights takes longer than multiplying by them.
  const double cycles = weights / kLanes * std::max(rows, 2.0);
  if (4 * weights <= machine.l2) return cycles;
  return std::max(cycles, threads * 4 * weights / kSharedBytes);
}

}  // namespace

int panel_units(Cell cell) { return sizes_of(cell).gates == 1 ? 64 : 16; }

double plan_cycles(const Layer& layer, const Machine& machine, const Plan& plan, Pass pass) {
  const CellSizes cell = sizes_of(layer.cell);
  const int members = plan.members, threads = members * (plan.at_once ? 2 : 1);
  const bool backward = pass == Pass::kBackward, by_batch = plan.split == Split::kBatch;
  const double N = layer.N, I = layer.I, H = layer.H;

  const double rows = by_batch ? (layer.B + members - 1) / members : layer.B;
  // The largest part of the work that a member has. Two threads were measured as equal halves.
  double part = 1.0 / members;
  if (members > 2 && by_batch) part = rows / layer.B;
  if (members > 2 && !by_batch) {
    const double most = (panels(layer) + members - 1) / members;
    part = most / panels(layer);
  }

  double step = step_cycles(layer, machine, rows, by_batch ? 1.0 : part, threads);
  if (members > 1) step += by_batch ? kNeighbourCycles : barrier_cycles(members);
  const double products = N * cell.gates * H / kLanes * (I + (backward ? I + H : 0));
  double cycles = layer.T * step + products * part;
  if (backward) {
    // Each member sums some of the weights' gradients over the rows of all members of its group.
    const int parts = gradient_parts(layer.cell, layer.B, layer.N, layer.H);
    const int groups = by_batch && members % parts == 0 ? parts : 1;
    const double foreign = N / groups * H * (members - groups) / members;
    cycles += (cell.sums + 1) * kForeignCycles * foreign;
  }
  const double streamed = 4 * N * (I + (cell.sums + 1) * H) * (backward ? 2 : 1);
  cycles = std::max(cycles, streamed * (plan.at_once ? 2 : 1) / kSharedBytes);
  if (threads > 1) cycles += kStartCycles + (threads - 2) * kNextStartCycles;
  return plan.at_once ? cycles : cycles * layer.D;
}

Plan cheapest_plan(const Layer& layer, const Machine& machine, Pass pass) {
  Plan best{1, Split::kBatch, false};
  double best_cycles = plan_cycles(layer, machine, best, pass);
  int best_threads = 1;
  const auto consider = [&](const Plan& plan, int threads) {
    const double cycles = plan_cycles(layer, machine, plan, pass);
    const double least =
        threads > std::max(best_threads, 2) ? best_cycles / kLeastGain : best_cycles;
    if (cycles >= least) return;
    best = plan;
    best_cycles = cycles;
    best_threads = threads;
  };
  const int64_t by_hidden = std::min<int64_t>(panels(layer), machine.node_cores);
  for (int threads = 2; threads <= machine.threads; ++threads) {
    if (layer.D == 2 && threads % 2 == 0) {
      const int members = threads / 2;
      if (members <= layer.B) consider({members, Split::kBatch, true}, threads);
      if (members > 1 && members <= by_hidden) consider({members, Split::kHidden, true}, threads);
    }
    if (threads <= layer.B) consider({threads, Split::kBatch, false}, threads);
    if (threads <= by_hidden) consider({threads, Split::kHidden, false}, threads);
  }
  return best;
}

}  // namespace charrnn_fast
