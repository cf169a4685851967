"""Shapes, inputs, float64 references and the alternating measurement that every benchmark uses."""

from __future__ import annotations

import copy
import functools
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch


class Shape(NamedTuple):
    """Batch, time, input and hidden size."""

    B: int
    T: int
    I: int
    H: int

    def __str__(self) -> str:
        return f"B{self.B}-T{self.T}-I{self.I}-H{self.H}"


class Cell(NamedTuple):
    """What a hidden unit computes: everything that differs between cells outside the peers."""

    mode: str  # of our ops
    gates: int
    states: tuple[str, ...]  # that go from step to step


CELLS = {
    "RNN": Cell("RNN_TANH", 1, ("h",)),
    "LSTM": Cell("LSTM", 4, ("h", "c")),
    "GRU": Cell("GRU", 3, ("h",)),
}

# Shapes are only ever added, so that results stay comparable.
RNN_PEER_GRID = [
    Shape(1, 100, 28, 12),
    Shape(3, 16, 15, 12),
    Shape(1, 100, 64, 128),
    Shape(16, 100, 64, 64),
    Shape(32, 100, 64, 128),
    Shape(64, 200, 96, 256),
    Shape(32, 128, 128, 512),
    Shape(128, 50, 96, 256),
]
RNN_OWN_GRID = [
    Shape(1, 50, 1, 1),
    Shape(1, 200, 65, 16),
    Shape(2, 37, 5, 7),
    Shape(4, 64, 33, 31),
    Shape(4, 100, 64, 64),
    Shape(1, 100, 128, 256),
    Shape(2, 50, 64, 512),
    Shape(8, 100, 32, 32),
    Shape(33, 41, 29, 65),
    Shape(16, 64, 65, 128),
    Shape(24, 50, 100, 300),
]
GATED_GRID = [
    Shape(1, 1, 28, 128),
    Shape(1, 100, 64, 128),
    Shape(1, 100, 128, 256),
    Shape(1, 50, 128, 512),
    Shape(4, 100, 64, 64),
    Shape(16, 100, 64, 64),
    Shape(32, 100, 64, 128),
    Shape(64, 200, 96, 256),
    Shape(32, 128, 128, 512),
    Shape(128, 50, 96, 256),
    Shape(20, 35, 200, 650),
]
GRIDS = {"RNN": RNN_PEER_GRID + RNN_OWN_GRID, "LSTM": GATED_GRID, "GRU": GATED_GRID}
GATED_QUICK = [Shape(1, 100, 64, 128), Shape(4, 100, 64, 64), Shape(32, 32, 128, 256)]
QUICK_GRIDS = {
    "RNN": [*RNN_PEER_GRID[:5], Shape(32, 32, 128, 512)],
    "LSTM": GATED_QUICK,
    "GRU": GATED_QUICK,
}


@dataclass
class Problem:
    """One layer's weights, input and initial state, and the gradient dy that backward starts from.

    x is [T, B, I], dy [T, B, D*H], each state [D, B, H], the weights as torch.nn orders them. With
    `lengths` ([B], falling) sequences end early: x and dy are zero from there on.
    """

    shape: Shape
    cell: str = "RNN"
    lengths: torch.Tensor | None = None
    bidirectional: bool = False
    x: torch.Tensor = field(init=False)
    dy: torch.Tensor = field(init=False)
    states: list[torch.Tensor] = field(init=False)
    weights: list[torch.Tensor] = field(init=False)
    _reference: dict[bool, dict[str, np.ndarray]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        B, T, I, H = self.shape
        G, D = self.kind.gates, 2 if self.bidirectional else 1
        random = torch.Generator().manual_seed(0)
        self.x = torch.randn(T, B, I, generator=random)
        self.dy = torch.randn(T, B, D * H, generator=random)
        bound = H**-0.5  # the initialisation of torch.nn
        self.weights = [
            (torch.rand(*size, generator=random) * 2 - 1) * bound
            for size in ((G * H, I), (G * H, H), (G * H,), (G * H,)) * D
        ]
        self.states = [torch.randn(D, B, H, generator=random) * 0.5 for _ in self.kind.states]
        if self.lengths is not None:
            over = torch.arange(T)[:, None] >= self.lengths
            self.x[over], self.dy[over] = 0.0, 0.0

    @property
    def kind(self) -> Cell:
        return CELLS[self.cell]

    @property
    def torch_name(self) -> str:
        return f"nn.{self.cell}"

    @property
    def steps(self) -> int:
        """Steps of all sequences together."""
        return self.shape.B * self.shape.T if self.lengths is None else int(self.lengths.sum())

    def flops(self, backward: bool) -> float:
        """Operations of the matrix products; backward computes twice as many as forward."""
        _, _, I, H = self.shape
        directions = 2 if self.bidirectional else 1
        once = 2.0 * self.steps * self.kind.gates * H * (I + H) * directions
        return once * (3 if backward else 1)

    def to(self, dtype: torch.dtype) -> Problem:
        """The same in another dtype; the reference stays that of the values before."""
        other = copy.copy(self)
        other.x, other.dy = self.x.to(dtype), self.dy.to(dtype)
        other.weights = [w.to(dtype) for w in self.weights]
        other.states = [s.to(dtype) for s in self.states]
        return other

    @property
    def names(self) -> list[str]:
        """y and the gradients, in the order of torch's results and of our op's."""
        weights = ["dW_ih", "dW_hh", "db_ih", "db_hh"]
        reverse = [f"{name}_reverse" for name in weights] if self.bidirectional else []
        return ["y", "dx", *(f"d{state}0" for state in self.kind.states), *weights, *reverse]

    def named(self, results: Iterable, names: Sequence[str] | None = None) -> dict[str, np.ndarray]:
        """y, or y and the gradients, as arrays by name."""
        pairs = zip(names or self.names, results, strict=False)
        return {name: np.asarray(value) for name, value in pairs}

    def module(self, cls: type[torch.nn.RNNBase] | None = None) -> torch.nn.RNNBase:
        cls = cls or getattr(torch.nn, self.cell)
        dtype = self.weights[0].dtype
        module = cls(self.shape.I, self.shape.H, bidirectional=self.bidirectional, dtype=dtype)
        with torch.no_grad():
            for parameter, value in zip(module.parameters(), self.weights, strict=True):
                parameter.copy_(value)
        return module

    @staticmethod
    def as_hx(states: Sequence[torch.Tensor]):
        """The states as a module takes them: a tensor, or a pair."""
        return tuple(states) if len(states) > 1 else states[0]

    def reference(self, backward: bool) -> dict[str, np.ndarray]:
        """torch's module in float64."""
        if backward not in self._reference:
            module = self.module().double()
            inputs = [t.double().requires_grad_(backward) for t in (self.x, *self.states)]
            with torch.set_grad_enabled(backward):
                x = inputs[0]
                if self.lengths is not None:
                    x = torch.nn.utils.rnn.pack_padded_sequence(x, self.lengths)
                y, _ = module(x, self.as_hx(inputs[1:]))
                if self.lengths is not None:
                    y, _ = torch.nn.utils.rnn.pad_packed_sequence(y, total_length=self.shape.T)
            results = [y.detach()]
            if backward:
                inputs += module.parameters()
                results += torch.autograd.grad(y, inputs, self.dy.double())
            self._reference[backward] = self.named(results)
        return self._reference[backward]


@functools.cache
def problem_of(cell: str, shape: Shape) -> Problem:
    """The plain problem of a shape, with its reference: several topics measure the same ones."""
    return Problem(shape, cell)


@dataclass
class Side:
    """One of the things compared: `run` is timed, `prepare` called before each round, untimed."""

    name: str
    run: Callable[[], object]
    results: Callable[[object], dict[str, np.ndarray]] | None = None  # of what run() returned
    prepare: Callable[[], object] | None = None
    grad: bool = False  # whether autograd records during run()
    info: dict[str, object] = field(default_factory=dict)


def relative_error(result: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """Largest difference over all arrays, each relative to its array's largest value."""
    assert set(result) == set(expected), f"{set(result)} instead of {set(expected)}"
    worst = 0.0
    for name, reference in expected.items():
        value = np.asarray(result[name], np.float64).reshape(reference.shape)
        assert np.isfinite(value).all(), f"{name} is not finite"
        scale = max(float(np.abs(reference).max()), 1e-30)
        worst = max(worst, float(np.abs(value - reference).max()) / scale)
    return worst


def begin(side: Side) -> None:
    if side.prepare:
        side.prepare()
    torch.set_grad_enabled(side.grad)


def check(side: Side, expected: dict[str, np.ndarray], tolerance: float) -> None:
    """Asserts that the side computes what it should, and records its error."""
    assert side.results is not None
    begin(side)
    error = relative_error(side.results(side.run()), expected)
    assert error <= tolerance, f"{side.name}: relative error {error:.2e} is above {tolerance:.0e}"
    side.info["error"] = error


def time_calls(run: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def measure(
    sides: list[Side],
    seconds: float,
    min_rounds: int = 5,
    max_rounds: int = 200,
    round_time: float = 2e-3,
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds a call of each side, and calls a round, by side.

    Sides take turns round by round, so that a change of clock or a disturbance meets all of them;
    the order rotates. A round makes as many calls as fill `round_time`, after one untimed call that
    brings back what the other sides pushed out of the caches (calls of many rounds' time do
    without: they take longer than that does).
    """
    calls, warm = {}, {}
    for side in sides:
        begin(side)
        side.run()
        once = time_calls(side.run, 1)
        if once < 10 * round_time:
            once = min(once, *(time_calls(side.run, 1) for _ in range(2)))
        calls[side.name] = max(1, min(10_000, round(round_time / once)))
        warm[side.name] = once < 10 * round_time
    times: dict[str, list[float]] = {side.name: [] for side in sides}
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < min_rounds or (rounds < max_rounds and time.perf_counter() < end):
        first = rounds % len(sides)
        for side in sides[first:] + sides[:first]:
            begin(side)
            if warm[side.name]:
                side.run()
            times[side.name].append(time_calls(side.run, calls[side.name]))
        rounds += 1
    return times, calls


ALL_CPUS = sorted(os.sched_getaffinity(0))


def use_threads(threads: int) -> None:
    """Runs what follows on `threads` threads; one thread is pinned to one core."""
    os.sched_setaffinity(0, ALL_CPUS[-1:] if threads == 1 else ALL_CPUS)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
