"""``LSTM``: ``torch.nn``'s, with the computation in fused kernels."""

from typing import Any, Optional, overload

import torch
from torch import Tensor, nn
from torch._jit_internal import _overload_method, is_scripting
from torch.nn.utils.rnn import PackedSequence

from charrnn_fast.recurrent import Recurrent, describe


class LSTM(Recurrent, nn.LSTM):
    """Drop-in for :class:`torch.nn.LSTM`, whose arguments, attributes and errors it keeps.

    Token ids, ``lengths`` and ``resets`` are as in :class:`charrnn_fast.RNN`, and raise the same
    errors. With ``proj_size`` every call is torch.nn's own, and these are not to be had
    (NotImplementedError). A scripted or exported program that holds it needs
    ``import charrnn_fast`` where it is loaded.
    """

    _stock = nn.LSTM

    # TorchScript compiles forward once for each kind of input, as it does nn.LSTM's. It cannot have
    # return_cell_states, which changes the type of the result.
    @overload
    @_overload_method
    def forward(
        self,
        input: Tensor,
        hx: tuple[Tensor, Tensor] | None = None,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        return_cell_states: bool = False,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]: ...

    @overload
    @_overload_method
    def forward(
        self,
        input: PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
        return_cell_states: bool = False,
    ) -> tuple[PackedSequence, tuple[Tensor, Tensor]]: ...

    def forward(
        self,
        input: Any,
        hx: Any = None,
        lengths: Any = None,
        resets: Any = None,
        return_cell_states: bool = False,
    ) -> Any:
        """Runs the stack of layers.

        Args:
            input: ``(T, B, input_size)``, ``(T, input_size)``, token ids, or a packed sequence;
                batch comes first where ``batch_first`` says so.
            hx: ``(h_0, c_0)``, the initial states, each of ``(num_layers * directions, B,
                hidden_size)``; zeros when None.
            lengths: ``(B)`` steps of each sequence of a padded batch; all of them when None.
            resets: ``(T, B)`` bool, batch first as ``input`` is: where both states start anew.
            return_cell_states: also return the last layer's cell states of every step.

        Returns:
            ``(output, (h_n, c_n))`` as :class:`torch.nn.LSTM` returns them; with
            ``return_cell_states`` ``(output, (h_n, c_n), cells)``, cells shaped as output is.
        """
        if is_scripting():
            if return_cell_states:
                raise NotImplementedError("LSTM: TorchScript cannot return_cell_states")
            h: Optional[Tensor] = None  # noqa: UP045  TorchScript's
            c: Optional[Tensor] = None  # noqa: UP045
            if hx is not None:
                h, c = hx
            if isinstance(input, PackedSequence):
                data, sizes, order, back = input
                if self.proj_size > 0:
                    y, h_n, c_n = self._projected(data, h, c, sizes, order, back, lengths, resets)
                else:
                    y, h_n, c_n = self._scripted(data, h, c, sizes, order, back, lengths, resets)
                return PackedSequence(y, sizes, order, back), (h_n, c_n)
            if self.proj_size > 0:
                y, h_n, c_n = self._projected(input, h, c, None, None, None, lengths, resets)
            else:
                y, h_n, c_n = self._scripted(input, h, c, None, None, None, lengths, resets)
            return y, (h_n, c_n)
        return self._forward(input, hx, lengths, resets, return_cell_states)

    def _projected(
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
        """What TorchScript runs with proj_size: torch.nn's op."""
        if lengths is not None or resets is not None:
            raise NotImplementedError("LSTM: lengths and resets cannot be combined with proj_size")
        one = batch_sizes is None and input.dim() == 2
        dim = 0 if self.batch_first else 1
        if one:
            input = input.unsqueeze(dim)
        B = input.size(dim) if batch_sizes is None else int(batch_sizes[0])
        if hx is None or cx is None:
            rows = self.num_layers * (2 if self.bidirectional else 1)
            h = torch.zeros(rows, B, self.proj_size, dtype=input.dtype, device=input.device)
            c = torch.zeros(rows, B, self.hidden_size, dtype=input.dtype, device=input.device)
        elif one:
            h, c = hx.unsqueeze(1), cx.unsqueeze(1)
        elif sorted_indices is not None:
            h, c = hx.index_select(1, sorted_indices), cx.index_select(1, sorted_indices)
        else:
            h, c = hx, cx
        if batch_sizes is None:
            y, h_n, c_n = torch.lstm(
                input,
                [h, c],
                self._flat_weights,  # type: ignore[arg-type]
                self.bias,
                self.num_layers,
                self.dropout,
                self.training,
                self.bidirectional,
                self.batch_first,
            )
        else:
            y, h_n, c_n = torch.lstm(
                input,
                batch_sizes,
                [h, c],
                self._flat_weights,  # type: ignore[arg-type]
                self.bias,
                self.num_layers,
                self.dropout,
                self.training,
                self.bidirectional,
            )
        if one:
            return y.squeeze(dim), h_n.squeeze(1), c_n.squeeze(1)
        if unsorted_indices is not None:
            h_n = h_n.index_select(1, unsorted_indices)
            c_n = c_n.index_select(1, unsorted_indices)
        return y, h_n, c_n


describe(LSTM, "LSTM", pair=True)
