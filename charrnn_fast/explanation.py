"""``explain``: which path a call takes, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from charrnn_fast import cell, ops, recurrent
from charrnn_fast.cell import Cell
from charrnn_fast.fused import ODD, Call, is_autocast
from charrnn_fast.recurrent import Recurrent


@dataclass(frozen=True)
class Explanation:
    """Which path a call takes, and why; ``str()`` of it says it in a few lines.

    Attributes:
        fused: whether the kernels run, or PyTorch's own formula.
        reason: why.
        isa: the instruction set of the kernels.
        products: for bfloat16 and float16, the dtype whose products the kernels compute; their
            sums are float32. None for other dtypes.
        forward: for each layer, how the kernels divide it among threads; empty where they do not
            run.
        backward: the same of the backward pass.

    Example:
        >>> import torch, charrnn_fast
        >>> cell = charrnn_fast.RNNCell(10, 20)
        >>> explanation = charrnn_fast.explain(cell, torch.randn(3, 10))
        >>> explanation.path, explanation.threads
        ('fused', 1)
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
        """The most threads that a layer uses; 1 on the composite path, where PyTorch decides."""
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
    module: nn.Module, input: Any, hx: Any = None, lengths: Any = None, resets: Any = None
) -> Explanation:
    """Says whether a call of ``module`` runs in the fused kernels, and why or why not.

    The answer comes from the rules by which the modules and the ops decide, and from the function
    by which they divide the work among threads. It holds for a plain call: inside a ``torch.func``
    transform, in forward-mode AD and for double backward the composite path runs. The values of
    token ids, lengths and resets are not looked at.

    Args:
        module: one of our six classes; for any other module the answer is composite.
        input: what the module would be called with, as the arguments that follow.
        hx: initial state or states; None: zeros.
        lengths: of the sequences, or None.
        resets: of a module, or the ``reset`` of a cell; or None.

    Raises:
        ValueError, RuntimeError, IndexError, NotImplementedError: what the call itself would raise
            for wrong dimensions, sizes and dtypes. Where torch.nn's class decides that, its forward
            is called, without gradients.

    Example:
        >>> import torch, charrnn_fast
        >>> lstm = charrnn_fast.LSTM(10, 20)
        >>> x = torch.randn(5, 3, 10)
        >>> charrnn_fast.explain(lstm, x).reason
        'the CPU kernels serve these tensors'
        >>> print(charrnn_fast.explain(torch.nn.LSTM(10, 20), x))
        composite: the module is a torch.nn.modules.rnn.LSTM, not one of charrnn_fast's
    """
    isa = ops.current_isa()
    if not isinstance(module, (Recurrent, Cell)):
        kind = type(module)
        what = f"{kind.__module__}.{kind.__qualname__}"
        return Explanation(False, f"the module is a {what}, not one of charrnn_fast's", isa)
    if isinstance(module, Recurrent):
        weights, mode = module._current_weights(), module.mode
        reason = recurrent.why_stock(module, input, hx, weights, lengths, resets, False)
    else:
        weights, mode = cell.current_weights(module), cell.mode_of(module)
        reason = cell.why_stock(module, input, hx, weights, resets)
    if reason is not None:
        if reason == ODD:
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                module._stock_forward(input, hx)
        return Explanation(False, reason, isa)
    if isinstance(module, Recurrent):
        call = recurrent.prepare(module, input, hx, weights, lengths, resets)
    else:
        call = cell.prepare(module, input, hx, weights, resets)
    if call.data.shape[0] == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    device = call.data.device.type
    if is_autocast(device) and weights[0].dtype == torch.float32:
        low = torch.get_autocast_dtype(device)
        weights = [weight.to(low) for weight in weights]
    reason = ops.why_composite(call.data, call.h0, call.c0, weights, call.resets, mode)
    if reason is not None:
        return Explanation(False, reason, isa)
    dtype = weights[0].dtype
    sizes = _layers(module, call)
    return Explanation(
        True,
        "the CPU kernels serve these tensors",
        isa,
        ops.computed_in(dtype) if dtype.itemsize == 2 else None,
        tuple(ops.plan(*size, mode, backward=False) for size in sizes),
        tuple(ops.plan(*size, mode, backward=True) for size in sizes),
    )


def _layers(module: Recurrent | Cell, call: Call) -> list[tuple[int, int, int, int, int, int]]:
    """T, B, rows, I, H and directions of each layer of a call."""
    I, H = module.input_size, module.hidden_size
    if call.batch_sizes is not None:
        T, B, rows = len(call.batch_sizes), int(call.batch_sizes[0]), call.data.shape[0]
    else:
        T, B = call.data.shape[:2]
        rows = T * B
    if isinstance(module, Cell):
        return [(T, B, rows, I, H, 1)]
    D = 2 if module.bidirectional else 1
    return [(T, B, rows, D * H if layer else I, H, D) for layer in range(module.num_layers)]
