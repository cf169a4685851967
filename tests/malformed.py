"""What malformed calls are made of: small sizes, spoilt tensors, and how they are refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

T, B, I, H = 4, 3, 5, 6
OPS = torch.ops.charrnn_fast
REFUSALS = (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError)


def longs(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def quantized(tensor: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8)


# What can be wrong with one tensor, whatever its part in the call.
SPOILS: dict[str, Callable[[Tensor], Tensor]] = {
    "scalar": lambda t: t.new_zeros(()),
    "a dimension more": lambda t: t.unsqueeze(0),
    "a dimension less": lambda t: t[0],
    "first size + 1": lambda t: torch.cat([t, t[:1]]),
    "last size - 1": lambda t: t[..., :-1],
    "first size 0": lambda t: t[:0],
    "last size 0": lambda t: t[..., :0],
    "transposed": lambda t: t.transpose(0, -1) if t.dim() > 1 else t.unsqueeze(1),
    "flattened": lambda t: t.flatten() if t.dim() > 1 else t.unsqueeze(0),
    "huge by stride 0": lambda t: t.new_zeros(()).expand(*[2**15] * t.dim()),
    "double": lambda t: t.double(),
    "half": lambda t: t.half(),
    "bfloat16": lambda t: t.bfloat16(),
    "complex": lambda t: t.to(torch.complex64),
    "int32": lambda t: t.int(),
    "uint8": lambda t: t.to(torch.uint8),
    "bool": lambda t: t.bool(),
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "quantized": quantized,
}
