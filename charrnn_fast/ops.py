"""The ops of the extension: shapes for tracing, the ISAs, and which path a call takes.

This is the only file that uses ``torch.ops.charrnn_fast`` and ``charrnn_fast._C``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import register_flop_formula

from charrnn_fast import onnx
from charrnn_fast._extension import _C

MODES = {"tanh": "RNN_TANH", "relu": "RNN_RELU", "sigmoid": "RNN_SIGMOID"}

# The short ways in; None when the call needs the long way. See csrc/short_way.cpp.
fast_forward = _C.forward
fast_call = _C.call
watch_calls = _C.watch_calls
fast_cell = _C.cell


def _is_exporting_to_onnx() -> bool:
    return torch.compiler.is_exporting() and torch.onnx.is_in_onnx_export()


def rnn(
    input: Tensor,
    hx: Tensor | None,
    params: Sequence[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    mode: str,
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
) -> tuple[Tensor, Tensor]:
    """A stack of layers, time-major; ``mode`` is one of :data:`MODES`' values."""
    if _is_exporting_to_onnx() and batch_sizes is None:
        return onnx.rnn(
            input,
            hx,
            params,
            lengths,
            mode,
            has_biases,
            num_layers,
            dropout,
            train,
            bidirectional,
        )
    output, h_n = torch.ops.charrnn_fast.rnn.default(
        input,
        hx,
        list(params),
        batch_sizes,
        lengths,
        mode,
        has_biases,
        num_layers,
        dropout,
        train,
        bidirectional,
    )
    return output, h_n


def rnn_layer(
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    mode: str,
    has_biases: bool,
) -> tuple[Tensor, Tensor]:
    """One layer of one or two directions, time-major."""
    if _is_exporting_to_onnx() and batch_sizes is None:
        return onnx.rnn_layer(input, hx, weights, lengths, mode, has_biases)
    y, h_n = torch.ops.charrnn_fast.rnn_layer.default(
        input, hx, list(weights), batch_sizes, lengths, mode, has_biases
    )
    return y, h_n


def linear(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``F.linear``, by a kernel where all are float32 or float64 on the CPU.

    The bits of the result and of its gradients do not depend on the number of threads.
    """
    return cast(Tensor, torch.ops.charrnn_fast.linear.default(input, weight, bias))


def batch_first(output: Tensor) -> Tensor:
    """``(B, T, H)`` of a result ``(T, B, H)``; no view of it where that can be had."""
    if type(output) is Tensor and not torch.compiler.is_compiling():
        return _C.batch_first(output)
    return output.transpose(0, 1)


def first_step(output: Tensor) -> Tensor:
    """``(B, H)`` of a result ``(1, B, H)``; no view of it where that can be had."""
    if type(output) is Tensor and not torch.compiler.is_compiling():
        return _C.first_step(output)
    return output.squeeze(0)


def generate(
    tokens: Tensor,
    state: Tensor | None,
    params: Sequence[Tensor],
    head_weight: Tensor,
    head_bias: Tensor | None,
    uniforms: Tensor,
    mode: str,
    has_biases: bool,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """N characters for S streams in one call: a step of every layer, a linear head, a draw.

    Args:
        tokens: ``(S)`` int64, the last characters so far, which ``state`` has not seen.
        state: ``(layers, S, H)``; zeros when None.
        params: the weights of a stack of one direction, as nn.RNN orders them.
        head_weight: ``(V, H)``.
        head_bias: ``(V)``, or None.
        uniforms: ``(N, S)`` in [0, 1), float32 or the dtype of the weights: where each draw
            inverts the cumulative distribution.
        mode: one of :data:`MODES`' values.
        has_biases: whether ``params`` has four tensors for a layer, or two.
        temperature: divides the scores; 0 takes the best one, the first of equals.
        top_k: only the k best scores, and ties with the last of them; 0: all.
        top_p: only the fewest characters, best first, whose probabilities reach p; 1: all.

    Returns:
        ``(drawn, state)``: ids ``(N, S)``, and the state before the last of them was seen, so that
        calls can follow one another. No gradient flows through it.

    Raises:
        IndexError: a token is outside ``[0, V)``; the message names it. On CUDA, where looking
            would mean waiting, its scores are NaN instead, and uniform numbers are not checked.
        ValueError: an option or a uniform number is out of range, or dtypes differ.
        RuntimeError: shapes or devices do not go together.
        NotImplementedError: the dtype or the device has no kernel (see :func:`generates`).
    """
    drawn, h_n = torch.ops.charrnn_fast.generate.default(
        tokens,
        state,
        list(params),
        head_weight,
        head_bias,
        uniforms,
        mode,
        has_biases,
        temperature,
        top_k,
        top_p,
    )
    return drawn, h_n


def generates(weight: Tensor) -> bool:
    """Whether :func:`generate` has a kernel for weights of this dtype on this device."""
    if weight.device.type == "cuda":
        built = torch._C._dispatch_has_kernel_for_dispatch_key("charrnn_fast::generate", "CUDA")
        return built and weight.dtype == torch.float32
    return weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.float64)


# Raises with the message where the condition is false, or is a guard where it is symbolic.
_check: Callable[[bool | torch.SymBool, Callable[[], str]], None] = torch._check


def _check_devices(*tensors: Tensor | None, on_cpu: Sequence[Tensor | None] = ()) -> None:
    """Refuses calls that reach the fake because one tensor of several is on meta.

    Those of ``on_cpu`` may be on the CPU wherever the others are.
    """
    devices = {tensor.device.type for tensor in tensors if tensor is not None}
    devices |= {tensor.device.type for tensor in on_cpu if tensor is not None} - {"cpu"}
    if "meta" in devices and len(devices) > 1:
        raise RuntimeError(f"RNN: Expected all tensors to be on the same device, got {devices}")


def _rnn_layer_fake(
    input: Tensor,
    hx: Tensor | None,
    weights: list[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    mode: str,
    has_biases: bool,
) -> tuple[Tensor, Tensor]:
    _check_devices(input, hx, *weights, on_cpu=(batch_sizes, lengths))
    directions = len(weights) // (4 if has_biases else 2)
    hidden_size = weights[1].shape[0]
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
    batch: int | torch.SymInt
    if batch_sizes is None:
        _check(input.shape[0] > 0, lambda: "Expected sequence length to be larger than 0 in RNN")
        rows: tuple[int, ...] = tuple(input.shape[:2])
        batch = input.shape[1]
    else:
        rows = (input.shape[0],)
        if hx is not None:
            batch = hx.shape[1]
        elif batch_sizes.device.type != "meta" and not _is_fake(batch_sizes):
            batch = int(batch_sizes[0])
        else:
            batch = torch.library.get_ctx().new_dynamic_size()
    y = weights[0].new_empty((*rows, directions * hidden_size))
    h_n = weights[0].new_empty((directions, batch, hidden_size))
    return y, h_n


def _rnn_layer_backward_fake(
    dy: Tensor | None,
    dh_n: Tensor | None,
    input: Tensor,
    hx: Tensor | None,
    weights: list[Tensor],
    y: Tensor,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    mode: str,
    has_biases: bool,
    needs: list[bool],
) -> list[Tensor]:
    _check_devices(dy, dh_n, input, hx, *weights, y, on_cpu=(batch_sizes, lengths))
    grads = []
    for tensor, needed in zip([input, hx, *weights], needs, strict=True):
        if not needed:
            grads.append(y.new_empty((0,)))
        elif tensor is not None:
            grads.append(y.new_empty(tensor.shape))
        elif dh_n is not None:
            grads.append(y.new_empty(dh_n.shape))
        else:
            directions = len(weights) // (4 if has_biases else 2)
            grads.append(y.new_empty((directions, y.shape[1], weights[1].shape[0])))
    return grads


def _generate_fake(
    tokens: Tensor,
    state: Tensor | None,
    params: list[Tensor],
    head_weight: Tensor,
    head_bias: Tensor | None,
    uniforms: Tensor,
    mode: str,
    has_biases: bool,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> tuple[Tensor, Tensor]:
    _check_devices(tokens, state, *params, head_weight, head_bias, uniforms)
    layers = len(params) // (4 if has_biases else 2)
    drawn = tokens.new_empty(tuple(uniforms.shape))
    return drawn, params[0].new_empty((layers, uniforms.shape[1], params[0].shape[0]))


torch.library.register_fake("charrnn_fast::rnn_layer", _rnn_layer_fake)
torch.library.register_fake("charrnn_fast::generate", _generate_fake)
torch.library.register_fake("charrnn_fast::rnn_layer_backward", _rnn_layer_backward_fake)


# For torch.utils.flop_counter: the products that it counts for nn.RNN.


def _products(input: Tensor, weights: Sequence[Tensor], has_biases: bool) -> tuple[int, int]:
    """Operations of x W_ih', and of y W_hh' for all steps, in every direction."""
    H, I = weights[0].shape
    directions = len(weights) // (4 if has_biases else 2)
    if input.dtype == torch.int64:  # ids pick columns, and multiply nothing
        return 0, 2 * directions * input.numel() * H * H
    rows = input.numel() // I
    return 2 * directions * rows * I * H, 2 * directions * rows * H * H


def _rnn_layer_flops(
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    mode: str,
    has_biases: bool,
    **_: Any,
) -> int:
    return sum(_products(input, weights, has_biases))


def _rnn_layer_backward_flops(
    dy: Tensor | None,
    dh_n: Tensor | None,
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    y: Tensor,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    mode: str,
    has_biases: bool,
    needs: Sequence[bool],
    **_: Any,
) -> int:
    per_direction = 4 if has_biases else 2
    flops = 0
    for first in range(0, len(weights), per_direction):
        # The step before the first is hx's own; in reverse, that one runs the longest sequences.
        B = y.shape[1] if batch_sizes is None else int(batch_sizes[-1 if first else 0])
        last = 0 if needs[1] else 2 * B * weights[0].shape[0] ** 2
        own = weights[first : first + per_direction]
        projection, recurrence = _products(input, own, has_biases)
        flops += projection * (needs[0] + needs[2 + first])
        flops += recurrence * (1 + needs[3 + first]) - last
    return flops


register_flop_formula(torch.ops.charrnn_fast.rnn_layer, get_raw=True)(_rnn_layer_flops)
register_flop_formula(torch.ops.charrnn_fast.rnn_layer_backward, get_raw=True)(
    _rnn_layer_backward_flops
)


def _is_fake(tensor: Tensor) -> bool:
    return isinstance(tensor, FakeTensor)


def why_composite(input: Tensor, hx: Tensor | None, weights: Sequence[Tensor]) -> str | None:
    """Why these tensors take the composite path, or None when the kernels serve them.

    This asks the rule by which the ops themselves decide.
    """
    return _C.why_composite(input, hx, list(weights))


def computed_in(dtype: torch.dtype) -> torch.dtype:
    """The dtype whose kernels serve tensors of ``dtype`` on the CPU, with the ISA in use.

    float16, and bfloat16 where the ISA has no products of it, are converted to float32 and back.
    """
    return _C.computed_in(dtype)


@dataclass(frozen=True)
class Plan:
    """How the kernels divide one layer among threads.

    Attributes:
        threads: how many work at the same time.
        split: ``'batch'``, each runs all steps of its own sequences, or ``'hidden'``, each owns a
            range of hidden units; None where each direction has one thread.
        at_once: both directions run at the same time.
    """

    threads: int
    split: str | None
    at_once: bool

    def __str__(self) -> str:
        text = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        text += f", split by {self.split}" if self.split else ""
        return text + (", both directions at once" if self.at_once else "")


def plan(T: int, B: int, rows: int, I: int, H: int, directions: int, *, backward: bool) -> Plan:
    """The plan of the kernels for one layer of these sizes, by the function that they ask."""
    threads, split, at_once = _C.plan(T, B, rows, I, H, directions, backward)
    return Plan(threads, split if threads > (2 if at_once else 1) else None, at_once)


def counters() -> dict[str, int]:
    """How many layers ran fused and composite, forward and backward, since the import."""
    return _C.counters()


def available_isas() -> list[str]:
    """The instruction sets that this CPU runs and this build holds kernels for, best first."""
    return _C.isas()


def current_isa() -> str:
    """The instruction set in use: the best one, unless CHARRNN_FAST_ISA or use_isa chose."""
    return _C.isa()


class use_isa(contextlib.AbstractContextManager["use_isa"]):
    """Selects an instruction set for the whole process: a call, or a ``with`` block that undoes it.

    Raises:
        ValueError: the name is unknown, or this CPU does not run it.
    """

    def __init__(self, name: str) -> None:
        self._before = current_isa()
        _C.select_isa(name)

    def __exit__(self, *exception: object) -> None:
        _C.select_isa(self._before)


def build_info() -> dict[str, Any]:
    """Compiler, torch, OpenMP and instruction sets of this build."""
    return _C.build_info()


@contextlib.contextmanager
def assert_fused() -> Iterator[None]:
    """Fails when a layer inside the block ran composite, or none ran at all."""
    before = counters()
    yield
    ran = {name: count - before[name] for name, count in counters().items()}
    if ran["forward_composite"] or ran["backward_composite"] or not ran["forward_fused"]:
        raise AssertionError(f"expected fused kernels only, ran {ran}")
