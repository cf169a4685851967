"""``RNNCell``, ``LSTMCell`` and ``GRUCell``: ``torch.nn``'s, with the computation in kernels."""

from typing import Any, ClassVar, Optional

import torch
from torch import Tensor, nn
from torch._jit_internal import is_scripting

from charrnn_fast import ops
from charrnn_fast.fused import (
    ODD,
    Call,
    Fused,
    as_resets,
    describe,
    expect_dense,
    is_autocast,
    left_to_old_exporter,
    widened,
)
from charrnn_fast.tracing import fx_call, is_dense, is_foreign

_is_compiling = torch.compiler.is_compiling


class Cell(Fused, nn.RNNCellBase):
    """The base of the three cells, before torch.nn's class in their MRO.

    Beyond torch.nn's, an int64 input holds token ids standing for one-hot vectors, ``(B)`` or
    ``()`` unbatched; and ``reset``, a bool tensor of the same shape, tells where the state is zero
    before the step. A scripted or exported program that holds a cell needs ``import charrnn_fast``
    where it is loaded.
    """

    _ids_dim = 2
    _misnomers: ClassVar[dict[str, str]] = {
        "resets": "a cell's is called reset",
        "lengths": "a cell runs one step of every sequence, and has none",
    }

    def forward(
        self, input: Tensor, hx: Tensor | None = None, reset: Tensor | None = None
    ) -> Tensor:
        """One step.

        Args:
            input: ``(B, I)``, or ``(I)`` unbatched, of the dtype of the weights; or int64 token ids
                of that shape without I, each standing for a one-hot vector.
            hx: the state, ``(B, H)`` or ``(H)``; zeros when None.
            reset: bool, ``(B)`` or ``()``: whose state is zero before the step.

        Returns:
            The next state, of the shape of ``hx``.

        Raises:
            IndexError: a token id is outside ``[0, I)``; the message names it and its place.
            ValueError, RuntimeError: dimensions, sizes, dtypes or devices do not go together, with
                the message of torch.nn's class; ``reset`` is not bool.

        Example:
            >>> import torch, charrnn_fast
            >>> cell = charrnn_fast.GRUCell(10, 20)
            >>> x, h = torch.randn(3, 10), torch.randn(3, 20)
            >>> done = torch.tensor([False, True, False])
            >>> torch.equal(cell(x, h, reset=done)[1], cell(x)[1])
            True
        """
        if is_scripting():
            return self._scripted(input, hx, None, reset, self._script_mode())[0]
        return self._step(input, hx, reset)  # type: ignore[no-any-return]

    def _script_mode(self) -> str:
        """The op's name of the cell, for TorchScript; see mode_of."""
        raise NotImplementedError

    def _step(self, input: Tensor, hx: Any, reset: Any) -> Any:
        """``forward`` outside of TorchScript."""
        if not _is_compiling():
            result = ops.fast_cell(self, input, hx, reset)
            if result is not None:
                return result
            node = fx_call(self, input, hx, reset)
            if node is not None:
                return node
        weights = current_weights(self)
        if why_stock(self, input, hx, weights, reset) is not None:
            return self._stock_forward(input, hx)
        return run(self, prepare(self, input, hx, weights, reset))

    def _scripted(
        self, input: Tensor, hx: Tensor | None, cx: Tensor | None, reset: Tensor | None, mode: str
    ) -> tuple[Tensor, Tensor]:
        """What TorchScript runs; the op checks the sizes."""
        one = input.dim() == (0 if input.dtype == torch.int64 else 1)
        if one:
            input = input.unsqueeze(0)
            hx = None if hx is None else hx.unsqueeze(0)
            cx = None if cx is None else cx.unsqueeze(0)
            reset = None if reset is None else reset.unsqueeze(0)
        weights = [self.weight_ih, self.weight_hh]
        if self.bias:
            weights += [self.bias_ih, self.bias_hh]
        y, _, c_n, _ = torch.ops.charrnn_fast.rnn(
            input.unsqueeze(0),
            None if hx is None else hx.unsqueeze(0),
            None if cx is None else cx.unsqueeze(0),
            weights,
            None,
            None,
            None if reset is None else reset.unsqueeze(0),
            mode,
            self.bias,
            1,
            0.0,
            False,
            False,
            False,
        )
        h: Tensor = y.squeeze(0)
        c: Tensor = c_n.squeeze(0) if mode == "LSTM" else c_n
        if one:
            return h.squeeze(0), c.squeeze(0) if mode == "LSTM" else c
        return h, c


class RNNCell(Cell, nn.RNNCell):
    """One step of an Elman RNN, a drop-in for :class:`torch.nn.RNNCell`: the same arguments,
    attributes, ``state_dict`` and errors.

    Beyond ``nn.RNNCell`` it takes ``nonlinearity='sigmoid'``, token ids, and ``reset``; see
    :meth:`forward`. A scripted or exported program that holds it needs ``import charrnn_fast``
    where it is loaded.

    Args:
        input_size: features of a step, I; with token ids the size of the vocabulary.
        hidden_size: size of the state, H.
        bias: whether ``b_ih`` and ``b_hh`` are added.
        nonlinearity: ``'tanh'``, ``'relu'`` or ``'sigmoid'``.
        device: of the parameters.
        dtype: of the parameters: float32, float64, bfloat16 or float16 in the kernels.

    Example:
        >>> import torch, charrnn_fast
        >>> cell = charrnn_fast.RNNCell(10, 20)
        >>> h = torch.zeros(3, 20)
        >>> for x in torch.randn(5, 3, 10):
        ...     h = cell(x, h)
        >>> h.shape
        torch.Size([3, 20])
    """

    _stock = nn.RNNCell

    def _script_mode(self) -> str:
        return "RNN_" + self.nonlinearity.upper()


class GRUCell(Cell, nn.GRUCell):
    """One step of a GRU, a drop-in for :class:`torch.nn.GRUCell`: the same arguments, attributes,
    ``state_dict`` and errors.

    Beyond ``nn.GRUCell`` it takes token ids, and ``reset``; see :meth:`forward`. A
    scripted or exported program that holds it needs ``import charrnn_fast`` where it is loaded.

    Args:
        input_size: features of a step, I; with token ids the size of the vocabulary.
        hidden_size: size of the state, H.
        bias: whether ``b_ih`` and ``b_hh`` are added.
        device: of the parameters.
        dtype: of the parameters: float32, float64, bfloat16 or float16 in the kernels.

    Example:
        >>> import torch, charrnn_fast
        >>> cell = charrnn_fast.GRUCell(10, 20)
        >>> h = torch.zeros(3, 20)
        >>> for x in torch.randn(5, 3, 10):
        ...     h = cell(x, h)
        >>> h.shape
        torch.Size([3, 20])
    """

    _stock = nn.GRUCell

    def _script_mode(self) -> str:
        return "GRU"


class LSTMCell(Cell, nn.LSTMCell):
    """One step of an LSTM, a drop-in for :class:`torch.nn.LSTMCell`: the same arguments,
    attributes, ``state_dict`` and errors.

    Beyond ``nn.LSTMCell`` it takes token ids, and ``reset``; see :meth:`forward`. A
    scripted or exported program that holds it needs ``import charrnn_fast`` where it is loaded.

    Args:
        input_size: features of a step, I; with token ids the size of the vocabulary.
        hidden_size: size of the state, H.
        bias: whether ``b_ih`` and ``b_hh`` are added.
        device: of the parameters.
        dtype: of the parameters: float32, float64, bfloat16 or float16 in the kernels.

    Example:
        >>> import torch, charrnn_fast
        >>> cell = charrnn_fast.LSTMCell(10, 20)
        >>> state = None
        >>> for x in torch.randn(5, 3, 10):
        ...     state = cell(x, state)
        >>> h, c = state
        >>> h.shape, c.shape
        (torch.Size([3, 20]), torch.Size([3, 20]))
    """

    _stock = nn.LSTMCell

    def forward(  # type: ignore[override]
        self,
        input: Tensor,
        hx: tuple[Tensor, Tensor] | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One step.

        Args:
            input: ``(B, I)``, or ``(I)`` unbatched, of the dtype of the weights; or int64 token ids
                of that shape without I, each standing for a one-hot vector.
            hx: the states ``(h_0, c_0)``, each ``(B, H)`` or ``(H)``; zeros when None.
            reset: bool, ``(B)`` or ``()``: whose states are zero before the step.

        Returns:
            The next states ``(h_1, c_1)``, of the shapes of ``hx``.

        Raises:
            IndexError: a token id is outside ``[0, I)``; the message names it and its place.
            ValueError, RuntimeError: dimensions, sizes, dtypes or devices do not go together, with
                the message of :class:`torch.nn.LSTMCell`; ``reset`` is not bool.
        """
        if is_scripting():
            h: Optional[Tensor] = None  # noqa: UP045  TorchScript's
            c: Optional[Tensor] = None  # noqa: UP045
            if hx is not None:
                h, c = hx
            return self._scripted(input, h, c, reset, "LSTM")
        return self._step(input, hx, reset)  # type: ignore[no-any-return]


def has_pair(cell: Cell) -> bool:
    """Whether its state is (h, c)."""
    return isinstance(cell, nn.LSTMCell)


def mode_of(cell: Cell) -> str:
    """The op's ``mode`` of the cell; "" for an unknown nonlinearity."""
    if isinstance(cell, nn.RNNCell):
        known = isinstance(cell.nonlinearity, str)
        return ops.MODES.get(cell.nonlinearity, "") if known else ""
    return "LSTM" if has_pair(cell) else "GRU"


def current_weights(cell: Cell) -> list[Tensor]:
    """The weights as they are now: two tensors, or four with biases."""
    weights = [cell.weight_ih, cell.weight_hh]
    return weights if cell.bias_ih is None else [*weights, cell.bias_ih, cell.bias_hh]


def why_stock(cell: Cell, input: Any, hx: Any, weights: list[Tensor], reset: Any) -> str | None:
    """Why this step runs torch.nn's own forward, as a sentence; None where it runs the op.

    Raises:
        NotImplementedError: torch.nn's forward would run, and lacks what is asked for.
    """
    mode = mode_of(cell)
    if not mode or not isinstance(input, Tensor):
        return ODD  # refused
    compiling = _is_compiling()
    beyond = (
        "token ids"
        if input.dim() < 2 and input.dtype == torch.int64
        else "reset"
        if reset is not None
        else "sigmoid"
        if mode == "RNN_SIGMOID"
        else None
    )
    if not compiling and (why := left_to_old_exporter(cell, beyond)) is not None:
        return why
    if beyond is not None:
        return None
    if not compiling and is_foreign(input, hx, weights):
        return "a tensor is of a subclass that has its own rules"
    if not is_dense(input) or not _fits(cell, input, hx, weights):
        return ODD
    if not ops.serves_device(input.device.type, mode):
        return f"calls like torch.nn's on {input.device.type} are left to torch.nn"
    return None


def _fits(cell: Cell, input: Tensor, hx: Any, weights: list[Tensor]) -> bool:
    """Whether sizes, dtypes and devices are as they should be, with no conversion."""
    H, I = cell.hidden_size, cell.input_size
    G = ops.GATES[mode_of(cell)]
    expected = [(G * H, I), (G * H, H), (G * H,), (G * H,)]
    if (cell.bias_ih is None) != (cell.bias_hh is None):
        return False
    if any(weight.shape != shape for weight, shape in zip(weights, expected, strict=False)):
        return False
    if input.dim() not in (1, 2) or input.shape[-1] != I or input.device != weights[0].device:
        return False
    same_dtype = not is_autocast(input.device.type)
    if same_dtype and input.dtype != weights[0].dtype:
        return False
    if hx is None:
        return True
    states = hx
    if not has_pair(cell):
        states = (hx,)
    elif not isinstance(hx, (tuple, list)) or len(hx) != 2:
        return False
    return all(
        isinstance(state, Tensor)
        and is_dense(state)
        and state.shape == (*input.shape[:-1], H)
        and state.device == input.device
        # Autocast converts no float64, of which nn.LSTMCell makes results of float64.
        and (state.dtype == input.dtype if same_dtype else state.dtype != torch.float64)
        for state in states
    )


def prepare(cell: Cell, input: Tensor, hx: Any, weights: list[Tensor], reset: Any) -> Call:
    """The arguments of the op for a sequence of one step.

    Raises:
        ValueError, RuntimeError: dimensions, or what ``reset`` is, are not as they should be.
    """
    name = cell._stock.__name__
    expect_dense(name, input=input, hx=hx, reset=reset)
    tokens = input.dim() < 2 and input.dtype == torch.int64
    dim = input.dim() + (1 if tokens else 0)
    if dim not in (1, 2):
        raise ValueError(f"{name}: Expected input to be 1D or 2D, got {input.dim()}D instead")
    states = [] if hx is None else [hx]
    if has_pair(cell) and hx is not None:
        if not isinstance(hx, (tuple, list)) or len(hx) != 2:
            got = f"{len(hx)} of them" if isinstance(hx, (tuple, list)) else type(hx).__name__
            raise RuntimeError(f"{name}: hx must be a pair (h_0, c_0), got {got}")
        states = list(hx)
    for state in states:
        if state.dim() != dim:
            raise ValueError(
                f"{name}: Expected hidden to be {dim}D beside this input, "
                f"got {state.dim()}D instead"
            )
    if reset is not None:
        reset = as_resets(name, "reset", reset, tuple(input.shape[: dim - 1]))

    def one_step(tensor: Tensor) -> Tensor:
        return tensor.unsqueeze(0) if dim == 2 else tensor.unsqueeze(0).unsqueeze(0)

    h0, c0 = (*map(one_step, states), None, None)[:2]
    resets = None if reset is None else one_step(reset)
    return Call(one_step(input), h0, c0, weights, None, None, resets, None, dim == 2)


def run(cell: Cell, call: Call) -> Any:
    """The op, and its results as torch.nn's class gives them."""
    y, _, c_n, _ = ops.rnn(
        call.data,
        call.h0,
        call.c0,
        call.weights,
        None,
        None,
        call.resets,
        mode_of(cell),
        len(call.weights) == 4,
        1,
        0.0,
        False,
        False,
        False,
    )
    states = [ops.squeeze_step(state) for state in ([y, c_n] if has_pair(cell) else [y])]
    if ops.GATES[mode_of(cell)] > 1:
        states = widened(call, call.c0 if has_pair(cell) else call.h0, states)
    if not call.batched:
        states = [state.squeeze(0) for state in states]
    return tuple(states) if has_pair(cell) else states[0]


describe(RNNCell)
describe(GRUCell, "GRU")
describe(LSTMCell, "LSTM", pair=True)
