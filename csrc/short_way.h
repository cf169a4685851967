// The short way, a fast path from a module's call into the ops: plain calls, which are most of
// them, without what Python and nn.Module.__call__ take for every one. Anything unusual is left to
// the long way, in charrnn_fast/recurrent.py and cell.py, whose checks and errors are torch.nn's
// own.
#pragma once

#include <pybind11/pybind11.h>

namespace charrnn_fast {

// Defines in charrnn_fast._C: forward, call, cell, describe, batch_first and squeeze_step.
void define_short_way(pybind11::module_& m);

}  // namespace charrnn_fast
