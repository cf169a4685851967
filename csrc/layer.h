// What the files over the kernels share: the types of the ops, the checks of their arguments, the
// composite formulas, the rule that picks between those and the kernels, and counters of which one
// ran.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/List.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <atomic>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

#include "kernels/rnn.h"

namespace charrnn_fast {

using Optional = std::optional<at::Tensor>;
using Pair = std::tuple<at::Tensor, at::Tensor>;

// The ops, as their schemas in ops.cpp declare them. Everything is time-major.
using LayerOp = Pair(const at::Tensor& input, const Optional& hx, at::TensorList weights,
                     const Optional& batch_sizes, const Optional& lengths, std::string_view mode,
                     bool has_biases);
using LayerBackwardOp = std::vector<at::Tensor>(const Optional& dy, const Optional& dh_n,
                                                const at::Tensor& input, const Optional& hx,
                                                at::TensorList weights, const at::Tensor& y,
                                                const Optional& batch_sizes,
                                                const Optional& lengths, std::string_view mode,
                                                bool has_biases, c10::List<bool> needs);

using LinearOp = at::Tensor(const at::Tensor& input, const at::Tensor& weight,
                            const at::Tensor& bias);
using LinearBackwardOp = std::vector<at::Tensor>(const at::Tensor& dy, const at::Tensor& input,
                                                 const at::Tensor& weight);

// Sizes of one call of rnn_layer.
struct Layer {
  int64_t T;    // steps
  int64_t B;    // sequences
  int64_t N;    // rows of input and y: T*B, or the rows of packed data
  int64_t I;    // inputs
  int64_t H;    // hidden units
  int64_t D;    // directions, 1 or 2
  bool tokens;  // input holds int64 ids standing for one-hot rows
  bool packed;  // batch_sizes is given
  Cell cell;
};

// "RNN_TANH", "RNN_RELU" or "RNN_SIGMOID"; anything else is a ValueError.
Cell parse_mode(std::string_view mode);

// Checks the arguments of rnn_layer against each other and returns the sizes. Throws what nn.RNN
// throws: ValueError for dtypes, RuntimeError for shapes. Reads the values of batch_sizes and
// lengths, not of input.
Layer check_layer(const at::Tensor& input, const Optional& hx, at::TensorList weights,
                  const Optional& batch_sizes, const Optional& lengths, std::string_view mode,
                  bool has_biases);

// The same for rnn_layer_backward, whose `needs` has one entry for each of [input, hx, *weights].
Layer check_layer_backward(const Optional& dy, const Optional& dh_n, const at::Tensor& input,
                           const Optional& hx, at::TensorList weights, const at::Tensor& y,
                           const Optional& batch_sizes, const Optional& lengths,
                           std::string_view mode, bool has_biases, const c10::List<bool>& needs);

// RuntimeError unless every tensor is strided and not quantized.
void check_dense(const at::Tensor& input, const Optional& hx, at::TensorList weights);

// IndexError naming the first id of a contiguous CPU tensor that is outside [0, I), and its place.
void check_token_ids(const at::Tensor& ids, int64_t I);

// The one rule that decides between kernel and composite: null when the CPU kernels serve these
// tensors, else why they do not, as the end of a sentence ("the dtype is BFloat16"). Looks at
// metadata only.
const char* why_composite(const at::Tensor& input, const Optional& hx, at::TensorList weights);

// How the CPU kernels divide one layer among threads.
struct Plan {
  int members;   // threads that work on each direction
  Split split;   // how they divide it, when they are several
  bool at_once;  // each direction has a team of its own, and both run at the same time
};
Plan plan_forward(const Layer& layer);
Plan plan_backward(const Layer& layer);

// Threads that so many multiply-adds are worth.
int threads_for(double products);

// The dtype whose CPU kernels serve `dtype` with the ISA in use. Where it is another, tensors are
// converted on the way in and results on the way out: states and sums then are float32 from the
// first step to the last.
at::ScalarType computed_in(at::ScalarType dtype);

// The same formulas in differentiable at:: ops, for every device, dtype and transform.
namespace composite {
Pair forward(const at::Tensor& input, const Optional& hx, at::TensorList weights,
             const Optional& batch_sizes, const Optional& lengths, std::string_view mode,
             bool has_biases);
std::vector<at::Tensor> backward(const Optional& dy, const Optional& dh_n, const at::Tensor& input,
                                 const Optional& hx, at::TensorList weights, const at::Tensor& y,
                                 const Optional& batch_sizes, const Optional& lengths,
                                 std::string_view mode, bool has_biases,
                                 const c10::List<bool>& needs);
at::Tensor linear(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias);
std::vector<at::Tensor> linear_backward(const at::Tensor& dy, const at::Tensor& input,
                                        const at::Tensor& weight);  // [dx, dW, db]
}  // namespace composite

// The stack of layers: the op `rnn`.
Pair rnn(const at::Tensor& input, const Optional& hx, at::TensorList params,
         const Optional& batch_sizes, const Optional& lengths, std::string_view mode,
         bool has_biases, int64_t num_layers, double dropout, bool train, bool bidirectional);

// Whether the CPU kernel serves these arguments of the op `linear`; else at::linear does, or says
// what is wrong with them.
bool linear_is_served(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias);

// The ops, called through the dispatcher.
const c10::TypedOperatorHandle<LayerBackwardOp>& layer_backward_op();
Pair call_layer(const at::Tensor& input, const Optional& hx, at::TensorList weights,
                const Optional& batch_sizes, const Optional& lengths, std::string_view mode,
                bool has_biases);

// How many layers ran by which path since the library was loaded. One layer with two directions
// counts once.
struct Counters {
  std::atomic<int64_t> forward_fused{0};
  std::atomic<int64_t> backward_fused{0};
  std::atomic<int64_t> forward_composite{0};
  std::atomic<int64_t> backward_composite{0};
};
Counters& counters();

inline void count(std::atomic<int64_t>& counter) {
  counter.fetch_add(1, std::memory_order_relaxed);
}

}  // namespace charrnn_fast
