"""Dropout that is the same at every step of a sequence."""

from __future__ import annotations

from torch import Tensor, nn


class LockedDropout(nn.Module):
    """Variational dropout (Gal and Ghahramani 2016): one mask for all steps ``[T]`` of a call.

    Input and output are ``[T, B, H]``; each of the B sequences has a mask of its own.
    """

    def __init__(self, p: float = 0.0) -> None:
        super().__init__()
        self.p = p

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or not self.p:
            return input
        mask = input.new_empty(1, *input.shape[1:]).bernoulli_(1 - self.p).div_(1 - self.p)
        return input * mask

    def extra_repr(self) -> str:
        return f"p={self.p}"
