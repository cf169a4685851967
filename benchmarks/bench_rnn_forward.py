"""One layer, forward: our op and module beside every peer, on one thread."""

from . import peers
from .common import Problem, check

TOLERANCE = 1e-4  # a check of the set-up; the errors themselves are recorded


def bench_rnn_forward(shape, side_by_side, installed):
    problem = Problem(shape)
    sides = [
        peers.our_op(problem, False),
        peers.our_module(problem, False),
        *installed(problem, False),
    ]
    for side in sides:
        check(side, problem.reference(False), TOLERANCE)
    side_by_side("forward", shape, [*sides, peers.fma_peak()], flops=shape.flops(False))
