"""One layer, forward, and with all gradients: our op and module beside every peer, one thread."""

import pytest

from . import peers
from .common import check, problem_of

# Checks of the set-up; the errors themselves are recorded.
TOLERANCE = {"forward": 1e-4, "forward+backward": 1e-3}


@pytest.mark.parametrize("topic", TOLERANCE)
def bench_layer(topic, cell, shape, side_by_side, installed, seconds):
    problem, backward = problem_of(cell, shape), topic == "forward+backward"
    sides = [
        peers.our_op(problem, backward),
        peers.our_module(problem, backward),
        *installed(problem, backward),
    ]
    for side in sides:
        check(side, problem.reference(backward), TOLERANCE[topic])
    sides.append(peers.fma_peak())
    budget, flops = 0.75 * seconds, problem.flops(backward)
    side_by_side(topic, cell, shape, sides, budget=budget, flops=flops)
