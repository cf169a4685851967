// What the files over the kernels share: the types of the ops, the checks of their arguments, the
// composite formulas, the rule that picks between those and the kernels, and counters of which one
// ran.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include <atomic>
#include <string>
#include <vector>

#include "call.h"
#include "kernels/rnn.h"

namespace charrnn_fast {

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

// "RNN_TANH", "RNN_RELU", "RNN_SIGMOID", "LSTM" or "GRU"; anything else is a ValueError.
Cell parse_mode(std::string_view mode);

// Checks the arguments of rnn_layer against each other and returns the sizes. Throws what nn.RNN
// throws: ValueError for dtypes and for what a cell does not have, RuntimeError for shapes. Reads
// the values of batch_sizes and lengths, not of input.
Layer check_layer(const Call& call);

// The same for rnn_layer_backward, whose `needs` has one entry for each of [input, hx, cx,
// *weights].
Layer check_layer_backward(const Grads& grads, const Call& call, const at::Tensor& y,
                           const Optional& saved, const c10::List<bool>& needs);

// What of it looks at metadata only, and holds for the composite formula, too: dense tensors, and
// nothing that the cell does not have.
void check_kind(const Call& call);
void check_needs(const Call& call, const c10::List<bool>& needs);

// IndexError naming the first id of a contiguous CPU tensor that is outside [0, I), and its place.
void check_token_ids(const at::Tensor& ids, int64_t I);

// The one rule that decides between kernel and composite: null when the CPU kernels serve this
// call, else why they do not, as the end of a sentence ("the dtype is BFloat16"). Looks at metadata
// only.
const char* why_composite(const Call& call);

// Numbers a hidden unit keeps for backward in each step, where the CPU kernels serve this mode.
int64_t saved_numbers(std::string_view mode);

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
LayerResult forward(const Call& call);
std::vector<at::Tensor> backward(const Grads& grads, const Call& call, const at::Tensor& y,
                                 const Optional& saved, const c10::List<bool>& needs);
at::Tensor linear(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias);
std::vector<at::Tensor> linear_backward(const at::Tensor& dy, const at::Tensor& input,
                                        const at::Tensor& weight);  // [dx, dW, db]
}  // namespace composite

// The kernels' backward reads few of the operands; the composite formula, and kernels of another
// ISA than forward's, compute the gates again from all of them. They call
// expect_unchanged_operands(): a RuntimeError where this thread runs autograd's backward and an
// operand was changed since forward.
inline constexpr const char* kOperandChanged =
    "one of the variables needed for gradient computation has been modified by an inplace "
    "operation: ";
void expect_unchanged_operands();
// While it exists, the operand of this name counts as changed; null: none.
class WithChangedOperand {
 public:
  explicit WithChangedOperand(const char* name);
  ~WithChangedOperand();

 private:
  const char* outer_;
};

// The stack of layers: the op `rnn`. `call` has the weights of all of them, and the states side by
// side.
StackResult rnn(const Call& call, int64_t num_layers, double dropout, bool train,
                bool bidirectional);

// Whether the CPU kernel serves these arguments of the op `linear`; else at::linear does, or says
// what is wrong with them.
bool linear_is_served(const at::Tensor& input, const at::Tensor& weight, const at::Tensor& bias);

// The ops, called through the dispatcher. Gradients are those that `needs` names, one after the
// other.
LayerResult call_layer(const Call& call);
std::vector<at::Tensor> call_layer_backward(const Grads& grads, const Call& call,
                                            const at::Tensor& y, const Optional& saved,
                                            const c10::List<bool>& needs);

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
