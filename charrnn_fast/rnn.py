"""``RNN``: ``torch.nn``'s, with the computation in fused kernels."""

from typing import Any, overload

from torch import Tensor, nn
from torch._jit_internal import _overload_method, is_scripting
from torch.nn.utils.rnn import PackedSequence

from charrnn_fast import ops
from charrnn_fast.fused import SELECT_NONLINEARITY, describe
from charrnn_fast.recurrent import Recurrent


class RNN(Recurrent, nn.RNN):
    """Elman RNN, a drop-in for :class:`torch.nn.RNN`: the same arguments, attributes,
    ``state_dict`` and errors.

    .. code-block:: none

        h = act(W_ih x + b_ih + W_hh h_before + b_hh)

    Beyond ``nn.RNN`` it takes ``nonlinearity='sigmoid'``, token ids in place of one-hot vectors,
    the ``lengths`` of the sequences of a padded batch, and ``resets`` within a sequence; see
    :meth:`forward`. A scripted or exported program that holds it needs ``import charrnn_fast``
    where it is loaded.

    Args:
        input_size: features of a step, I; with token ids the size of the vocabulary.
        hidden_size: size of the state, H.
        num_layers: layers, each reading the output of the one below.
        nonlinearity: ``'tanh'``, ``'relu'`` or ``'sigmoid'``.
        bias: whether the layers add ``b_ih`` and ``b_hh``.
        batch_first: whether batched input and output are ``(B, T, ...)``, not ``(T, B, ...)``.
        dropout: probability of dropout on the output of each layer but the last.
        bidirectional: whether a second direction runs from the end of each sequence, D = 2.
        device: of the parameters.
        dtype: of the parameters: float32, float64, bfloat16 or float16 in the kernels.

    Raises:
        ValueError: the nonlinearity is unknown, or another argument makes no sense.

    Example:
        >>> import torch, charrnn_fast
        >>> rnn = charrnn_fast.RNN(10, 20, num_layers=2)
        >>> output, h_n = rnn(torch.randn(5, 3, 10))  # (T, B, I)
        >>> output.shape, h_n.shape
        (torch.Size([5, 3, 20]), torch.Size([2, 3, 20]))
        >>> reference = torch.nn.RNN(10, 20, num_layers=2)
        >>> reference.load_state_dict(rnn.state_dict())
        <All keys matched successfully>
    """

    _stock = nn.RNN

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        nonlinearity = args[3] if len(args) > 3 else kwargs.get("nonlinearity", "tanh")
        if nonlinearity not in list(ops.MODES):  # it may be anything
            raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. {SELECT_NONLINEARITY}")
        if nonlinearity == "sigmoid":
            # nn.RNN's constructor accepts two; sigmoid differs in the mode alone.
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
            input: ``(T, B, I)`` of the dtype of the weights, ``(B, T, I)`` with ``batch_first``,
                ``(T, I)`` unbatched; or int64 token ids of that shape without I, each standing
                for a one-hot vector; or a :class:`~torch.nn.utils.rnn.PackedSequence` of either.
            hx: initial state ``(num_layers * D, B, H)``, ``(num_layers * D, H)`` unbatched; zeros
                when None.
            lengths: ``(B)`` integers, a tensor on the CPU or a list: the steps of each sequence of
                a padded batch, in any order. Results and gradients are those of the packed batch;
                output past the end of a sequence is zero. None: all T.
            resets: bool, of the shape of token ids: where true, the state is zero before that step,
                as between two episodes. Results and gradients are those of a sequence split there.

        Returns:
            ``(output, h_n)``: the last layer's h of every step, ``(T, B, D * H)`` or as ``input``
            is laid out, and the last state of every layer, of the shape of ``hx``.

        Raises:
            IndexError: a token id is outside ``[0, I)``; the message names it and its place.
            ValueError, RuntimeError: dimensions, sizes, dtypes or devices do not go together, with
                the message of :class:`torch.nn.RNN`; a length is outside ``[1, T]``; ``resets``
                is not bool, or is given with a packed sequence.
            NotImplementedError: the older ONNX exporter is asked for what ``nn.RNN`` lacks.

        Example:
            >>> import torch, charrnn_fast
            >>> rnn = charrnn_fast.RNN(10, 20, batch_first=True)
            >>> ids = torch.randint(10, (3, 5))
            >>> output, h_n = rnn(ids, lengths=torch.tensor([5, 2, 4]))
            >>> bool((output[1, 2:] == 0).all())
            True
            >>> begins = torch.tensor([[False, False, True, False, False]]).expand(3, 5)
            >>> output, h_n = rnn(ids, resets=begins)
            >>> torch.equal(output[:, 2:], rnn(ids[:, 2:])[0])
            True
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
