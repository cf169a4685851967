"""The layer that scores the next character, with the same bits for any number of threads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from charrnn_fast import ops


class Head(nn.Linear):
    """A linear layer.

    A large product of MKL is cut among the threads at places where its sums run in another order.
    Those of our kernels are not, and they use all of the instructions of an AMD CPU.
    """

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return super().forward(input)  # a compiler chooses products of its own
        return ops.linear(input, self.weight, self.bias)
