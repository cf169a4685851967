"""What the modules of recurrent.py and the cells of cell.py share: the fast path, which is
csrc/short_way.cpp, and what they ask of their arguments where a call does not take it.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from charrnn_fast import ops
from charrnn_fast.tracing import is_dense

_is_compiling = torch.compiler.is_compiling

# Methods that the forward of torch.nn's classes calls, and that a subclass or an instance may have
# overridden. The fast path calls none of them, and so is not taken then.
HOOKS = (
    "_update_flat_weights",
    "check_forward_args",
    "check_hidden_size",
    "check_input",
    "get_expected_cell_size",
    "get_expected_hidden_size",
    "permute_hidden",
)


class Fused(nn.Module):
    """Mixed in before a class of torch.nn: takes the fast path where no hook or trace can tell."""

    accepts_tokens = True  # by which charlm tells these modules from torch.nn's
    _stock: ClassVar[type[nn.Module]]  # torch.nn's class
    _kind: ClassVar[int]  # the number of the class's description in csrc/short_way.cpp
    _hooked = False  # whether a subclass overrides one of HOOKS, or __call__
    _ids_dim: ClassVar[int]  # an input of fewer dimensions may be token ids
    # Keyword arguments that one looks for here, and what to do about them.
    _misnomers: ClassVar[dict[str, str]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        stock = getattr(cls, "_stock", None)
        if stock is not None:
            cls._hooked = (
                any(getattr(cls, name, None) is not getattr(stock, name, None) for name in HOOKS)
                or super().__call__ is not stock.__call__  # another base has its own
            )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if _is_compiling():
            return super().__call__(*args, **kwargs)
        # Most of what nn.Module does is to ask whether there is anything to do.
        result = ops.fast_call(self, args, kwargs)
        if result is not None:
            return result
        try:
            return super().__call__(*args, **kwargs)
        except TypeError as error:
            for given in self._misnomers.keys() & kwargs.keys():
                if f"unexpected keyword argument '{given}'" in str(error):
                    raise TypeError(f"{error} ({self._misnomers[given]})") from error
            raise

    def _stock_forward(self, input: Any, hx: Any) -> Any:
        """torch.nn's own forward; what it refuses without naming the argument is named."""
        if _is_compiling():
            return super().forward(input, hx)
        if isinstance(self, (nn.LSTM, nn.LSTMCell)) and isinstance(hx, (tuple, list)):
            _expect_device(data_of(input), hx[1:])
        try:
            return super().forward(input, hx)
        except (RuntimeError, ValueError) as error:
            complaint = _complaint(self, input, hx, str(error))
            if complaint is None:
                raise
            raise type(error)(complaint) from error


def _expect_device(data: Any, cells: Any) -> None:
    """Refuses a c of another device: torch 2.9 looks at h alone, and then reads memory of its own
    that c does not have."""
    for c in cells:
        if isinstance(c, Tensor) and isinstance(data, Tensor) and c.device != data.device:
            raise RuntimeError(
                "Input and hidden tensors are not at the same device, found input tensor at "
                f"{data.device} and hidden tensor at {c.device}"
            )


def _complaint(module: Fused, input: Any, hx: Any, error: str) -> str | None:
    """What is wrong with a call that torch.nn refused, where its own words do not help."""
    name = module._stock.__name__
    data = data_of(input)
    try:
        expect_dense(name, input=data, hx=hx)
    except RuntimeError as refusal:
        return str(refusal)
    if (
        isinstance(data, Tensor)
        and data.dim() < (2 if isinstance(input, PackedSequence) else module._ids_dim)
        and data.dtype in OTHER_INTEGERS
    ):
        return (
            f"{name}: an input of {data.dtype} holds neither token ids, which are int64 (convert "
            f"them by input.long()), nor values of the weights' dtype"
        )
    if error.startswith("Unknown nonlinearity"):
        return f"{error}. {SELECT_NONLINEARITY}"
    return None


# Dtypes that one keeps ids in to save memory; torch.nn says of them to convert them to floats.
OTHER_INTEGERS = (
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
)

SELECT_NONLINEARITY = "Select from 'tanh', 'relu' or 'sigmoid'."


def describe(ours: type[Fused], mode: str = "", *, pair: bool = False) -> None:
    """Registers a class with the fast path.

    Args:
        ours: one of our classes, below torch.nn's and Fused.
        mode: the op's; empty where the nonlinearity of a module tells.
        pair: whether the state is (h, c).
    """
    is_cell = issubclass(ours, nn.RNNCellBase)
    cuda = not mode and ops.has_cuda_kernels()
    gates = ops.GATES[mode] if mode else 1
    ours._kind = ops.describe(ours, ours._stock, is_cell, pair, cuda, gates, mode, list(HOOKS))


def is_hooked(module: Fused) -> bool:
    """Whether checks of torch.nn are overridden, by the class or in the instance."""
    return module._hooked or (
        not _is_compiling() and any(name in module.__dict__ for name in HOOKS)
    )


# What explain() says of it, unless torch.nn refuses the call: then it says that.
ODD = "torch.nn broadcasts or converts these arguments, which the kernels do not"


def left_to_old_exporter(module: Fused, beyond: str | None) -> str | None:
    """Why a call is torch.nn's while the older ONNX exporter runs: it does not know our ops.

    Raises:
        NotImplementedError: the call has something ``beyond`` torch.nn.
    """
    # The older exporter traces. Whoever does not export is spared the import of torch.onnx.
    if not (torch._C._is_tracing() and torch.onnx.is_in_onnx_export()):
        return None
    if beyond is not None:
        raise NotImplementedError(
            f"{module._stock.__name__}: the older ONNX exporter cannot write {beyond}; "
            "use torch.onnx.export(..., dynamo=True)"
        )
    return "the older ONNX exporter knows torch.nn's ops only"


class Call(NamedTuple):
    """The arguments of the op, and what turns its results into the module's."""

    data: Tensor  # (T, B, I), or ids (T, B); or the rows of packed data
    h0: Tensor | None  # (layers * directions, B, H)
    c0: Tensor | None
    weights: list[Tensor]
    batch_sizes: Tensor | None
    lengths: Tensor | None  # (B)
    resets: Tensor | None  # (T, B)
    packed: PackedSequence | None
    batched: bool


def data_of(input: Any) -> Any:
    """The tensor of values."""
    return input.data if isinstance(input, PackedSequence) else input


def is_autocast(device: str) -> bool:
    """Whether autocast converts what the ops are given."""
    # Dynamo of torch 2.9 cannot ask the one; the other is an error for a device without autocast.
    available = device != "meta" if _is_compiling() else torch.amp.is_autocast_available(device)
    return available and torch.is_autocast_enabled(device)


def widened(call: Call, carried: Tensor | None, results: list[Tensor]) -> list[Tensor]:
    """What torch.nn's GRU and cells make of autocast: a state that is carried from step to step
    elementwise keeps its dtype, and so do the results."""
    if not is_autocast(call.data.device.type):
        return results
    if carried is not None:
        before = carried.dtype
    else:  # torch.nn's zeros
        before = (call.data if call.data.is_floating_point() else call.weights[0]).dtype
    return [result.to(torch.promote_types(before, result.dtype)) for result in results]


def expect_dense(name: str, **arguments: Any) -> None:
    """Refuses the arguments of a module of this name that hold a sparse or a nested tensor."""
    for argument, value in arguments.items():
        for part in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(part, Tensor) and not is_dense(part):
                layout = "nested" if part.is_nested else part.layout
                raise RuntimeError(f"{name}: {argument} must be a dense tensor, got a {layout} one")


def own_tensor(argument: str, value: Any) -> Tensor:
    """A tensor of an array's or a list's values, and no view of them: backward reads them again."""
    if isinstance(value, Tensor):
        return value
    try:
        return torch.tensor(value)
    except (RuntimeError, TypeError, ValueError) as error:
        message = f"{argument} must be a tensor, or what makes one, got {type(value).__name__}"
        raise type(error)(f"{message}: {error}") from None


def as_resets(name: str, argument: str, resets: Any, shape: tuple[int, ...]) -> Tensor:
    """``resets`` of a module of this name, whose shape must be this one."""
    result = own_tensor(argument, resets)
    if result.dtype != torch.bool:
        raise ValueError(f"{name}: {argument} must be of dtype torch.bool, got {result.dtype}")
    if tuple(result.shape) != shape:
        raise RuntimeError(
            f"{name}: Expected {argument} of size {list(shape)}, got {list(result.shape)}"
        )
    return result
