// What the ops rnn_layer and rnn_layer_backward are called with, said once: their signatures, the
// structs that every file passes on instead, and what turns the one into the other.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/List.h>

#include <algorithm>
#include <optional>
#include <string_view>
#include <tuple>
#include <vector>

namespace charrnn_fast {

using Optional = std::optional<at::Tensor>;
inline const Optional kNone;

// The arguments of one layer. All are the caller's, for the length of its call.
struct Call {
  const at::Tensor& input;  // [T, B, I], ids [T, B]; packed: [N, I], ids [N]
  const Optional& hx;       // [D, B, H]
  const Optional& cx;       // [D, B, H], of cells that have a c
  at::TensorList weights;   // of each direction, see Weights
  const Optional& batch_sizes;
  const Optional& lengths;  // [B]
  const Optional& resets;   // bool [T, B]
  std::string_view mode;
  bool has_biases;
  // Of forward alone: c of every step is wanted; so is what backward needs beside y.
  bool cells = false;
  bool keep = false;
};

// The gradients of a layer's results. None: zeros.
struct Grads {
  const Optional& dy;
  const Optional& dh_n;
  const Optional& dc_n;
  const Optional& dcells;
};

// y, h_n, c_n, cells, saved. The last three are undefined where a cell has none, or nobody asked.
using LayerResult = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
// output, h_n, c_n, cells. The last two are undefined where the last three of a layer are.
using StackResult = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// A direction's weights stand side by side in a list: W_ih, W_hh and, with biases, b_ih, b_hh.
constexpr int64_t weights_per_direction(bool has_biases) { return has_biases ? 4 : 2; }
constexpr const char* kWeightNames[] = {"weight_ih", "weight_hh", "bias_ih", "bias_hh"};

// The weights of one direction.
struct Weights {
  const at::Tensor& W_ih;
  const at::Tensor& W_hh;
  const at::Tensor& b_ih;  // undefined without biases, as the next
  const at::Tensor& b_hh;
};
inline Weights weights_of(at::TensorList all, bool has_biases, int64_t direction) {
  static const at::Tensor none;
  const at::Tensor* w = &all[direction * weights_per_direction(has_biases)];
  return {w[0], w[1], has_biases ? w[2] : none, has_biases ? w[3] : none};
}
inline Weights weights_of(const Call& call, int64_t direction) {
  return weights_of(call.weights, call.has_biases, direction);
}
inline int64_t directions_of(const Call& call) {
  return static_cast<int64_t>(call.weights.size()) / weights_per_direction(call.has_biases);
}

// The place of a gradient in `needs` and in the results of rnn_layer_backward.
constexpr size_t kInput = 0, kHx = 1, kCx = 2, kFirstWeight = 3;
constexpr size_t first_weight(bool has_biases, int64_t direction) {
  return kFirstWeight + direction * weights_per_direction(has_biases);
}

// The ops, as their schemas in ops.cpp declare them. Everything is time-major.
using LayerOp = std::vector<at::Tensor>(const at::Tensor& input, const Optional& hx,
                                        const Optional& cx, at::TensorList weights,
                                        const Optional& batch_sizes, const Optional& lengths,
                                        const Optional& resets, std::string_view mode,
                                        bool has_biases, bool cells, bool keep);
using LayerBackwardOp = std::vector<at::Tensor>(
    const Optional& dy, const Optional& dh_n, const Optional& dc_n, const Optional& dcells,
    const at::Tensor& input, const Optional& hx, const Optional& cx, at::TensorList weights,
    const at::Tensor& y, const Optional& saved, const Optional& batch_sizes,
    const Optional& lengths, const Optional& resets, std::string_view mode, bool has_biases,
    c10::List<bool> needs);

// The ops return lists of what there is: an empty tensor in place of each result that nobody wants
// would cost the smallest calls a tenth of their time.
inline std::vector<at::Tensor> listed(LayerResult&& result) {
  std::vector<at::Tensor> list;
  list.reserve(5);
  auto& [y, h_n, c_n, cells, saved] = result;
  for (at::Tensor* each : {&y, &h_n, &c_n, &cells, &saved}) {
    if (each->defined()) list.push_back(std::move(*each));
  }
  return list;
}
// Of gradients, one for each place of `needs`, those that are needed.
inline std::vector<at::Tensor> listed(std::vector<at::Tensor>&& grads) {
  const auto undefined = [](const at::Tensor& grad) { return !grad.defined(); };
  grads.erase(std::remove_if(grads.begin(), grads.end(), undefined), grads.end());
  return std::move(grads);
}

// Implementations of the ops: `function` takes a Call, and, where Keys says so, the dispatch keys.
template <auto function, typename... Keys>
struct LayerImpl {
  static std::vector<at::Tensor> call(Keys... keys, const at::Tensor& input, const Optional& hx,
                                      const Optional& cx, at::TensorList weights,
                                      const Optional& batch_sizes, const Optional& lengths,
                                      const Optional& resets, std::string_view mode,
                                      bool has_biases, bool cells, bool keep) {
    return listed(function(keys..., Call{input, hx, cx, weights, batch_sizes, lengths, resets, mode,
                                         has_biases, cells, keep}));
  }
};

template <auto function, typename... Keys>
struct LayerBackwardImpl {
  static std::vector<at::Tensor> call(Keys... keys, const Optional& dy, const Optional& dh_n,
                                      const Optional& dc_n, const Optional& dcells,
                                      const at::Tensor& input, const Optional& hx,
                                      const Optional& cx, at::TensorList weights,
                                      const at::Tensor& y, const Optional& saved,
                                      const Optional& batch_sizes, const Optional& lengths,
                                      const Optional& resets, std::string_view mode,
                                      bool has_biases, c10::List<bool> needs) {
    return function(keys..., Grads{dy, dh_n, dc_n, dcells},
                    Call{input, hx, cx, weights, batch_sizes, lengths, resets, mode, has_biases}, y,
                    saved, needs);
  }
};

// And calls: `invoke` takes what the op takes, and returns what it returns.
template <typename Invoke>
std::vector<at::Tensor> with_arguments(const Call& call, const Invoke& invoke) {
  return invoke(call.input, call.hx, call.cx, call.weights, call.batch_sizes, call.lengths,
                call.resets, call.mode, call.has_biases, call.cells, call.keep);
}
template <typename Invoke>
std::vector<at::Tensor> with_arguments(const Grads& grads, const Call& call, const at::Tensor& y,
                                       const Optional& saved, const c10::List<bool>& needs,
                                       const Invoke& invoke) {
  return invoke(grads.dy, grads.dh_n, grads.dc_n, grads.dcells, call.input, call.hx, call.cx,
                call.weights, y, saved, call.batch_sizes, call.lengths, call.resets, call.mode,
                call.has_biases, needs);
}

}  // namespace charrnn_fast
