"""What tracing and counting know of the ops: the shapes of their results, and their FLOPs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula

from charrnn_fast._extension import _C

# Raises with the message where the condition is false, or is a guard where it is symbolic.
_check: Callable[[bool | torch.SymBool, Callable[[], str]], None] = torch._check


def weights_per_direction(has_biases: bool) -> int:
    """Tensors of one direction of one layer: W_ih, W_hh and perhaps b_ih, b_hh."""
    return 4 if has_biases else 2


def _check_devices(*tensors: Tensor | None, on_cpu: Sequence[Tensor | None] = ()) -> None:
    """Refuses calls that reach the fake because one tensor of several is on meta.

    Those of ``on_cpu`` may be on the CPU wherever the others are.
    """
    devices = {tensor.device.type for tensor in tensors if tensor is not None}
    devices |= {tensor.device.type for tensor in on_cpu if tensor is not None} - {"cpu"}
    if "meta" in devices and len(devices) > 1:
        raise RuntimeError(f"RNN: Expected all tensors to be on the same device, got {devices}")


def _kept_numbers(weight: Tensor, mode: str) -> int:
    """Numbers that a unit keeps for backward in a step: 0 where no kernel runs, or keeps any."""
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    on_cpu = weight.device.type == "cpu" and weight.dtype in dtypes
    return _C.saved_numbers(mode) if on_cpu else 0


def _rnn_layer(
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    weights: list[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    mode: str,
    has_biases: bool,
    cells: bool,
    keep: bool,
) -> list[Tensor]:
    _check_devices(input, hx, cx, resets, *weights, on_cpu=(batch_sizes, lengths))
    directions = len(weights) // weights_per_direction(has_biases)
    hidden_size = weights[1].shape[1]
    tokens = input.dtype == torch.int64
    packed = batch_sizes is not None
    expected_dim = (1 if packed else 2) + (0 if tokens else 1)
    if input.dim() != expected_dim:
        raise RuntimeError(f"input must have {expected_dim} dimensions, got {input.dim()}")
    if not tokens:
        _check(
            input.shape[-1] == weights[0].shape[1],
            lambda: (
                "input.size(-1) must be equal to input_size. "
                f"Expected {weights[0].shape[1]}, got {input.shape[-1]}"
            ),
        )
    if mode != "LSTM" and (cx is not None or cells):
        raise ValueError(f"cx must be None and cells False: {mode} has no cell state")
    if packed and resets is not None:
        raise ValueError("resets cannot be given with packed input: pad it, and give lengths=")
    batch: int | torch.SymInt
    if batch_sizes is None:
        _check(input.shape[0] > 0, lambda: "Expected sequence length to be larger than 0 in RNN")
        rows: tuple[int, ...] = tuple(input.shape[:2])
        batch = input.shape[1]
        count = input.shape[0] * input.shape[1]
    else:
        rows = (input.shape[0],)
        count = input.shape[0]
        if hx is not None:
            batch = hx.shape[1]
        elif cx is not None:
            batch = cx.shape[1]
        elif batch_sizes.device.type != "meta" and not isinstance(batch_sizes, FakeTensor):
            batch = int(batch_sizes[0])
        else:
            batch = torch.library.get_ctx().new_dynamic_size()
    weight = weights[0]
    steps, state = (*rows, directions * hidden_size), (directions, batch, hidden_size)
    results = [weight.new_empty(steps), weight.new_empty(state)]
    if mode == "LSTM":
        results.append(weight.new_empty(state))
    if cells:
        results.append(weight.new_empty(steps))
    kept = _kept_numbers(weight, mode) if keep else 0
    if kept:
        dtype = _C.computed_in(weight.dtype)
        results.append(weight.new_empty((directions, count, kept * hidden_size), dtype=dtype))
    return results


def _rnn_layer_backward(
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dcells: Tensor | None,
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    weights: list[Tensor],
    y: Tensor,
    saved: Tensor | None,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    mode: str,
    has_biases: bool,
    needs: list[bool],
) -> list[Tensor]:
    given = (dy, dh_n, dc_n, dcells, input, hx, cx, resets, *weights, y, saved)
    _check_devices(*given, on_cpu=(batch_sizes, lengths))
    directions = len(weights) // weights_per_direction(has_biases)

    def state() -> Tensor:
        like = next((t for t in (hx, cx, dh_n, dc_n) if t is not None), None)
        if like is not None:
            return y.new_empty(like.shape)
        batch = y.shape[1] if batch_sizes is None else int(batch_sizes[0])
        return y.new_empty((directions, batch, weights[1].shape[1]))

    # As check_needs of csrc/layer.cpp.
    if needs[0] and input.dtype == torch.int64:
        raise RuntimeError("needs of input must be False: token ids have no gradient")
    if needs[2] and mode != "LSTM":
        raise RuntimeError(f"needs of cx must be False: {mode} has no cell state")
    wanted = [input, hx, cx, *weights]
    grads = []
    for place, (tensor, needed) in enumerate(zip(wanted, needs, strict=True)):
        if not needed:
            continue
        if place in (1, 2) and tensor is None:
            grads.append(state())
        else:
            assert tensor is not None
            grads.append(y.new_empty(tensor.shape))
    return grads


def _generate(
    tokens: Tensor,
    state: Tensor | None,
    cell_state: Tensor | None,
    params: list[Tensor],
    head_weight: Tensor,
    head_bias: Tensor | None,
    uniforms: Tensor,
    mode: str,
    has_biases: bool,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_devices(tokens, state, cell_state, *params, head_weight, head_bias, uniforms)
    layers = len(params) // weights_per_direction(has_biases)
    drawn = tokens.new_empty(tuple(uniforms.shape))
    after = (layers, uniforms.shape[1], params[1].shape[1])
    cells = params[0].new_empty(after if mode == "LSTM" else (0,))
    return drawn, params[0].new_empty(after), cells


torch.library.register_fake("charrnn_fast::rnn_layer", _rnn_layer)
torch.library.register_fake("charrnn_fast::rnn_layer_backward", _rnn_layer_backward)
torch.library.register_fake("charrnn_fast::generate", _generate)


# For torch.utils.flop_counter: the products that it counts for nn.RNN, nn.LSTM and nn.GRU.


def _products(input: Tensor, weights: Sequence[Tensor], has_biases: bool) -> tuple[int, int]:
    """Operations of x W_ih', and of y W_hh' for all steps, in every direction."""
    directions = len(weights) // weights_per_direction(has_biases)
    recurrent = 2 * directions * weights[1].numel()
    if input.dtype == torch.int64:  # ids pick columns, and multiply nothing
        return 0, recurrent * input.numel()
    rows = input.numel() // weights[0].shape[1]
    return 2 * directions * rows * weights[0].numel(), recurrent * rows


def _rnn_layer_flops(
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    mode: str,
    has_biases: bool,
    *_: Any,
    **__: Any,
) -> int:
    return sum(_products(input, weights, has_biases))


def _rnn_layer_backward_flops(
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dcells: Tensor | None,
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    weights: Sequence[Tensor],
    y: Tensor,
    saved: Tensor | None,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    mode: str,
    has_biases: bool,
    needs: Sequence[bool],
    **_: Any,
) -> int:
    needs_input, needs_hx, _cx, *needs_weights = needs
    each = weights_per_direction(has_biases)
    flops = 0
    for first in range(0, len(weights), each):
        # The step before the first is hx's own; in reverse, that one runs the longest sequences.
        B = y.shape[1] if batch_sizes is None else int(batch_sizes[-1 if first else 0])
        own = weights[first : first + each]
        last = 0 if needs_hx else 2 * B * own[1].numel()
        projection, recurrence = _products(input, own, has_biases)
        flops += projection * (needs_input + needs_weights[first])
        flops += recurrence * (1 + needs_weights[first + 1]) - last
    return flops


register_flop_formula(torch.ops.charrnn_fast.rnn_layer, get_raw=True)(_rnn_layer_flops)
register_flop_formula(torch.ops.charrnn_fast.rnn_layer_backward, get_raw=True)(
    _rnn_layer_backward_flops
)
