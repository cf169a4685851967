"""The recurrent networks that the tests are about: one table, which fixtures and strategies read.

A test that takes the fixture ``kind`` runs for every row. What differs between the rows is here, so
that no test names a class.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import charrnn_fast

State = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class Kind:
    """One network: its classes here and in torch.nn, and what its formula needs.

    Attributes:
        name: of the class, here and in torch.nn; its cell has ``Cell`` after it.
        gates: rows of a weight matrix for each hidden unit.
        states: names of the final states.
        variants: constructor arguments that no other kind has, the default first.
        modes: every ``mode`` that the ops know of it.
    """

    name: str
    gates: int
    states: tuple[str, ...]
    variants: tuple[dict[str, Any], ...]
    modes: tuple[str, ...]

    def __str__(self) -> str:
        return self.name

    __repr__ = __str__  # what pytest and hypothesis print

    @property
    def ours(self) -> type[nn.RNNBase]:
        return getattr(charrnn_fast, self.name)

    @property
    def stock(self) -> type[nn.RNNBase]:
        return getattr(nn, self.name)

    @property
    def cell(self) -> type[nn.RNNCellBase]:
        return getattr(charrnn_fast, f"{self.name}Cell")

    @property
    def stock_cell(self) -> type[nn.RNNCellBase]:
        return getattr(nn, f"{self.name}Cell")

    @property
    def has_cell_state(self) -> bool:
        return len(self.states) > 1

    def pair(self, *args: Any, **kwargs: Any) -> tuple[nn.RNNBase, nn.RNNBase]:
        """``(torch.nn's, ours)`` of the same arguments and the same weights."""
        stock, ours = self.stock(*args, **kwargs), self.ours(*args, **kwargs)
        ours.load_state_dict(stock.state_dict())
        return stock, ours

    def cells(self, *args: Any, **kwargs: Any) -> tuple[nn.RNNCellBase, nn.RNNCellBase]:
        """``(torch.nn's cell, ours)`` of the same arguments and the same weights."""
        stock, ours = self.stock_cell(*args, **kwargs), self.cell(*args, **kwargs)
        ours.load_state_dict(stock.state_dict())
        return stock, ours

    def state(self, *shape: int, make: Callable[..., Tensor] = torch.randn, **kwargs: Any) -> State:
        """A state of this kind: h, or (h, c)."""
        tensors = tuple(make(shape, **kwargs) for _ in self.states)
        return tensors if self.has_cell_state else tensors[0]


KINDS = (
    Kind(
        "RNN",
        1,
        ("h_n",),
        ({}, {"nonlinearity": "relu"}),
        ("RNN_TANH", "RNN_RELU", "RNN_SIGMOID"),
    ),
    Kind("LSTM", 4, ("h_n", "c_n"), ({},), ("LSTM",)),
    Kind("GRU", 3, ("h_n",), ({},), ("GRU",)),
)
VARIANTS = tuple((kind, variant) for kind in KINDS for variant in kind.variants)


def each(function: Callable[[Tensor], Any], state: Any) -> Any:
    """The function of every tensor of a state, a state again; None stays None."""
    if isinstance(state, (tuple, list)):
        return type(state)(function(tensor) for tensor in state)
    return None if state is None else function(state)


def flat(results: Any) -> list[Tensor]:
    """All tensors of what a module returned, data of packed sequences among them."""
    if isinstance(results, Tensor):
        return [results]
    if hasattr(results, "batch_sizes"):  # what TorchScript gives is of another class
        return [results.data]
    return [] if results is None else [tensor for part in results for tensor in flat(part)]
