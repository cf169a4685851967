"""The layer that scores the next character, with the same bits for any number of threads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from charrnn_fast import ops


class Head(nn.Linear):
    """A linear layer.

    MKL splits a large product among threads so that the order of its sums depends on their number.
    Our kernels do not. They also use every vector extension of an AMD CPU, which MKL may not.
    """

    def forward(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return super().forward(input)  # a compiler chooses products of its own
        return ops.linear(input, self.weight, self.bias)
