"""The ops of the extension, the ISAs, and which path a call takes.

Only this file, ``fakes.py`` and ``scaling.py`` use ``charrnn_fast._C``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from charrnn_fast import fakes as fakes  # registers them
from charrnn_fast import onnx
from charrnn_fast._extension import _C

MODES = {"tanh": "RNN_TANH", "relu": "RNN_RELU", "sigmoid": "RNN_SIGMOID"}  # of nonlinearities

# Rows of a weight, in units of hidden_size, by mode.
GATES = {**dict.fromkeys(MODES.values(), 1), "LSTM": 4, "GRU": 3}

# Fast paths from a module to the ops; None where a call needs the slow path in Python. See
# csrc/short_way.cpp.
fast_forward = _C.forward
fast_call = _C.call
fast_cell = _C.cell
describe = _C.describe


def has_cuda_kernels() -> bool:
    """Whether this build has kernels for layers on CUDA; they are Elman's."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key("charrnn_fast::rnn_layer", "CUDA"))


def serves_device(device: str, mode: str) -> bool:
    """Whether our ops serve calls there that torch.nn's forward could serve as well."""
    if device == "cuda":
        return GATES[mode] == 1 and has_cuda_kernels()
    return device in ("cpu", "meta")


def _is_exporting_to_onnx() -> bool:
    if not torch.compiler.is_exporting():
        return False
    # Imported here, since it takes longer than all the rest of this package.
    from torch.onnx import is_in_onnx_export

    try:
        from torch.onnx._internal.exporter import _flags
    except ImportError:  # of another torch
        return is_in_onnx_export()
    # Where the exporter falls back to Dynamo, only the flag can be traced.
    return getattr(_flags, "_is_onnx_exporting", False) or is_in_onnx_export()


def rnn(
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    params: Sequence[Tensor],
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    mode: str,
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    cells: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A stack of layers, time-major: ``(output, h_n, c_n, cells)``.

    Args:
        mode: one of :data:`MODES`' values, ``'LSTM'`` or ``'GRU'``.
        resets: bool ``(T, B)``: where true, the state is zero before that step.
        cells: whether the last layer's c of every step is wanted; of an LSTM only.

    ``c_n`` and ``cells`` are empty where there is none, or none was asked for.
    """
    if _is_exporting_to_onnx() and batch_sizes is None:
        return onnx.rnn(
            input,
            hx,
            cx,
            params,
            lengths,
            resets,
            mode,
            has_biases,
            num_layers,
            dropout,
            train,
            bidirectional,
            cells,
        )
    return torch.ops.charrnn_fast.rnn.default(  # type: ignore[no-any-return]
        input,
        hx,
        cx,
        list(params),
        batch_sizes,
        lengths,
        resets,
        mode,
        has_biases,
        num_layers,
        dropout,
        train,
        bidirectional,
        cells,
    )


def linear(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``F.linear``, by a kernel where all are float32 or float64 on the CPU.

    The bits of the result and of its gradients do not depend on the number of threads.
    """
    return cast(Tensor, torch.ops.charrnn_fast.linear.default(input, weight, bias))


def batch_first(output: Tensor) -> Tensor:
    """A result ``(T, B, H)`` as ``(B, T, H)``; not a view for autograd, unless compiled."""
    if type(output) is Tensor and not torch.compiler.is_compiling():
        return _C.batch_first(output)
    return output.transpose(0, 1)


def squeeze_step(output: Tensor) -> Tensor:
    """A result ``(1, B, H)`` as ``(B, H)``; not a view for autograd, unless compiled."""
    if type(output) is Tensor and not torch.compiler.is_compiling():
        return _C.squeeze_step(output)
    return output.squeeze(0)


def generate(
    tokens: Tensor,
    state: Tensor | None,
    cell_state: Tensor | None,
    params: Sequence[Tensor],
    head_weight: Tensor,
    head_bias: Tensor | None,
    uniforms: Tensor,
    mode: str,
    has_biases: bool,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """N characters for S streams in one call: a step of every layer, a linear head, a draw.

    Args:
        tokens: ``(S)`` int64, the last characters so far, which ``state`` has not seen.
        state: ``(layers, S, H)``; zeros when None.
        cell_state: the same for c, of a cell that has one; else None.
        params: the weights of a stack of one direction, as nn.RNN orders them.
        head_weight: ``(V, H)``.
        head_bias: ``(V)``, or None.
        uniforms: ``(N, S)`` in [0, 1), float32 or the dtype of the weights: where each draw
            inverts the cumulative distribution.
        mode: as in :func:`rnn`.
        has_biases: whether ``params`` has four tensors for a layer, or two.
        temperature: divides the scores; 0 takes the best one, the first of equals.
        top_k: only the k best scores, and ties with the last of them; 0: all.
        top_p: only the fewest characters, best first, whose probabilities reach p; 1: all.

    Returns:
        ``(drawn, state, cell_state)``: ids ``(N, S)``, and the state before the last of them was
        seen, so that calls can follow one another; ``cell_state`` is empty for a cell that has
        none. No gradient flows through them.

    Raises:
        IndexError: a token is outside ``[0, V)``; the message names it. On CUDA, where looking
            would mean waiting, its scores are NaN instead, and uniform numbers are not checked.
        ValueError: an option or a uniform number is out of range, or dtypes differ.
        RuntimeError: shapes or devices do not go together.
        NotImplementedError: the mode, the dtype or the device has no kernel (see
            :func:`generates`).
    """
    return torch.ops.charrnn_fast.generate.default(  # type: ignore[no-any-return]
        tokens,
        state,
        cell_state,
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


def generates(weight: Tensor, mode: str) -> bool:
    """Whether :func:`generate` has a kernel for this mode, and weights of this dtype and device."""
    if weight.device.type == "cuda":
        built = torch._C._dispatch_has_kernel_for_dispatch_key("charrnn_fast::generate", "CUDA")
        return built and weight.dtype == torch.float32 and mode in MODES.values()
    return weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.float64)


def why_composite(
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    weights: Sequence[Tensor],
    resets: Tensor | None,
    mode: str,
) -> str | None:
    """Why a call with these arguments takes the composite path, or None when the kernels serve it.

    This asks the rule by which the ops themselves decide.
    """
    return _C.why_composite(input, hx, cx, list(weights), resets, mode)


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


def plan(
    T: int, B: int, rows: int, I: int, H: int, directions: int, mode: str, *, backward: bool
) -> Plan:
    """The plan of the kernels for one layer of these sizes, by the function that they ask."""
    threads, split, at_once = _C.plan(T, B, rows, I, H, directions, mode, backward)
    return Plan(threads, split if threads > (2 if at_once else 1) else None, at_once)


def counters() -> dict[str, int]:
    """How many layers ran fused and composite, forward and backward, since the import."""
    return _C.counters()


def available_isas() -> list[str]:
    """The instruction sets that this CPU runs and this build holds kernels for, best first.

    Example:
        >>> import charrnn_fast
        >>> charrnn_fast.available_isas()[-1]  # every CPU of the architecture runs it
        'baseline'
    """
    return _C.isas()


def current_isa() -> str:
    """The instruction set in use: the best one, unless the environment variable
    ``CHARRNN_FAST_ISA`` or :class:`use_isa` named another.

    Example:
        >>> import charrnn_fast
        >>> charrnn_fast.current_isa() in charrnn_fast.available_isas()
        True
    """
    return _C.isa()


class use_isa(contextlib.AbstractContextManager["use_isa"]):
    """Selects an instruction set for the whole process: a call, or a ``with`` block that undoes it.

    Args:
        name: one of :func:`available_isas`.

    Raises:
        ValueError: the name is unknown, or this CPU does not run it.

    Example:
        >>> import charrnn_fast
        >>> before = charrnn_fast.current_isa()
        >>> with charrnn_fast.use_isa("baseline"):
        ...     charrnn_fast.current_isa()
        'baseline'
        >>> charrnn_fast.current_isa() == before
        True
    """

    def __init__(self, name: str) -> None:
        self._before = current_isa()
        _C.select_isa(name)

    def __exit__(self, *exception: object) -> None:
        _C.select_isa(self._before)


def build_info() -> dict[str, Any]:
    """Compiler, torch, OpenMP and instruction sets of this build, by name.

    Example:
        >>> import charrnn_fast
        >>> sorted(charrnn_fast.build_info())
        ['compiler', 'isas', 'openmp', 'torch']
    """
    return _C.build_info()


@contextlib.contextmanager
def assert_fused() -> Iterator[None]:
    """Fails when a layer inside the block ran composite, or none ran at all."""
    before = counters()
    yield
    ran = {name: count - before[name] for name, count in counters().items()}
    if ran["forward_composite"] or ran["backward_composite"] or not ran["forward_fused"]:
        raise AssertionError(f"expected fused kernels only, ran {ran}")
