// Our ops as a C++ program calls them, with arguments made ready once: so oneDNN's primitives and
// ONNX Runtime's bound session are called, too. torch.ops looks at every argument in every call,
// which takes longer than the smallest layers do.
//
// Nothing of csrc is included: the schema of the ops is all that a caller knows, and that of an
// older commit tells itself, for benchmarks/compare.py.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;
using Tensors = std::vector<Tensor>;
using Needs = c10::List<bool>;

using ForwardOp = Tensors(const Tensor& input, const Optional& hx, const Optional& cx,
                          at::TensorList weights, const Optional& batch_sizes,
                          const Optional& lengths, const Optional& resets, std::string_view mode,
                          bool has_biases, bool cells, bool keep);
using BackwardOp = Tensors(const Optional& dy, const Optional& dh_n, const Optional& dc_n,
                           const Optional& dcells, const Tensor& input, const Optional& hx,
                           const Optional& cx, at::TensorList weights, const Tensor& y,
                           const Optional& saved, const Optional& batch_sizes,
                           const Optional& lengths, const Optional& resets, std::string_view mode,
                           bool has_biases, Needs needs);

// Before there were cells with a c.
using ElmanForwardOp = std::tuple<Tensor, Tensor>(const Tensor& input, const Optional& hx,
                                                  at::TensorList weights,
                                                  const Optional& batch_sizes,
                                                  const Optional& lengths, std::string_view mode,
                                                  bool has_biases);
using ElmanBackwardOp = Tensors(const Optional& dy, const Optional& dh_n, const Tensor& input,
                                const Optional& hx, at::TensorList weights, const Tensor& y,
                                const Optional& batch_sizes, const Optional& lengths,
                                std::string_view mode, bool has_biases, Needs needs);

c10::OperatorHandle find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
}

// One layer, with biases.
class BoundOp {
 public:
  // Without dy it is forward alone. `needs` has an entry for each of [x, hx, cx, *weights].
  BoundOp(std::string mode, Tensor x, Optional hx, Optional cx, Tensors weights, Optional lengths,
          Optional dy, std::vector<bool> needs)
      : mode_(std::move(mode)),
        x_(std::move(x)),
        hx_(std::move(hx)),
        cx_(std::move(cx)),
        lengths_(std::move(lengths)),
        dy_(std::move(dy)),
        weights_(std::move(weights)) {
    const c10::OperatorHandle forward = find("charrnn_fast::rnn_layer");
    const c10::OperatorHandle backward = find("charrnn_fast::rnn_layer_backward");
    if (forward.schema().returns().size() == 2) {
      if (cx_.has_value()) throw std::invalid_argument("this commit has no cell with a c");
      elman_forward_ = forward.typed<ElmanForwardOp>();
      elman_backward_ = backward.typed<ElmanBackwardOp>();
      needs.erase(needs.begin() + 2);
    } else {
      forward_ = forward.typed<ForwardOp>();
      backward_ = backward.typed<BackwardOp>();
    }
    for (const bool need : needs) needs_.push_back(need);
  }

  void run() {
    // What the call before returned is dropped first, as by a caller that keeps nothing.
    results_.clear();
    if (elman_forward_.has_value()) return run_elman();
    run_any();
  }

  // y and the gradients asked for, of the last run.
  const Tensors& results() const { return results_; }

 private:
  void run_any() {
    // y, h_n, c_n of an LSTM, then what is kept, of LSTM and GRU.
    Tensors forward = forward_->call(x_, hx_, cx_, weights_, std::nullopt, lengths_, std::nullopt,
                                     mode_, true, false, dy_.has_value());
    results_.push_back(forward[0]);
    if (!dy_.has_value()) return;
    const size_t kept = cx_.has_value() ? 3 : 2;
    const Optional saved = forward.size() > kept ? Optional(forward[kept]) : std::nullopt;
    const Tensor y = forward[0];
    forward.clear();  // a caller that needs y alone drops the rest before backward
    append(backward_->call(dy_, std::nullopt, std::nullopt, std::nullopt, x_, hx_, cx_, weights_, y,
                           saved, std::nullopt, lengths_, std::nullopt, mode_, true, needs_));
  }

  void run_elman() {
    const Tensor y =
        std::get<0>(elman_forward_->call(x_, hx_, weights_, std::nullopt, lengths_, mode_, true));
    results_.push_back(y);
    if (!dy_.has_value()) return;
    append(elman_backward_->call(dy_, std::nullopt, x_, hx_, weights_, y, std::nullopt, lengths_,
                                 mode_, true, needs_));
  }

  // Gradients; those of older commits have a place for each of needs_.
  void append(Tensors&& gradients) {
    for (size_t i = 0; i < gradients.size(); ++i) {
      if (gradients[i].numel() > 0) results_.push_back(std::move(gradients[i]));
    }
  }

  std::string mode_;
  Tensor x_;
  Optional hx_, cx_, lengths_, dy_;
  Tensors weights_;
  Needs needs_;
  Tensors results_;
  std::optional<c10::TypedOperatorHandle<ForwardOp>> forward_;
  std::optional<c10::TypedOperatorHandle<BackwardOp>> backward_;
  std::optional<c10::TypedOperatorHandle<ElmanForwardOp>> elman_forward_;
  std::optional<c10::TypedOperatorHandle<ElmanBackwardOp>> elman_backward_;
};

}  // namespace

PYBIND11_MODULE(bound_op, m) {
  namespace py = pybind11;
  py::class_<BoundOp>(m, "BoundOp")
      .def(py::init<std::string, Tensor, Optional, Optional, Tensors, Optional, Optional,
                    std::vector<bool>>())
      .def("run", &BoundOp::run, py::call_guard<py::gil_scoped_release>())
      .def("results", &BoundOp::results);
}
