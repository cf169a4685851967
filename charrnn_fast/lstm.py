"""``LSTM``: ``torch.nn``'s, with the computation in fused kernels."""

from typing import Any, Optional, overload

import torch
from torch import Tensor, nn
from torch._jit_internal import _overload_method, is_scripting
from torch.nn.utils.rnn import PackedSequence

from charrnn_fast.fused import describe
from charrnn_fast.recurrent import Recurrent, batched_state


class LSTM(Recurrent, nn.LSTM):
    """LSTM, a drop-in for :class:`torch.nn.LSTM`: the same arguments, attributes, ``state_dict``
    and errors.

    .. code-block:: none

        i = sigmoid(W_ii x + b_ii + W_hi h_before + b_hi)
        f = sigmoid(W_if x + b_if + W_hf h_before + b_hf)
        g = tanh(W_ig x + b_ig + W_hg h_before + b_hg)
        o = sigmoid(W_io x + b_io + W_ho h_before + b_ho)
        c = f * c_before + i * g
        h = o * tanh(c)

    Beyond ``nn.LSTM`` it takes token ids in place of one-hot vectors, the ``lengths`` of the
    sequences of a padded batch, and ``resets`` within a sequence, and it returns the cell states of
    every step where asked; see :meth:`forward`. With ``proj_size`` every call runs torch.nn's own
    forward, which has none of these. A scripted or exported program that holds it needs
    ``import charrnn_fast`` where it is loaded.

    Args:
        input_size: features of a step, I; with token ids the size of the vocabulary.
        hidden_size: size of the states, H.
        num_layers: layers, each reading the output of the one below.
        bias: whether the layers add ``b_ih`` and ``b_hh``.
        batch_first: whether batched input and output are ``(B, T, ...)``, not ``(T, B, ...)``.
        dropout: probability of dropout on the output of each layer but the last.
        bidirectional: whether a second direction runs from the end of each sequence, D = 2.
        proj_size: size of h after a projection; 0 for none, so that h has size H.
        device: of the parameters.
        dtype: of the parameters: float32, float64, bfloat16 or float16 in the kernels.

    Raises:
        ValueError: an argument makes no sense.

    Example:
        >>> import torch, charrnn_fast
        >>> lstm = charrnn_fast.LSTM(10, 20, num_layers=2)
        >>> output, (h_n, c_n) = lstm(torch.randn(5, 3, 10))  # (T, B, I)
        >>> output.shape, h_n.shape, c_n.shape
        (torch.Size([5, 3, 20]), torch.Size([2, 3, 20]), torch.Size([2, 3, 20]))
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
            input: ``(T, B, I)`` of the dtype of the weights, ``(B, T, I)`` with ``batch_first``,
                ``(T, I)`` unbatched; or int64 token ids of that shape without I, each standing
                for a one-hot vector; or a :class:`~torch.nn.utils.rnn.PackedSequence` of either.
            hx: initial states ``(h_0, c_0)``, each ``(num_layers * D, B, H)``, or
                ``(num_layers * D, H)`` unbatched; zeros when None.
            lengths: ``(B)`` integers, a tensor on the CPU or a list: the steps of each sequence of
                a padded batch, in any order. Results and gradients are those of the packed batch;
                output past the end of a sequence is zero. None: all T.
            resets: bool, of the shape of token ids: where true, both states are zero before that
                step, as between two episodes. Results and gradients are those of a sequence split
                there.
            return_cell_states: a bool, whether to return the last layer's c of every step, too.

        Returns:
            ``(output, (h_n, c_n))``: the last layer's h of every step, ``(T, B, D * H)`` or as
            ``input`` is laid out, and the last states of every layer, of the shapes of ``hx``. With
            ``return_cell_states`` ``(output, (h_n, c_n), cells)``; cells are laid out as output is.

        Raises:
            IndexError: a token id is outside ``[0, I)``; the message names it and its place.
            ValueError, RuntimeError: dimensions, sizes, dtypes or devices do not go together, with
                the message of :class:`torch.nn.LSTM`; a length is outside ``[1, T]``; ``resets``
                is not bool, or is given with a packed sequence.
            NotImplementedError: ``proj_size``, or the older ONNX exporter, is combined with what
                ``nn.LSTM`` lacks; TorchScript is asked for cell states.
            TypeError: ``return_cell_states`` is no bool.

        Example:
            >>> import torch, charrnn_fast
            >>> lstm = charrnn_fast.LSTM(10, 20)
            >>> output, (h_n, c_n), cells = lstm(torch.randn(5, 3, 10), return_cell_states=True)
            >>> cells.shape, torch.equal(cells[-1], c_n[0])
            (torch.Size([5, 3, 20]), True)
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
        h, c = batched_state(hx, one, sorted_indices), batched_state(cx, one, sorted_indices)
        if h is None or c is None:
            rows = self.num_layers * (2 if self.bidirectional else 1)
            h = torch.zeros(rows, B, self.proj_size, dtype=input.dtype, device=input.device)
            c = torch.zeros(rows, B, self.hidden_size, dtype=input.dtype, device=input.device)
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
