"""Cost as T, B or H grows, forward and all gradients; beside the peers in T."""

import pytest

from . import peers
from .common import CELLS, Problem, Shape, check

TIMES = [10, 100, 1_000, 10_000, 100_000]
BATCHES = [1, 2, 4, 8, 16, 32, 64, 128, 256]
HIDDEN = [8, 16, 32, 64, 128, 256, 512, 1024]
LONGEST_CHECKED = (
    10_000  # torch's module in float64, and peers that record a graph, are slow beyond
)
LONGEST_GATED = 1_000  # of the other cells, slower yet
TOLERANCE = 1e-3
# Of a quick run; of vanilla RNN all but the longest.
QUICK = {"T": (100, 10_000), "B": (1, 16, 256), "H": (128, 512)}


@pytest.fixture(params=CELLS)
def cell(request):
    return request.param


@pytest.mark.parametrize("T", TIMES)
def bench_time(cell, T, side_by_side, installed, seconds, left_out):
    left_out(T not in QUICK["T"] if cell != "RNN" else T > LONGEST_CHECKED)
    problem = Problem(Shape(1, T, 16, 64), cell)
    sides = [peers.our_op(problem, True)]
    if (LONGEST_CHECKED if cell == "RNN" else LONGEST_GATED) >= T:
        sides += installed(problem, True)
        for side in sides:
            check(side, problem.reference(True), TOLERANCE)
    else:
        sides += [peers.our_module(problem, True)]
        check(sides[1], sides[0].results(sides[0].run()), 0.0)
    side_by_side(
        "scaling in T",
        problem.cell,
        problem.shape,
        sides,
        budget=seconds / 2,
        flops=problem.flops(True),
    )


@pytest.mark.parametrize("B", BATCHES)
def bench_batch(cell, B, side_by_side, seconds, left_out):
    left_out(cell != "RNN" and B not in QUICK["B"])
    ours_alone("scaling in B", Problem(Shape(B, 50, 64, 64), cell), side_by_side, seconds)


@pytest.mark.parametrize("H", HIDDEN)
def bench_hidden(cell, H, side_by_side, seconds, left_out):
    left_out(cell != "RNN" and H not in QUICK["H"])
    if cell != "RNN" and H > 512:
        pytest.skip("seconds a call of the reference")
    ours_alone("scaling in H", Problem(Shape(32, 50, 64, H), cell), side_by_side, seconds)


def ours_alone(topic, problem, side_by_side, seconds):
    side = peers.our_op(problem, True)
    check(side, problem.reference(True), TOLERANCE)
    sides = [side, peers.fma_peak()]
    side_by_side(
        topic, problem.cell, problem.shape, sides, budget=seconds / 4, flops=problem.flops(True)
    )
