"""``GRU``: ``torch.nn``'s, with the computation in fused kernels."""

from typing import Any, overload

from torch import Tensor, nn
from torch._jit_internal import _overload_method, is_scripting
from torch.nn.utils.rnn import PackedSequence

from charrnn_fast.recurrent import Recurrent, describe


class GRU(Recurrent, nn.GRU):
    """Drop-in for :class:`torch.nn.GRU`, whose arguments, attributes and errors it keeps.

    Token ids, ``lengths`` and ``resets`` are as in :class:`charrnn_fast.RNN`, and raise the same
    errors. A scripted or exported program that holds it needs ``import charrnn_fast`` where it is
    loaded.
    """

    _stock = nn.GRU

    # TorchScript compiles forward once for each kind of input, as it does nn.GRU's. It looks for
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
            ``(output, h_n)`` as :class:`torch.nn.GRU` returns them.
        """
        if is_scripting():
            if isinstance(input, PackedSequence):
                data, sizes, order, back = input
                y, h_n, _ = self._scripted(data, hx, None, sizes, order, back, lengths, resets)
                return PackedSequence(y, sizes, order, back), h_n
            y, h_n, _ = self._scripted(input, hx, None, None, None, None, lengths, resets)
            return y, h_n
        return self._forward(input, hx, lengths, resets)


describe(GRU, "GRU")
