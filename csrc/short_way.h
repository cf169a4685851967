// The short way from a module's call into the ops: plain calls, which are most of them, without
// what Python and nn.Module.__call__ take for every one. Anything unusual is left to the long way,
// in charrnn_fast/rnn.py, whose checks and errors are nn.RNN's own.
#pragma once

#include <pybind11/pybind11.h>

namespace charrnn_fast {

// Defines in charrnn_fast._C: forward, call, cell, watch_calls, batch_first and first_step.
void define_short_way(pybind11::module_& m);

}  // namespace charrnn_fast
