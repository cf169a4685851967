"""What ``RNN``, ``LSTM`` and ``GRU`` share. A call takes one of three paths:

- the fast path, csrc/short_way.cpp: plain calls, which are most of them;
- torch.nn's own forward, for what it alone serves, or refuses with its own message;
- ``prepare``, then ``run``: everything else.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from charrnn_fast import ops
from charrnn_fast.fused import (
    ODD,
    Call,
    Fused,
    as_resets,
    data_of,
    expect_dense,
    is_autocast,
    is_hooked,
    left_to_old_exporter,
    own_tensor,
    widened,
)
from charrnn_fast.tracing import fx_call, is_dense, is_foreign

_is_compiling = torch.compiler.is_compiling

State = Tensor | tuple[Tensor, Tensor]


class Recurrent(Fused, nn.RNNBase):
    """The base of our three, before torch.nn's class among theirs."""

    _ids_dim = 3
    _misnomers: ClassVar[dict[str, str]] = {
        "reset": "a module's is called resets",
        "length": "it is called lengths",
    }

    def _forward(
        self,
        input: Tensor | PackedSequence,
        hx: State | None,
        lengths: Any,
        resets: Tensor | None,
        cells: Any = False,
    ) -> Any:
        """``forward`` outside of TorchScript: ``(output, state)``, and the cell states if asked."""
        compiling = _is_compiling()
        if not compiling:
            if not self._hooked:
                result = ops.fast_forward(self, input, hx, lengths, resets, cells)
                if result is not None:
                    return result
            node = fx_call(self, input, hx, lengths, resets, None if cells is False else cells)
            if node is not None:
                return node
        # The older exporter to ONNX makes tensors of all arguments.
        if not isinstance(cells, bool) and not torch._C._is_tracing():
            raise TypeError(
                f"{self._stock.__name__}: return_cell_states must be a bool, "
                f"got {type(cells).__name__}"
            )
        weights = self._current_weights()
        if why_stock(self, input, hx, weights, lengths, resets, cells) is not None:
            if isinstance(input, PackedSequence) and not compiling and not self._hooked:
                _check_packed(self, input, hx)
            return self._stock_forward(input, hx)
        return run(self, prepare(self, input, hx, weights, lengths, resets), cells)

    def _scripted(
        self,
        input: Tensor,
        hx: Tensor | None,
        cx: Tensor | None,
        batch_sizes: Tensor | None,
        sorted_indices: Tensor | None,
        unsorted_indices: Tensor | None,
        lengths: Tensor | None,
        resets: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What TorchScript runs: output, h_n, c_n. The op checks the sizes."""
        padded = batch_sizes is None
        one = padded and input.dim() == (1 if input.dtype == torch.int64 else 2)
        swap = padded and self.batch_first and not one
        hx, cx = batched_state(hx, one, sorted_indices), batched_state(cx, one, sorted_indices)
        if lengths is not None:
            if one and lengths.dim() == 0:
                lengths = lengths.unsqueeze(0)
            if not lengths.is_floating_point() and lengths.dtype != torch.bool:
                lengths = lengths.to(torch.int64)
        if resets is not None:
            resets = resets.unsqueeze(1) if one else resets
            resets = resets.transpose(0, 1) if swap else resets
        if one:
            input = input.unsqueeze(1)
        output, h_n, c_n, _ = torch.ops.charrnn_fast.rnn(
            input.transpose(0, 1) if swap else input,
            hx,
            cx,
            self._flat_weights,
            batch_sizes,
            lengths,
            resets,
            self.mode,
            self.bias,
            self.num_layers,
            self.dropout,
            self.training,
            self.bidirectional,
            False,
        )
        has_state = self.mode == "LSTM"
        if one:
            return output.squeeze(1), h_n.squeeze(1), c_n.squeeze(1) if has_state else c_n
        if unsorted_indices is not None:
            h_n = h_n.index_select(1, unsorted_indices)
            c_n = c_n.index_select(1, unsorted_indices) if has_state else c_n
        return output.transpose(0, 1) if swap else output, h_n, c_n

    def _current_weights(self) -> list[Tensor]:
        """The weights as torch.nn finds them: parametrized, pruned, swapped or plain."""
        if _is_compiling():
            # By name: Dynamo would guard each element of the flat list.
            return [getattr(self, name) for name in self._flat_weights_names]
        self._update_flat_weights()
        return self._flat_weights  # type: ignore[return-value]


def batched_state(state: Tensor | None, one: bool, order: Tensor | None) -> Tensor | None:
    """A state as the op takes it: with a batch, in the order of the packed sequences."""
    if state is not None:
        if one:
            return state.unsqueeze(1)
        if order is not None:
            return state.index_select(1, order)
    return state


def has_pair(module: nn.RNNBase) -> bool:
    """Whether its state is (h, c)."""
    return module.mode == "LSTM"


def are_tokens(input: Tensor | PackedSequence) -> bool:
    """Whether the input holds ids. torch.nn refuses integers of more dimensions."""
    data = data_of(input)
    dim = 2 if isinstance(input, PackedSequence) else 3
    return bool(data.dim() < dim and data.dtype == torch.int64)


def beyond_torch(
    module: Recurrent, input: Any, lengths: Any, resets: Any, cells: bool
) -> str | None:
    """The first thing about a call that torch.nn's class does not know, or None."""
    if are_tokens(input):
        return "token ids"
    if lengths is not None:
        return "lengths"
    if resets is not None:
        return "resets"
    if cells:
        return "return_cell_states"
    return "sigmoid" if module.mode == "RNN_SIGMOID" else None


def why_stock(
    module: Recurrent,
    input: Any,
    hx: Any,
    weights: list[Tensor],
    lengths: Any,
    resets: Any,
    cells: bool,
) -> str | None:
    """Why this call is torch.nn's own forward's, as a sentence; None when it is the op's.

    Raises:
        NotImplementedError: it would be torch.nn's, and asks for what that does not know.
    """
    data = data_of(input)
    if not isinstance(data, Tensor):
        return ODD
    compiling = _is_compiling()
    beyond = beyond_torch(module, input, lengths, resets, cells)
    if module.proj_size:
        if beyond is not None:
            raise NotImplementedError(
                f"{module._stock.__name__}: {beyond} cannot be combined with proj_size"
            )
        return "proj_size is left to torch.nn"
    if not compiling and (why := left_to_old_exporter(module, beyond)) is not None:
        return why
    if beyond is not None:
        return None
    if not compiling:
        if not all(isinstance(weight, Tensor) for weight in weights):
            return ODD
        if is_foreign(data, hx, weights):
            return "a tensor is of a subclass that has its own rules"
        if not is_dense(data) or _has_odd_biases(module, weights):
            return ODD
    # Overridden checks are asked by prepare, once.
    if not is_hooked(module) and not _fits(module, input, hx, weights):
        return ODD
    if not ops.serves_device(data.device.type, module.mode):
        return f"calls like torch.nn's on {data.device.type} are left to torch.nn"
    return None


def _fits(
    module: Recurrent, input: Tensor | PackedSequence, hx: State | None, weights: list[Tensor]
) -> bool:
    """Whether dimensions, sizes, dtypes and devices are as they should be, with no conversion.

    What does not fit is torch.nn's to refuse, or to serve all the same.
    """
    data = data_of(input)
    packed = isinstance(input, PackedSequence)
    dim = data.dim()
    if dim not in ((2,) if packed else (2, 3)) or data.shape[-1] != module.input_size:
        return False
    if not _is_compiling() and data.shape[1 if module.batch_first and dim == 3 else 0] == 0:
        return False  # no steps
    device = data.device
    if weights[0].device != device:
        return False
    same_dtype = not is_autocast(device.type)
    if same_dtype and data.dtype != weights[0].dtype:
        return False
    if hx is None:
        return True
    states: Any = hx
    if not has_pair(module):
        states = (hx,)
    elif not isinstance(hx, (tuple, list)) or len(hx) != 2:
        return False
    rows = module.num_layers * (2 if module.bidirectional else 1)
    for state in states:
        if not isinstance(state, Tensor) or state.dim() != (3 if packed else dim):
            return False
        if not is_dense(state):
            return False
        if state.device != device or (same_dtype and state.dtype != data.dtype):
            return False
        if state.shape[0] != rows or state.shape[-1] != module.hidden_size:
            return False
        if isinstance(input, PackedSequence):
            # Those that are sorted first have the right batch after that, or an error of it.
            ready = not _is_compiling() and input.sorted_indices is None
            if ready and state.shape[1] != int(input.batch_sizes[0]):
                return False
        elif dim == 3 and state.shape[1] != data.shape[0 if module.batch_first else 1]:
            return False
    return True


def _has_odd_biases(module: Recurrent, weights: list[Tensor]) -> bool:
    """Whether torch.nn would have to broadcast a bias."""
    expected = (ops.GATES[module.mode] * module.hidden_size,)
    return module.bias and any(
        bias.shape != expected
        for first in range(2, len(weights), 4)
        for bias in weights[first : first + 2]
    )


def prepare(
    module: Recurrent,
    input: Tensor | PackedSequence,
    hx: Any,
    weights: list[Tensor],
    lengths: Any = None,
    resets: Any = None,
) -> Call:
    """The arguments of the op, checked in the order and with the errors of torch.nn's class.

    Raises:
        ValueError, RuntimeError: dimensions, sizes or dtypes do not go together, as in torch.nn;
            of ``lengths`` and ``resets`` likewise, the message names them.
    """
    name = module._stock.__name__
    data: Tensor = data_of(input)
    expect_dense(name, input=data, hx=hx, lengths=lengths, resets=resets)
    tokens = are_tokens(input)
    pair = has_pair(module)
    batch_sizes = packed = sorted_indices = None
    batched = True
    if isinstance(input, PackedSequence):
        packed = input
        _, batch_sizes, sorted_indices, _ = input
        for argument, given in (("lengths", lengths), ("resets", resets)):
            if given is not None:
                raise ValueError(
                    f"{name}: {argument} cannot be given with a PackedSequence: pad the batch, "
                    "and give lengths="
                )
    else:
        dim = data.dim() + (1 if tokens else 0)
        if dim not in (2, 3):
            expected = "token ids to be 1D or 2D" if tokens else "input to be 2D or 3D"
            raise ValueError(f"{name}: Expected {expected}, got {data.dim()}D tensor instead")
        batched = dim == 3
        if not batched:
            data = data.unsqueeze(0 if module.batch_first else 1)
    state = None if hx is None else _states(module, hx, batched)
    if state is not None and (packed is not None or not pair):
        state = _permuted(module, state, sorted_indices)
    _check(module, data, state, batch_sizes, tokens, weights)
    if state is not None and packed is None and pair:  # torch.nn's order
        state = _permuted(module, state, None)

    major = data.transpose(0, 1) if module.batch_first and packed is None else data
    if lengths is not None:
        lengths = as_lengths(lengths, batched)
    if resets is not None:
        shape = tuple(data.shape[:2] if batched else major.shape[:1])
        resets = as_resets(name, "resets", resets, shape)
        if not batched:
            resets = resets.unsqueeze(1)
        elif module.batch_first:
            resets = resets.transpose(0, 1)
    if not _is_compiling():
        major = major.contiguous()  # see csrc/short_way.cpp
    h0, c0 = (*(state or ()), None, None)[:2]
    return Call(major, h0, c0, weights, batch_sizes, lengths, resets, packed, batched)


def run(module: Recurrent, call: Call, cells: bool) -> Any:
    """The op, and its results as torch.nn's class gives them."""
    output, h_n, c_n, every_c = ops.rnn(
        call.data,
        call.h0,
        call.c0,
        call.weights,
        call.batch_sizes,
        call.lengths,
        call.resets,
        module.mode,
        module.bias,
        module.num_layers,
        float(module.dropout),
        module.training,
        module.bidirectional,
        cells,
    )
    if module.mode == "GRU":
        output, h_n = widened(call, call.h0, [output, h_n])
    elif has_pair(module) and not _is_onednns(call):
        output, h_n, c_n, every_c = widened(call, call.c0, [output, h_n, c_n, every_c])
    rows = [output, every_c] if cells else [output]
    states = [h_n, c_n] if has_pair(module) else [h_n]
    unsorted_indices = None
    results: list[Any] = []
    if call.packed is not None:
        _, batch_sizes, sorted_indices, unsorted_indices = call.packed
        for row in rows:
            results.append(PackedSequence(row, batch_sizes, sorted_indices, unsorted_indices))
    else:
        for row in rows:
            if module.batch_first:
                row = ops.batch_first(row)
            results.append(row if call.batched else row.squeeze(0 if module.batch_first else 1))
        if not call.batched:
            states = [state.squeeze(1) for state in states]
    state: Any = tuple(states) if has_pair(module) else states[0]
    return (results[0], module.permute_hidden(state, unsorted_indices), *results[1:])


def _is_onednns(call: Call) -> bool:
    """Whether nn.LSTM leaves a call under autocast to oneDNN, whose results are of the lower
    precision. Of inputs in that precision already, it does so on some CPUs only."""
    return call.packed is None and call.data.dtype in (torch.float32, torch.int64)


def as_lengths(lengths: Any, batched: bool) -> Tensor:
    """Integers of any dtype as the op takes them; the op refuses other types."""
    result = own_tensor("lengths", lengths)
    other = (torch.int64, torch.bool)
    if result.dtype not in other and not result.is_floating_point() and not result.is_complex():
        result = result.to(torch.int64)
    return result.unsqueeze(0) if result.dim() == 0 and not batched else result


def _check_packed(module: Recurrent, input: PackedSequence, hx: Any) -> None:
    """What nn.LSTM, some versions of it, does not look at: it computes with what lies past the end,
    or dies."""
    if not has_pair(module) or input.data.dim() != 2:
        return
    if input.data.shape[-1] != module.input_size:
        module.check_input(input.data, input.batch_sizes)
    rows = module.num_layers * (2 if module.bidirectional else 1)
    for state in hx if isinstance(hx, (tuple, list)) else ():
        if isinstance(state, Tensor) and state.dim() == 3 and state.shape[0] < rows:
            raise IndexError(
                f"select(): index {state.shape[0]} out of range for tensor of size "
                f"{list(state.shape)} at dimension 0"
            )
    if input.sorted_indices is None and isinstance(hx, (tuple, list)):
        B = int(input.batch_sizes[0])
        if any(isinstance(h, Tensor) and h.dim() == 3 and h.shape[1] > B for h in hx):
            module.check_forward_args(input.data, (hx[0], hx[1]), input.batch_sizes)  # type: ignore[arg-type]


def _states(module: Recurrent, hx: Any, batched: bool) -> tuple[Tensor, ...]:
    """One state or two, of three dimensions."""
    dim = 3 if batched else 2
    kind = "batched 3-D" if batched else "unbatched 2-D"
    states: tuple[Tensor, ...]
    if has_pair(module):
        if len(hx) != 2:
            raise RuntimeError("lstm expects two hidden states")
        states = (hx[0], hx[1])
        if any(state.dim() != dim for state in states):
            raise RuntimeError(
                f"For {kind} input, hx and cx should also be {dim}-D but got "
                f"({hx[0].dim()}-D, {hx[1].dim()}-D) tensors"
            )
    else:
        states = (hx,)
        if hx.dim() != dim:
            raise RuntimeError(
                f"For {kind} input, hx should also be {dim}-D but got {hx.dim()}-D tensor"
            )
    return states if batched else tuple(state.unsqueeze(1) for state in states)


def _permuted(
    module: Recurrent, state: tuple[Tensor, ...], indices: Tensor | None
) -> tuple[Tensor, ...]:
    if has_pair(module):
        return tuple(module.permute_hidden(state, indices))  # type: ignore[arg-type]
    return (module.permute_hidden(state[0], indices),)


def _check(
    module: Recurrent,
    data: Tensor,
    state: tuple[Tensor, ...] | None,
    batch_sizes: Tensor | None,
    tokens: bool,
    weights: list[Tensor],
) -> None:
    """torch.nn's own checks of input and hx; what token ids lack is left out."""
    pair = has_pair(module)
    if not tokens and is_hooked(module):
        if pair and batch_sizes is not None:
            return  # which nn.LSTM does not check
        if state is None:  # torch.nn checks its default
            batch = 0 if module.batch_first else 1
            B = data.shape[batch] if batch_sizes is None else int(batch_sizes[0])
            layers = module.num_layers * (2 if module.bidirectional else 1)
            zeros = data.new_zeros(layers, B, module.hidden_size)
            state = (zeros, zeros.clone()) if pair else (zeros,)
        module.check_forward_args(data, state if pair else state[0], batch_sizes)  # type: ignore[arg-type]
        return
    if not tokens and not _is_compiling():
        module.check_input(data, batch_sizes)
    elif not tokens:
        # The same checks, without the list of flat weights.
        if data.dtype != weights[0].dtype and not is_autocast(data.device.type):
            raise ValueError(
                f"RNN input dtype ({data.dtype}) does not match weight dtype ({weights[0].dtype})."
            )
        if data.shape[-1] != module.input_size:
            raise RuntimeError(
                "input.size(-1) must be equal to input_size. "
                f"Expected {module.input_size}, got {data.shape[-1]}"
            )
    if state is None or (batch_sizes is not None and _is_compiling()):
        return  # the op checks the batch of a packed sequence
    expected = module.get_expected_hidden_size(data, batch_sizes)
    for i, each in enumerate(state):
        which = f"hidden[{i}]" if pair else "hidden"
        module.check_hidden_size(each, expected, f"Expected {which} size {{}}, got {{}}")
