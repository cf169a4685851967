"""One layer, forward and all gradients: our op and module beside every peer, on one thread."""

from . import peers
from .common import Problem, check

TOLERANCE = 1e-3  # a check of the set-up; the errors themselves are recorded


def bench_rnn_forward_backward(shape, side_by_side, installed):
    problem = Problem(shape)
    sides = [
        peers.our_op(problem, True),
        peers.our_module(problem, True),
        *installed(problem, True),
    ]
    for side in sides:
        check(side, problem.reference(True), TOLERANCE)
    side_by_side("forward+backward", shape, [*sides, peers.fma_peak()], flops=shape.flops(True))
