"""``RNN``: ``torch.nn``'s, with the computation in fused kernels."""

from typing import Any, overload

from torch import Tensor, nn
from torch._jit_internal import _overload_method, is_scripting
from torch.nn.utils.rnn import PackedSequence

from charrnn_fast import ops
from charrnn_fast.recurrent import Recurrent, describe


class RNN(Recurrent, nn.RNN):
    """Drop-in for :class:`torch.nn.RNN`, whose arguments, attributes and errors it keeps.

    Beyond ``nn.RNN``:

    - ``nonlinearity`` may also be ``'sigmoid'``;
    - an int64 input holds token ids standing for one-hot vectors: ``(T, B)``, or ``(B, T)`` with
      ``batch_first``, or ``(T)`` unbatched;
    - ``lengths``, ``(B)`` integers on the CPU, bounds each sequence of a padded batch: outputs
      past a sequence's end are zero, and ``h_n`` is the state at its end. The result and the
      gradients are those of a packed sequence, without packing;
    - ``resets``, a bool tensor of the shape that token ids would have: where it is true the state
      is zero before that step. Outputs and gradients are those of a sequence that was split there.

    A scripted or exported program that holds it needs ``import charrnn_fast`` where it is loaded.

    Raises:
        IndexError: a token id is outside ``[0, input_size)``; the message names it.
        ValueError: a length is outside ``[1, T]``, or ``resets`` is not bool.
    """

    _stock = nn.RNN

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

    # TorchScript compiles forward once for each kind of input, as it does nn.RNN's. It looks for
    # overloads in the source of the class itself: they cannot be inherited.
    @overload
    @_overload_method
    def forward(
        self,
        input: Tensor,
        hx: Tensor | None = None,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    @_overload_method
    def forward(
        self,
        input: PackedSequence,
        hx: Tensor | None = None,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
    ) -> tuple[PackedSequence, Tensor]: ...

    def forward(self, input: Any, hx: Any = None, lengths: Any = None, resets: Any = None) -> Any:
        """Runs the stack of layers.

        Args:
            input: ``(T, B, input_size)``, ``(T, input_size)``, token ids, or a packed sequence;
                batch comes first where ``batch_first`` says so.
            hx: ``(num_layers * directions, B, hidden_size)`` initial state; zeros when None.
            lengths: ``(B)`` steps of each sequence of a padded batch; all of them when None.
            resets: ``(T, B)`` bool, batch first as ``input`` is: where the state starts anew.

        Returns:
            ``(output, h_n)`` as :class:`torch.nn.RNN` returns them.
        """
        if is_scripting():
            if isinstance(input, PackedSequence):
                data, sizes, order, back = input
                y, h_n, _ = self._scripted(data, hx, None, sizes, order, back, lengths, resets)
                return PackedSequence(y, sizes, order, back), h_n
            y, h_n, _ = self._scripted(input, hx, None, None, None, None, lengths, resets)
            return y, h_n
        return self._forward(input, hx, lengths, resets)


describe(RNN)
