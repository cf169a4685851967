"""How fast a model of given sizes trains and draws, beside the same model on torch.nn."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from statistics import median
from typing import NamedTuple, get_args

import torch

from .errors import UsageError
from .model import Backend
from .options import TrainOptions
from .sample import stream
from .train import Trainer

CHECKED = 5  # steps whose losses must agree before anything is timed
AGREEMENT = 1e-4


class Timing(NamedTuple):
    """Characters a second of both backends at one task, medians of rounds in turns."""

    task: str
    fast: float
    torch: float


def bench(options: TrainOptions, seconds: float = 2.0, rounds: int = 5) -> list[Timing]:
    """Times training and sampling, each side about ``seconds`` a task, the sides taking turns.

    The reference is torch's module fed with one-hot vectors, in the same loop with the same
    optimizer. RuntimeError if the first losses of the two differ by more than rounding.
    """
    if options.lines:
        raise UsageError("bench times running text, not --lines")
    trainers, losses = {}, {}
    for backend in get_args(Backend):
        # Nothing is written: no run begins.
        own = replace(options, backend=backend, out_dir=os.devnull)
        trainers[backend] = Trainer(own, say=None)
        losses[backend] = torch.stack([trainers[backend].train_step() for _ in range(CHECKED)])
    if not torch.allclose(losses["fast"], losses["torch"], rtol=AGREEMENT, atol=0):
        raise RuntimeError(f"the two sides do not agree, nothing is timed: losses {losses}")

    def train(backend: Backend) -> Callable[[int], int]:
        trainer = trainers[backend]

        def work(n: int) -> int:
            for _ in range(n):
                loss = trainer.train_step()
            loss.item()
            return n * trainer.chars_per_step

        return work

    def draw(streams: int, backend: Backend) -> Callable[[int], int]:
        trainer = trainers[backend]

        def work(n: int) -> int:
            pieces = stream(
                trainer.model, trainer.vocabulary, length=16 * n, seed=0, streams=streams
            )
            return sum(piece.numel() for piece in pieces)

        return work

    rows = [in_turns("training", train, seconds, rounds)]
    for trainer in trainers.values():
        trainer.model.eval()
    for streams in (1, 64):
        task = f"sampling, {streams} stream{'s' * (streams > 1)}"
        rows.append(in_turns(task, partial(draw, streams), seconds, rounds))
    return rows


def in_turns(
    task: str, make: Callable[[Backend], Callable[[int], int]], seconds: float, rounds: int
) -> Timing:
    """Finds how much work a side does in its share of the time, then lets the sides take turns."""
    work, amount = {}, {}
    for backend in get_args(Backend):
        work[backend], n = make(backend), 1
        while (took := clock(work[backend], n)[1]) < 0.2 * seconds / rounds:
            n *= 2
        amount[backend] = max(1, round(n * seconds / rounds / took))
    speeds: dict[Backend, list[float]] = {b: [] for b in get_args(Backend)}
    for _ in range(rounds):
        for backend, seen in speeds.items():
            characters, took = clock(work[backend], amount[backend])
            seen.append(characters / took)
    return Timing(task, median(speeds["fast"]), median(speeds["torch"]))


def clock(work: Callable[[int], int], n: int) -> tuple[int, float]:
    start = time.perf_counter()
    characters = work(n)
    return characters, time.perf_counter() - start
