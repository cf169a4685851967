// The operands of a call as kernels take them: contiguous, and of the dtype that is computed in.
#pragma once

#include <algorithm>
#include <vector>

#include "call.h"

namespace charrnn_fast {

// The tensor itself where it is plain already.
inline at::Tensor plain(const at::Tensor& tensor, at::ScalarType dtype) {
  return (tensor.scalar_type() == dtype ? tensor : tensor.to(dtype)).contiguous();
}
inline Optional plain(const Optional& tensor, at::ScalarType dtype) {
  return tensor.has_value() && tensor->defined() ? Optional(plain(*tensor, dtype)) : std::nullopt;
}

struct Operands {
  Operands(const Call& given, at::ScalarType dtype)
      : input(plain(given.input, given.input.scalar_type() == at::kLong ? at::kLong : dtype)),
        hx(plain(given.hx, dtype)),
        cx(plain(given.cx, dtype)),
        batch_sizes(plain(given.batch_sizes, at::kLong)),
        lengths(plain(given.lengths, at::kLong)),
        resets(plain(given.resets, at::kBool)),
        call{input,
             hx,
             cx,
             plain_weights(given.weights, dtype),
             batch_sizes,
             lengths,
             resets,
             given.mode,
             given.has_biases,
             given.cells,
             given.keep} {}
  Operands(const Operands&) = delete;
  Operands& operator=(const Operands&) = delete;

  at::Tensor input;
  Optional hx, cx, batch_sizes, lengths, resets;
  std::vector<at::Tensor> copies;  // of the weights, where they are needed
  Call call;                       // of these

 private:
  at::TensorList plain_weights(at::TensorList weights, at::ScalarType dtype) {
    const auto is_plain = [dtype](const at::Tensor& weight) {
      return weight.scalar_type() == dtype && weight.is_contiguous();
    };
    if (std::all_of(weights.begin(), weights.end(), is_plain)) return weights;
    for (const at::Tensor& weight : weights) copies.push_back(plain(weight, dtype));
    return copies;
  }
};

}  // namespace charrnn_fast
