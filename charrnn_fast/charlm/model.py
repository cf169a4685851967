"""The character model: one recurrent module and a linear layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .errors import UsageError
from .head import Head

Backend = Literal["fast", "torch"]
Nonlinearity = Literal["tanh", "relu", "sigmoid"]
RecurrentInit = Literal["uniform", "orthogonal"]


@dataclass(frozen=True)
class ModelConfig:
    """What a model's weights mean; the backend is no part of it."""

    vocab_size: int
    hidden_size: int = 128
    num_layers: int = 2
    nonlinearity: Nonlinearity = "tanh"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("vocab_size", "hidden_size", "num_layers"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise UsageError(f"{name} must be a whole number of at least 1, not {value!r}")
        if not isinstance(self.dropout, (int, float)):
            raise UsageError(f"dropout must be a number, not {self.dropout!r}")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"dropout must be in [0, 1), not {self.dropout}")
        if self.nonlinearity not in get_args(Nonlinearity):
            raise UsageError(f"no such nonlinearity: {self.nonlinearity}")


class CharRNN(nn.Module):
    """Scores of the next character after each character of some sequences.

    ``rnn`` is a ``torch.nn.RNN`` or a ``charrnn_fast.RNN``, time-major; the model does not know
    which. A module whose ``accepts_tokens`` is true is given ids, any other one one-hot vectors.
    """

    def __init__(self, rnn: nn.RNN, dropout: float = 0.0) -> None:
        super().__init__()
        self.rnn = rnn
        self.dropout = nn.Dropout(dropout)
        self.head = Head(rnn.hidden_size, rnn.input_size)

    def forward(self, tokens: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Tokens ``[T, B]`` (int64) and state ``[layers, B, H]`` (None: zeros) to logits
        ``[T, B, V]`` and the state after the last step."""
        if getattr(self.rnn, "accepts_tokens", False):
            inputs = tokens
        else:
            inputs = F.one_hot(tokens, self.rnn.input_size).to(self.head.weight.dtype)
        y, state = self.rnn(inputs, state)
        return self.head(self.dropout(y) if self.dropout.p else y), state


def rnn_class(backend: Backend) -> type[nn.RNN]:
    """The recurrent module of a backend."""
    if backend == "torch":
        return nn.RNN
    if backend != "fast":
        raise UsageError(f"no such backend: {backend}; there are fast and torch")
    from charrnn_fast import RNN

    return RNN


def build_model(
    config: ModelConfig,
    backend: Backend = "fast",
    recurrent_init: RecurrentInit = "uniform",
    seed: int | None = None,
) -> CharRNN:
    """A model with fresh weights: the same ones for the same ``seed`` whatever the backend.

    ``uniform`` is PyTorch's initialisation; ``orthogonal`` replaces the recurrent matrices by
    random orthogonal ones (Le, Jaitly and Hinton 2015 and Henaff et al. 2016 say why it helps).
    """
    if backend == "torch" and config.nonlinearity == "sigmoid":
        raise UsageError("torch.nn.RNN has no sigmoid; use --backend fast")
    if seed is not None:
        torch.manual_seed(seed)
    rnn = rnn_class(backend)(
        config.vocab_size,
        config.hidden_size,
        config.num_layers,
        nonlinearity=config.nonlinearity,
        dropout=config.dropout if config.num_layers > 1 else 0.0,
    )
    model = CharRNN(rnn, config.dropout)
    if recurrent_init == "orthogonal":
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the bits of a QR decomposition depend on it
        try:
            for name, parameter in rnn.named_parameters():
                if name.startswith("weight_hh"):
                    nn.init.orthogonal_(parameter)
        finally:
            torch.set_num_threads(threads)
    return model


def bits(nats: float) -> float:
    """Nats a character as bits a character."""
    return nats / math.log(2)
