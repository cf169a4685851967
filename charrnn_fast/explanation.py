"""``explain``: which path a call takes, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from charrnn_fast import ops
from charrnn_fast.cell import RNNCell
from charrnn_fast.rnn import RNN
from charrnn_fast.tracing import is_foreign


@dataclass(frozen=True)
class Explanation:
    """Which path a call takes, and why. ``str()`` of it is for people.

    Attributes:
        fused: whether the kernels run; PyTorch's own formula does otherwise.
        reason: why.
        isa: the instruction set of the kernels.
        products: the dtype of the kernels' products, for tensors of two bytes; their sums are
            float32. None for others.
        forward, backward: for each layer, how the kernels divide it among threads; empty when
            they do not run.
    """

    fused: bool
    reason: str
    isa: str
    products: torch.dtype | None = None
    forward: tuple[ops.Plan, ...] = ()
    backward: tuple[ops.Plan, ...] = ()

    @property
    def path(self) -> str:
        """``'fused'`` or ``'composite'``."""
        return "fused" if self.fused else "composite"

    @property
    def threads(self) -> int:
        """The most threads that a layer uses; 1 on the composite path means one of ours."""
        return max((plan.threads for plan in (*self.forward, *self.backward)), default=1)

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.reason}"]
        if self.fused:
            lines.append(f"isa: {self.isa}")
        if self.products is not None:
            name = str(self.products).removeprefix("torch.")
            lines.append(f"products: of {name}, summed in float32")
        for layer, (forward, backward) in enumerate(zip(self.forward, self.backward, strict=True)):
            lines.append(f"layer {layer}: forward {forward}; backward {backward}")
        return "\n".join(lines)


def explain(
    module: nn.Module, input: Any, hx: Tensor | None = None, lengths: Any = None
) -> Explanation:
    """Says whether ``module(input, hx, lengths)`` runs in the fused kernels, and why or why not.

    The answer comes from the rule by which the ops decide, and from the function by which they
    divide the work. It holds for a plain call: inside a ``torch.func`` transform, in forward-mode
    AD and for double backward the composite path runs.

    Args:
        module: an :class:`RNN` or :class:`RNNCell`; for any other module the answer is composite.
        input, hx, lengths: what the module would be called with.
    """
    isa = ops.current_isa()
    if not isinstance(module, (RNN, RNNCell)):
        kind = type(module)
        return Explanation(False, f"the module is a {kind.__module__}.{kind.__qualname__}", isa)
    data = input.data if isinstance(input, PackedSequence) else input
    weights = _weights(module)
    if is_foreign(data, hx, weights):
        return Explanation(False, "a tensor is of a subclass that has its own rules", isa)
    device = data.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if autocast and weights[0].dtype == torch.float32:
        low = torch.get_autocast_dtype(device)
        weights = [weight.to(low) for weight in weights]
    mode = module.mode if isinstance(module, RNN) else ops.MODES[module.nonlinearity]
    reason = ops.why_composite(data, hx, None, weights, None, mode)
    if reason is not None:
        return Explanation(False, reason, isa)
    dtype = weights[0].dtype
    sizes = _layers(module, input)
    return Explanation(
        True,
        "the CPU kernels serve these tensors",
        isa,
        ops.computed_in(dtype) if dtype.itemsize == 2 else None,
        tuple(ops.plan(*size, mode, backward=False) for size in sizes),
        tuple(ops.plan(*size, mode, backward=True) for size in sizes),
    )


def _weights(module: RNN | RNNCell) -> list[Tensor]:
    if isinstance(module, RNN):
        return module._current_weights()
    weights = [module.weight_ih, module.weight_hh]
    return weights if module.bias_ih is None else [*weights, module.bias_ih, module.bias_hh]


def _layers(module: RNN | RNNCell, input: Any) -> list[tuple[int, int, int, int, int, int]]:
    """T, B, rows, I, H and directions of each layer of a call."""
    I, H = module.input_size, module.hidden_size
    data = input.data if isinstance(input, PackedSequence) else input
    places = list(data.shape if data.dtype == torch.int64 else data.shape[:-1])
    if isinstance(module, RNNCell):
        B = places[0] if places else 1
        return [(1, B, B, I, H, 1)]
    if isinstance(input, PackedSequence):
        T, B, rows = len(input.batch_sizes), int(input.batch_sizes[0]), places[0]
    else:
        if len(places) == 1:
            places.insert(0 if module.batch_first else 1, 1)
        T, B = reversed(places) if module.batch_first else places
        rows = T * B
    D = 2 if module.bidirectional else 1
    return [(T, B, rows, D * H if layer else I, H, D) for layer in range(module.num_layers)]
