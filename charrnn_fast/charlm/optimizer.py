"""Steps of the optimizer: the same bits for any number of threads."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def clip_gradients(parameters: list[nn.Parameter], limit: float) -> Tensor:
    """Scales all gradients so that their norm is at most ``limit`` (0: none); returns the norm.

    Norms are taken row by row: a reduction of a whole matrix would add in an order that depends on
    the number of threads.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    rows = [torch.linalg.vector_norm(g, dim=-1).flatten() for g in gradients]
    norm: Tensor = torch.linalg.vector_norm(torch.cat(rows))
    if limit:
        torch._foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm
