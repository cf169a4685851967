"""The character model: one recurrent module and a linear layer."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from . import checks
from .dropout import LockedDropout
from .errors import UsageError
from .head import Head

Backend = Literal["fast", "torch"]
Cell = Literal["rnn", "lstm", "gru"]
Nonlinearity = Literal["tanh", "relu", "sigmoid"]
RecurrentInit = Literal["uniform", "orthogonal"]
State = tuple[Tensor, ...]  # [layers, B, H] each: h, and c of an LSTM

GATES: dict[Cell, int] = {"rnn": 1, "lstm": 4, "gru": 3}
READ = 4096  # characters whose inputs and outputs are held at once while text is only read
NUMBERS = 1 << 22  # of one-hot inputs or scores that are held at once outside of training


@dataclass(frozen=True)
class ModelConfig:
    """What a model's weights mean, and where dropout acts; the backend is no part of it.

    Args:
        vocab_size: characters, V.
        hidden_size: units of a layer, H.
        num_layers: recurrent layers.
        nonlinearity: ``'tanh'``, ``'relu'`` or ``'sigmoid'``, of the cell ``'rnn'``.
        dropout: after each layer.
        cell: ``'rnn'``, ``'lstm'`` or ``'gru'``.
        embedding_size: size of a learnt vector for each character. 0: the first layer reads
            one-hot vectors, so that its W_ih is the embedding.
        input_dropout: after the embedding.
        output_dropout: after the last layer; None: as ``dropout``.
        weight_dropout: of the recurrent weights.
        locked_dropout: whether dropout is the same at every step of a sequence.

    Raises:
        UsageError: a value makes no sense, or two do not go together.

    Example:
        >>> from charrnn_fast.charlm import ModelConfig
        >>> config = ModelConfig(vocab_size=65, cell="lstm")
        >>> config.describe(), config.weights
        ('lstm 2 x 128', 240321)
    """

    vocab_size: int
    hidden_size: int = 128
    num_layers: int = 2
    nonlinearity: Nonlinearity = "tanh"
    dropout: float = 0.0
    cell: Cell = "rnn"  # the default: checkpoints of format 1 do not name it
    embedding_size: int = 0
    input_dropout: float = 0.0
    output_dropout: float | None = None
    weight_dropout: float = 0.0
    locked_dropout: bool = False

    def __post_init__(self) -> None:
        for name in (f.name for f in fields(self)):
            object.__setattr__(self, name, self._checked(name, getattr(self, name)))
        if self.cell != "rnn" and self.nonlinearity != "tanh":
            raise UsageError(f"--nonlinearity is for --cell rnn: {self.cell} has its own")
        if self.input_dropout and not self.embedding_size:
            raise UsageError("--input-dropout acts on an embedding: it needs --embedding-size")

    @staticmethod
    def _checked(name: str, value: Any) -> Any:
        choices = {"nonlinearity": get_args(Nonlinearity), "cell": get_args(Cell)}
        if name in choices:
            return checks.one_of(name, value, choices[name])
        if name == "locked_dropout":
            return checks.flag(name, value)
        if name.endswith("dropout"):
            return None if value is None else checks.real(name, value, below=1.0)
        return checks.whole(name, value, 0 if name == "embedding_size" else 1)

    @property
    def states(self) -> int:
        """How many tensors a carried state has, which are h and for an LSTM c."""
        return 2 if self.cell == "lstm" else 1

    @property
    def weights(self) -> int:
        """How many numbers a model of these sizes learns."""
        H, V, E, G = self.hidden_size, self.vocab_size, self.embedding_size, GATES[self.cell]
        first, other = G * H * ((E or V) + H + 2), G * H * (2 * H + 2)
        return V * E + first + (self.num_layers - 1) * other + V * (H + 1)

    @property
    def last_dropout(self) -> float:
        """The dropout between the last layer and the head."""
        return self.dropout if self.output_dropout is None else self.output_dropout

    def describe(self) -> str:
        """Cell, layers and units in a word: ``lstm 2 x 128``."""
        cell = self.cell if self.nonlinearity == "tanh" else f"{self.cell} ({self.nonlinearity})"
        embedding = f", embedding of {self.embedding_size}" if self.embedding_size else ""
        return f"{cell} {self.num_layers} x {self.hidden_size}{embedding}"


class CharRNN(nn.Module):
    """Scores of the next character after each character of some sequences.

    The model does not know whose recurrent module it holds. Without an embedding, a module whose
    ``accepts_tokens`` is true is given ids, and any other one one-hot vectors.

    Args:
        config: sizes and dropout.
        rnn: a recurrent module of torch.nn or of charrnn_fast, time-major, of those sizes.

    Example:
        >>> import torch
        >>> from charrnn_fast.charlm import ModelConfig, build_model
        >>> model = build_model(ModelConfig(vocab_size=65, hidden_size=16))
        >>> logits, state = model(torch.randint(65, (5, 3)))  # T, B
        >>> logits.shape
        torch.Size([5, 3, 65])
        >>> [part.shape for part in state]  # h of each layer; an LSTM has c, too
        [torch.Size([2, 3, 16])]
    """

    def __init__(self, config: ModelConfig, rnn: nn.RNNBase) -> None:
        super().__init__()
        self.config = config
        self.embedding = (
            nn.Embedding(config.vocab_size, config.embedding_size)
            if config.embedding_size
            else None
        )
        self.rnn = rnn
        kind = LockedDropout if config.locked_dropout else nn.Dropout
        self.input_dropout = kind(config.input_dropout)
        self.layer_dropout = kind(config.dropout)
        self.dropout = kind(config.last_dropout)
        self.head = Head(config.hidden_size, config.vocab_size)
        self._layers = self._single_layers() if self._by_layer else ()

    def forward(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Scores of the next character at each step.

        Args:
            tokens: int64 ids ``[T, B]``.
            state: a tuple of h, and c of an LSTM, each ``[layers, B, H]``; None: zeros.

        Returns:
            Logits ``[T, B, V]`` and the state after the last step.
        """
        y, state = self.outputs(tokens, state)
        return self.head(self.dropout(y) if self.dropout.p else y), state

    def outputs(self, tokens: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """What the head is given, ``[T, B, H]``, and the state after the last step; arguments as
        of :meth:`forward`."""
        x = self._inputs(tokens)
        if self.training and self._by_layer:
            return self._outputs_by_layer(x, state)
        return run(self.rnn, x, state)

    @torch.no_grad()
    def read(self, tokens: Tensor, state: State | None = None) -> State:
        """The state after tokens ``[T, B]`` of any length, in the memory of a piece of them."""
        rows = steps_at_once(self.config.vocab_size, tokens.shape[1], READ)
        for start in range(0, len(tokens), rows):
            _, state = self.outputs(tokens[start : start + rows], state)
        if state is None:
            raise UsageError("there is no text to read")
        return state

    def _inputs(self, tokens: Tensor) -> Tensor:
        if self.embedding is not None:
            x: Tensor = self.embedding(tokens)
            return self.input_dropout(x) if self.input_dropout.p else x
        if getattr(self.rnn, "accepts_tokens", False):
            return tokens
        return F.one_hot(tokens, self.config.vocab_size).to(self.head.weight.dtype)

    @property
    def _by_layer(self) -> bool:
        """Whether training acts between layers or on weights, as no recurrent module does."""
        config = self.config
        locked = config.locked_dropout and config.dropout and config.num_layers > 1
        return bool(locked or config.weight_dropout)

    def _single_layers(self) -> tuple[nn.RNNBase, ...]:
        """Modules of one layer, without weights: those of ``rnn`` are lent to them. Not
        registered, as they have no state."""
        first = [self.rnn.input_size] + [self.rnn.hidden_size] * (self.rnn.num_layers > 1)
        more = {"nonlinearity": self.config.nonlinearity} if self.config.cell == "rnn" else {}
        kind: Any = type(self.rnn)
        return tuple(kind(n, self.rnn.hidden_size, device="meta", **more) for n in first)

    def _outputs_by_layer(self, x: Tensor, state: State | None) -> tuple[Tensor, State]:
        ends = []
        for i in range(self.rnn.num_layers):
            weights = {
                f"{part}_l0": getattr(self.rnn, f"{part}_l{i}")
                for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            }
            # One mask for all steps of a call: Merity, Keskar and Socher 2017.
            weights["weight_hh_l0"] = F.dropout(weights["weight_hh_l0"], self.config.weight_dropout)
            if i:
                x = self.layer_dropout(x)
            layer = self._layers[min(i, 1)]
            own = None if state is None else tuple(part[i : i + 1] for part in state)
            x, end = run(layer, x, own, weights)
            ends.append(end)
        return x, tuple(torch.cat(parts) for parts in zip(*ends, strict=True))


def run(
    rnn: nn.RNNBase, x: Tensor, state: State | None, weights: dict[str, Tensor] | None = None
) -> tuple[Tensor, State]:
    """A recurrent module with its state as a tuple, whatever its kind; with other weights if
    given."""
    hx = None if state is None else state if rnn.mode == "LSTM" else state[0]
    y, end = rnn(x, hx) if weights is None else functional_call(rnn, weights, (x, hx))
    return y, end if isinstance(end, tuple) else (end,)


def steps_at_once(vocab_size: int, streams: int, most: int) -> int:
    """How many steps of some streams to compute at once, so that memory is bounded whatever the
    vocabulary."""
    return max(1, min(most, NUMBERS // (vocab_size * streams)))


def rnn_class(backend: Backend, cell: Cell = "rnn") -> type[nn.RNNBase]:
    """The recurrent module of a backend."""
    import charrnn_fast

    checks.one_of("backend", backend, get_args(Backend))
    module = nn if backend == "torch" else charrnn_fast
    found: type[nn.RNNBase] = getattr(module, checks.one_of("cell", cell, get_args(Cell)).upper())
    return found


def build_model(
    config: ModelConfig,
    backend: Backend = "fast",
    recurrent_init: RecurrentInit = "uniform",
    seed: int | None = None,
    forget_bias: float = 0.0,
    input_scale: float = 1.0,
) -> CharRNN:
    """A model with fresh weights: the same ones for the same ``seed`` whatever the backend.

    Args:
        config: sizes and dropout.
        backend: ``'fast'`` for modules of charrnn_fast, ``'torch'`` for torch.nn's.
        recurrent_init: ``'uniform'`` is PyTorch's initialisation; ``'orthogonal'`` replaces the
            recurrent matrix of each gate by a random orthogonal one (Le, Jaitly and Hinton 2015;
            Henaff et al. 2016).
        seed: of PyTorch's random numbers; None: as they are.
        forget_bias: where an LSTM's forget gates begin, sigmoid of it; 0: PyTorch's initialisation
            (Jozefowicz, Zaremba and Sutskever 2015 propose 1).
        input_scale: factor on the W_ih of the first layer where it reads one-hot vectors. 1 is
            PyTorch's initialisation, which expects H inputs of size one: a single one hardly moves
            the state, so that the first hundreds of steps only learn how frequent characters are.
            8 makes it move as much as by a normal embedding of 64.

    Raises:
        UsageError: the backend is unknown, or has no such cell.

    Example:
        >>> from charrnn_fast.charlm import ModelConfig, build_model
        >>> model = build_model(ModelConfig(vocab_size=65, cell="gru"), seed=1)
        >>> model.rnn
        GRU(65, 128, num_layers=2)
    """
    rnn_type: Any = rnn_class(backend, config.cell)
    if backend == "torch" and config.nonlinearity == "sigmoid":
        raise UsageError("torch.nn.RNN has no sigmoid; use --backend fast")
    if seed is not None:
        torch.manual_seed(seed)
    H = config.hidden_size
    rnn = rnn_type(
        config.embedding_size or config.vocab_size,
        H,
        config.num_layers,
        dropout=config.dropout if config.num_layers > 1 else 0.0,
        **({"nonlinearity": config.nonlinearity} if config.cell == "rnn" else {}),
    )
    model = CharRNN(config, rnn)
    if not config.embedding_size:
        rnn.weight_ih_l0.detach().mul_(input_scale)
    if recurrent_init == "orthogonal":
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the bits of a QR decomposition depend on it
        try:
            for name, parameter in rnn.named_parameters():
                if name.startswith("weight_hh"):
                    for gate in parameter.detach().split(H):
                        nn.init.orthogonal_(gate)
        finally:
            torch.set_num_threads(threads)
    if config.cell == "lstm" and forget_bias:
        for name, parameter in rnn.named_parameters():
            if name.startswith("bias"):  # gates i f g o
                parameter.detach()[H : 2 * H] = forget_bias if "_ih_" in name else 0.0
    return model


def bits(nats: float) -> float:
    """Nats a character as bits a character."""
    return nats / math.log(2)


def perplexity(nats: float) -> float:
    """``exp`` of a loss in nats a character; infinite where that overflows."""
    return math.exp(nats) if nats < 700 else math.inf
