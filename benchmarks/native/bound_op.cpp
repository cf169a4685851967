// Our ops as a C++ program calls them, with arguments made ready once: so oneDNN's primitives and
// ONNX Runtime's bound session are called, too. torch.ops looks at every argument in every call,
// which takes longer than the smallest layers do.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/utils/pybind.h>

#include <utility>
#include <vector>

#include "layer.h"

namespace {

using charrnn_fast::kNone;
using charrnn_fast::Optional;

template <typename Op>
c10::TypedOperatorHandle<Op> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Op>();
}

// One layer with biases and tanh, from a state of zeros.
class BoundOp {
 public:
  // Without dy it is forward alone. `needs` has an entry for each of [x, h0, c0, *weights].
  BoundOp(at::Tensor x, std::vector<at::Tensor> weights, Optional dy,
          const std::vector<bool>& needs)
      : x_(std::move(x)), weights_(std::move(weights)), dy_(std::move(dy)) {
    for (const bool need : needs) needs_.push_back(need);
  }

  void run() {
    // What the call before returned is dropped first, as by a caller that keeps nothing.
    results_.clear();
    const bool keep = dy_.has_value();
    auto [y, h_n, c_n, cells, saved] =
        forward_.call(x_, kNone, kNone, weights_, kNone, kNone, kNone, "RNN_TANH", true, false,
                      keep);
    results_.push_back(std::move(y));
    if (!keep) return;
    const std::vector<at::Tensor> gradients =
        backward_.call(dy_, kNone, kNone, kNone, x_, kNone, kNone, weights_, results_[0], saved,
                       kNone, kNone, kNone, "RNN_TANH", true, needs_);
    for (size_t i = 0; i < gradients.size(); ++i) {
      if (needs_[i]) results_.push_back(gradients[i]);
    }
  }

  // y and the gradients asked for, of the last run.
  const std::vector<at::Tensor>& results() const { return results_; }

 private:
  at::Tensor x_;
  std::vector<at::Tensor> weights_;
  Optional dy_;
  c10::List<bool> needs_;
  std::vector<at::Tensor> results_;
  c10::TypedOperatorHandle<charrnn_fast::LayerOp> forward_ =
      find<charrnn_fast::LayerOp>("charrnn_fast::rnn_layer");
  c10::TypedOperatorHandle<charrnn_fast::LayerBackwardOp> backward_ =
      find<charrnn_fast::LayerBackwardOp>("charrnn_fast::rnn_layer_backward");
};

}  // namespace

PYBIND11_MODULE(bound_op, m) {
  namespace py = pybind11;
  py::class_<BoundOp>(m, "BoundOp")
      .def(py::init<at::Tensor, std::vector<at::Tensor>, Optional, std::vector<bool>>())
      .def("run", &BoundOp::run, py::call_guard<py::gil_scoped_release>())
      .def("results", &BoundOp::results);
}
