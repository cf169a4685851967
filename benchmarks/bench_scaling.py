"""Cost as T, B or H grows, forward and all gradients; beside the peers in T."""

import pytest

from . import peers
from .common import Problem, Shape, check

TIMES = [10, 100, 1_000, 10_000, 100_000]
BATCHES = [1, 2, 4, 8, 16, 32, 64, 128, 256]
HIDDEN = [8, 16, 32, 64, 128, 256, 512, 1024]
LONGEST_CHECKED = 10_000  # float64 nn.RNN, and peers that record a graph, are slow beyond
TOLERANCE = 1e-3


@pytest.mark.parametrize("T", TIMES)
def bench_time(T, side_by_side, installed, seconds):
    problem = Problem(Shape(1, T, 16, 64))
    sides = [peers.our_op(problem, True)]
    if T <= LONGEST_CHECKED:
        sides += installed(problem, True)
        for side in sides:
            check(side, problem.reference(True), TOLERANCE)
    else:
        sides += [peers.our_module(problem, True)]
        check(sides[1], sides[0].results(sides[0].run()), 0.0)
    side_by_side(
        "scaling in T", problem.shape, sides, budget=seconds / 2, flops=problem.shape.flops(True)
    )


@pytest.mark.parametrize("B", BATCHES)
def bench_batch(B, side_by_side, seconds):
    ours_alone("scaling in B", Shape(B, 50, 64, 64), side_by_side, seconds)


@pytest.mark.parametrize("H", HIDDEN)
def bench_hidden(H, side_by_side, seconds):
    ours_alone("scaling in H", Shape(32, 50, 64, H), side_by_side, seconds)


def ours_alone(topic, shape, side_by_side, seconds):
    problem = Problem(shape)
    side = peers.our_op(problem, True)
    check(side, problem.reference(True), TOLERANCE)
    side_by_side(
        topic, shape, [side, peers.fma_peak()], budget=seconds / 4, flops=shape.flops(True)
    )
