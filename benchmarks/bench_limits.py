"""One sequence, forward, against what memory allows: each step reads all of W_hh once."""

import pytest

from . import native, peers
from .common import Shape, check, problem_of

# Input of one column: next to nothing beside the recurrence.
HIDDEN = {"RNN": (16, 128, 256), "LSTM": (128, 256, 512), "GRU": (128, 256, 512)}
CASES = [(cell, H) for cell, sizes in HIDDEN.items() for H in sizes]


@pytest.mark.parametrize(("cell", "H"), CASES)
def bench_one_sequence_floor(cell, H, side_by_side, seconds):
    problem = problem_of(cell, Shape(1, 1000 if H < 512 else 200, 1, H))
    side = peers.our_op(problem, False)
    check(side, problem.reference(False), 1e-4)
    bytes_a_step = 4 * problem.kind.gates * H * H
    bandwidth = native.read_gbytes(bytes_a_step, in_turns=False)
    side_by_side(
        "reading floor",
        cell,
        problem.shape,
        [side],
        budget=seconds / 2,
        floor=problem.shape.T * bytes_a_step / (bandwidth * 1e9),  # seconds
        read_gbytes=bandwidth,
    )
