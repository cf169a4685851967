"""Shapes, inputs, float64 references and the alternating measurement that every benchmark uses."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
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

    def flops(self, backward: bool) -> float:
        """Operations of the matrix products; backward computes twice as many as forward."""
        return 2.0 * self.B * self.T * self.H * (self.I + self.H) * (3 if backward else 1)


# Shapes are only ever added, so that results stay comparable.
PEER_GRID = [
    Shape(1, 100, 28, 12),
    Shape(3, 16, 15, 12),
    Shape(1, 100, 64, 128),
    Shape(16, 100, 64, 64),
    Shape(32, 100, 64, 128),
    Shape(64, 200, 96, 256),
    Shape(32, 128, 128, 512),
    Shape(128, 50, 96, 256),
]
OWN_GRID = [
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
GRID = PEER_GRID + OWN_GRID
QUICK_GRID = [*PEER_GRID[:5], Shape(32, 32, 128, 512)]

NAMES = ("y", "dx", "dW_ih", "dW_hh", "db")


@dataclass
class Problem:
    """One layer's weights and input, and the gradient dy that backward starts from.

    x is [T, B, I], dy [T, B, H], the weights as nn.RNN orders them.
    """

    shape: Shape
    seed: int = 0
    x: torch.Tensor = field(init=False)
    dy: torch.Tensor = field(init=False)
    weights: list[torch.Tensor] = field(init=False)
    _reference: dict[bool, dict[str, np.ndarray]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        B, T, I, H = self.shape
        random = torch.Generator().manual_seed(self.seed)
        self.x = torch.randn(T, B, I, generator=random)
        self.dy = torch.randn(T, B, H, generator=random)
        bound = H**-0.5  # the initialisation of nn.RNN
        self.weights = [
            (torch.rand(*size, generator=random) * 2 - 1) * bound
            for size in ((H, I), (H, H), (H,), (H,))
        ]

    def module(self, cls: type[torch.nn.RNN] = torch.nn.RNN) -> torch.nn.RNN:
        module = cls(self.shape.I, self.shape.H)
        with torch.no_grad():
            for parameter, value in zip(module.parameters(), self.weights, strict=True):
                parameter.copy_(value)
        return module

    def reference(self, backward: bool) -> dict[str, np.ndarray]:
        """nn.RNN in float64."""
        if backward not in self._reference:
            module, x = self.module().double(), self.x.double().requires_grad_(backward)
            with torch.set_grad_enabled(backward):
                y, _ = module(x)
            results = [y.detach()]
            if backward:
                inputs = [x, *list(module.parameters())[:3]]
                results += torch.autograd.grad(y, inputs, self.dy.double())
            self._reference[backward] = named(results)
        return self._reference[backward]


def named(tensors, names: Sequence[str] = NAMES) -> dict[str, np.ndarray]:
    """y, or y, dx, dW_ih, dW_hh, db, as arrays by name."""
    return {name: np.asarray(tensor) for name, tensor in zip(names, tensors, strict=False)}


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
        once = min(time_calls(side.run, 1) for _ in range(3))
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
