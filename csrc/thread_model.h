// A model of the time that threads take for a layer, and the plan that it calls the cheapest.
//
// Pure functions of numbers: tests ask them about machines that nobody has at hand. They decide
// speed only, never results.
#pragma once

#include "layer.h"

namespace charrnn_fast {

// What a call may use.
struct Machine {
  int threads;     // at most so many threads
  int node_cores;  // cores of the largest NUMA node: a barrier among more than these is slow
  double l2;       // bytes of each core's own cache
};

enum class Pass { kForward, kBackward };

// Hidden units of the narrowest panel: a member of a team that splits the units has one at least.
int panel_units(Cell cell);

// Cycles of one layer divided like this. A plan costs the same however many threads there are
// beside it, so that more threads never make the cheapest plan dearer.
double plan_cycles(const Layer& layer, const Machine& machine, const Plan& plan, Pass pass);

Plan cheapest_plan(const Layer& layer, const Machine& machine, Pass pass);

}  // namespace charrnn_fast
