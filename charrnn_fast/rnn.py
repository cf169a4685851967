"""``RNN``: ``torch.nn``'s, with the computation in fused kernels."""

from typing import Any, overload

import torch
from torch import Tensor, nn
from torch._jit_internal import _overload_method, is_scripting
from torch.nn.utils.rnn import PackedSequence

from charrnn_fast import ops
from charrnn_fast.tracing import fx_call, is_dense, is_foreign

_is_compiling = torch.compiler.is_compiling

# What nn.RNN's forward asks of itself, which a subclass may have overridden. The short way asks
# nothing; csrc/short_way.cpp has the same list, for attributes of one instance.
_HOOKS = (
    "_update_flat_weights",
    "check_forward_args",
    "check_hidden_size",
    "check_input",
    "get_expected_hidden_size",
    "permute_hidden",
)


class RNN(nn.RNN):
    """Drop-in for :class:`torch.nn.RNN`, whose arguments, attributes and errors it keeps.

    Beyond ``nn.RNN``:

    - ``nonlinearity`` may also be ``'sigmoid'``;
    - an int64 input holds token ids standing for one-hot vectors: ``(T, B)``, or ``(B, T)`` with
      ``batch_first``, or ``(T)`` unbatched;
    - ``lengths``, an int64 tensor of shape ``(B)`` on the CPU, bounds each sequence of a padded
      batch: outputs past a sequence's end are zero, and ``h_n`` is the state at its end. The
      result and the gradients are those of a packed sequence, without packing.

    Raises:
        IndexError: a token id is outside ``[0, input_size)``; the message names it.
        ValueError: a length is outside ``[1, T]``.
    """

    accepts_tokens = True  # what charlm asks, instead of asking for the class
    _hooked = False  # whether a subclass overrides one of _HOOKS

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._hooked = (
            any(getattr(cls, name) is not getattr(nn.RNN, name) for name in _HOOKS)
            or super().__call__ is not nn.RNN.__call__  # another base has its own
        )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        nonlinearity = args[3] if len(args) > 3 else kwargs.get("nonlinearity", "tanh")
        if nonlinearity == "sigmoid":
            # nn.RNN's constructor knows two; the mode is all that differs.
            if len(args) > 3:
                args = (*args[:3], "tanh", *args[4:])
            else:
                kwargs["nonlinearity"] = "tanh"
        super().__init__(*args, **kwargs)
        if nonlinearity == "sigmoid":
            self.nonlinearity = "sigmoid"
            self.mode = ops.MODES["sigmoid"]

    def extra_repr(self) -> str:
        text: str = super().extra_repr()
        return text + (", nonlinearity=sigmoid" if self.mode == "RNN_SIGMOID" else "")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Most of what nn.Module does is to ask whether there is anything to do.
        if not _is_compiling():
            result = ops.fast_call(self, args, kwargs)
            if result is not None:
                return result
        return super().__call__(*args, **kwargs)

    # TorchScript compiles forward once for each kind of input, as it does nn.RNN's.
    @overload
    @_overload_method
    def forward(
        self, input: Tensor, hx: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    @_overload_method
    def forward(
        self, input: PackedSequence, hx: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[PackedSequence, Tensor]: ...

    def forward(self, input: Any, hx: Any = None, lengths: Any = None) -> Any:
        """Runs the stack of layers.

        Args:
            input: ``(T, B, input_size)``, ``(T, input_size)``, token ids, or a packed sequence;
                batch comes first where ``batch_first`` says so.
            hx: ``(num_layers * directions, B, hidden_size)`` initial state; zeros when None.
            lengths: ``(B)`` steps of each sequence of a padded batch; all of them when None.

        Returns:
            ``(output, h_n)`` as :class:`torch.nn.RNN` returns them.
        """
        if is_scripting():
            if isinstance(input, PackedSequence):
                data, batch_sizes, sorted_indices, unsorted_indices = input
                h0 = None if hx is None else self.permute_hidden(hx, sorted_indices)
                output, h_n = self._scripted(data, h0, batch_sizes, lengths)
                packed = PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices)
                return packed, self.permute_hidden(h_n, unsorted_indices)
            return self._scripted(input, hx, None, lengths)
        if not self._hooked and not _is_compiling():
            result = ops.fast_forward(self.__dict__, input, hx, lengths)
            if result is not None:
                return result
        return self._checked_forward(input, hx, lengths)

    def _scripted(
        self, input: Tensor, hx: Tensor | None, batch_sizes: Tensor | None, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """What TorchScript runs; the op checks the sizes."""
        padded = batch_sizes is None
        one = padded and input.dim() == (1 if input.dtype == torch.int64 else 2)
        if one:
            input = input.unsqueeze(1)
            hx = None if hx is None else hx.unsqueeze(1)
        swap = padded and self.batch_first and not one
        output, h_n, _, _ = torch.ops.charrnn_fast.rnn(
            input.transpose(0, 1) if swap else input,
            hx,
            None,
            self._flat_weights,
            batch_sizes,
            lengths,
            None,
            self.mode,
            self.bias,
            self.num_layers,
            self.dropout,
            self.training,
            self.bidirectional,
            False,
        )
        if one:
            return output.squeeze(1), h_n.squeeze(1)
        return output.transpose(0, 1) if swap else output, h_n

    def _checked_forward(
        self, input: Tensor | PackedSequence, hx: Tensor | None, lengths: Any
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """The long way: every kind of input, nn.RNN's checks in nn.RNN's order."""
        if not _is_compiling() and (node := fx_call(self, input, hx, lengths)) is not None:
            return node  # type: ignore[no-any-return]
        weights = self._current_weights()
        packed = isinstance(input, PackedSequence)
        data: Tensor = input.data if isinstance(input, PackedSequence) else input
        # Integers of more dimensions are no ids: nn.RNN's checks complain of them.
        tokens = data.dim() < (2 if packed else 3) and data.dtype == torch.int64
        if not _is_compiling():
            stock = lengths is None and self.mode != "RNN_SIGMOID" and not tokens
            unusable = not all(isinstance(weight, Tensor) for weight in weights)  # raises
            # The older ONNX exporter knows nn.RNN's op, and not ours.
            to_onnx = torch.onnx.is_in_onnx_export()
            if stock and (
                unusable
                or to_onnx
                or is_foreign(data, hx, weights)
                or not is_dense(data)
                or self._has_odd_biases(weights)
            ):
                return super().forward(input, hx)

        batch_sizes = sorted_indices = unsorted_indices = None
        batched = True
        if isinstance(input, PackedSequence):
            data, batch_sizes, sorted_indices, unsorted_indices = input
            if lengths is not None:
                raise ValueError("RNN: lengths cannot be given with a PackedSequence")
        else:
            dim = data.dim() + (1 if tokens else 0)
            if dim not in (2, 3):
                expected = "token ids to be 1D or 2D" if tokens else "input to be 2D or 3D"
                raise ValueError(f"RNN: Expected {expected}, got {data.dim()}D tensor instead")
            batched = dim == 3
            if not batched:
                data = data.unsqueeze(0 if self.batch_first else 1)
                if hx is not None:
                    if hx.dim() != 2:
                        raise RuntimeError(
                            "For unbatched 2-D input, hx should also be 2-D "
                            f"but got {hx.dim()}-D tensor"
                        )
                    hx = hx.unsqueeze(1)
            elif hx is not None and hx.dim() != 3:
                raise RuntimeError(
                    f"For batched 3-D input, hx should also be 3-D but got {hx.dim()}-D tensor"
                )
            if lengths is not None:
                lengths = torch.as_tensor(lengths)
                if lengths.dim() == 0 and not batched:
                    lengths = lengths.unsqueeze(0)
        if hx is not None:
            hx = self.permute_hidden(hx, sorted_indices)
        self._check(data, hx, batch_sizes, tokens, weights)

        major = data.transpose(0, 1) if self.batch_first and not packed else data
        if not _is_compiling():
            major = major.contiguous()  # see csrc/short_way.cpp
        output, h_n, _, _ = ops.rnn(
            major,
            hx,
            None,
            weights,
            batch_sizes,
            lengths,
            None,
            self.mode,
            self.bias,
            self.num_layers,
            float(self.dropout),
            self.training,
            self.bidirectional,
        )
        if packed:
            assert batch_sizes is not None
            packed_output = PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices)
            return packed_output, self.permute_hidden(h_n, unsorted_indices)
        if self.batch_first:
            output = ops.batch_first(output)
        if not batched:
            output = output.squeeze(0 if self.batch_first else 1)
            h_n = h_n.squeeze(1)
        return output, self.permute_hidden(h_n, None)

    def _current_weights(self) -> list[Tensor]:
        """The weights as nn.RNN finds them: parametrized, pruned, swapped or plain."""
        if _is_compiling():
            # By name: tracing would have to guard a list of its own.
            return [getattr(self, name) for name in self._flat_weights_names]
        self._update_flat_weights()
        return self._flat_weights  # type: ignore[return-value]

    def _has_odd_biases(self, weights: list[Tensor]) -> bool:
        """Whether nn.RNN would have to broadcast a bias, which the kernels do not."""
        return self.bias and any(
            bias.shape != (self.hidden_size,)
            for first in range(2, len(weights), 4)
            for bias in weights[first : first + 2]
        )

    def _check(
        self,
        input: Tensor,
        hx: Tensor | None,
        batch_sizes: Tensor | None,
        tokens: bool,
        weights: list[Tensor],
    ) -> None:
        """nn.RNN's own checks of input and hx; what token ids lack is left out."""
        hooked = self._hooked or (
            not _is_compiling() and any(name in self.__dict__ for name in _HOOKS)
        )
        if hooked and not tokens:
            if hx is None:  # what nn.RNN gives to it
                batch = 0 if self.batch_first else 1
                B = input.shape[batch] if batch_sizes is None else int(batch_sizes[0])
                layers = self.num_layers * (2 if self.bidirectional else 1)
                hx = input.new_zeros(layers, B, self.hidden_size)
            return self.check_forward_args(input, hx, batch_sizes)
        if not tokens and not _is_compiling():
            self.check_input(input, batch_sizes)
        elif not tokens:
            # The same checks, without the list of flat weights.
            if input.dtype != weights[0].dtype and not torch.is_autocast_enabled(input.device.type):
                raise ValueError(
                    f"RNN input dtype ({input.dtype}) does not match weight dtype "
                    f"({weights[0].dtype})."
                )
            if input.shape[-1] != self.input_size:
                raise RuntimeError(
                    "input.size(-1) must be equal to input_size. "
                    f"Expected {self.input_size}, got {input.shape[-1]}"
                )
        if hx is not None:
            self.check_hidden_size(hx, self.get_expected_hidden_size(input, batch_sizes))


ops.watch_calls(RNN)
