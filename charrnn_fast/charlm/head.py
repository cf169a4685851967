"""The layer that scores the next character, with the same bits for any number of threads."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from charrnn_fast import ops

ALONE = 2**15  # multiplications that no library divides among threads
MANY = 2**20  # multiplications from which oneDNN, whose calls cost more, is the faster library
PIECE = 256  # terms of a sum that oneDNN adds one after the other; the sums of pieces err less
ONEDNN = torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class Head(nn.Linear):
    """A linear layer over ``[T, B, H]``.

    A large product of MKL is cut among the threads at places where its sums run in another order.
    Those of oneDNN and of our kernels are not, and they use all of the instructions of an AMD CPU.
    """

    def forward(self, input: Tensor) -> Tensor:
        if input.numel() * self.out_features <= ALONE or torch.compiler.is_compiling():
            return super().forward(input)  # a compiler chooses products of its own
        if is_plain(input) and is_plain(self.weight):
            return cast(Tensor, Linear.apply(input, self.weight, self.bias))  # type: ignore[no-untyped-call]
        return stepwise(input, self.weight, self.bias)


def stepwise(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A product for each time step: it goes to one thread as it is."""
    return torch.baddbmm(bias, input, weight.t().expand(len(input), -1, -1))


def is_plain(tensor: Tensor) -> bool:
    return tensor.dtype == torch.float32 and tensor.device.type == "cpu"


class Linear(torch.autograd.Function):
    """``F.linear`` over ``[T, B, H]`` in float32: oneDNN forward where it is worth its call, and
    one call of our kernels backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        if input.numel() * len(weight) < MANY or not ONEDNN:
            return stepwise(input, weight, bias)
        return product(input.flatten(0, 1), weight, bias).view(*input.shape[:2], -1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        input, weight = ctx.saved_tensors
        x, delta = input.flatten(0, 1), gradient.flatten(0, 1)
        if torch.is_grad_enabled():  # second derivatives are wanted: products that have them
            return (delta @ weight).view_as(input), delta.t() @ x, delta.sum(0)
        dx, dW, db = ops.linear_backward(delta, x, weight)
        return dx.view_as(input), dW, db


def product(a: Tensor, b: Tensor, bias: Tensor) -> Tensor:
    """``[M, K]`` times the transpose of ``[N, K]``, by oneDNN. No gradient flows through it."""
    parts = zip(torch.split(a, PIECE, 1), torch.split(b, PIECE, 1), strict=True)
    total = multiply(*next(parts), bias)
    for part in parts:
        total += multiply(*part, None)
    return total


def multiply(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    # Some of the columns of a matrix oneDNN would multiply a hundred times slower.
    a, b = a.contiguous(), b.contiguous()
    return cast(Tensor, torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], ""))
