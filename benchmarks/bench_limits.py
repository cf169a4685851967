"""One sequence, forward, against what L2 allows: each step reads all of W_hh once."""

import pytest

from . import native, peers
from .common import Problem, Shape, check

# Input of one column: next to nothing beside the recurrence.
SHAPES = [Shape(1, 1000, 1, H) for H in (16, 128, 256)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_one_sequence_floor(shape, side_by_side, seconds):
    problem = Problem(shape)
    side = peers.our_op(problem, False)
    check(side, problem.reference(False), 1e-4)
    bandwidth = native.core_limits()["l2_read_gbytes"]
    bytes_a_step = 4 * shape.H * shape.H
    side_by_side(
        "L2 floor",
        shape,
        [side],
        budget=seconds / 2,
        floor=shape.T * bytes_a_step / (bandwidth * 1e9),  # seconds
        l2_read_gbytes=bandwidth,
    )
