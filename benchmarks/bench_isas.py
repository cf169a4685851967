"""Every instruction set this CPU has, forward and all gradients: time and error beside torch's."""

import pytest

from . import peers
from .common import Shape, check, problem_of

SHAPES = {
    "RNN": [
        Shape(1, 100, 64, 128),
        Shape(16, 100, 64, 64),
        Shape(32, 100, 64, 128),
        Shape(32, 32, 128, 512),
    ],
    "LSTM": [Shape(1, 100, 64, 128), Shape(32, 100, 64, 128)],
    "GRU": [Shape(1, 100, 64, 128), Shape(32, 100, 64, 128)],
}
CASES = [(cell, shape) for cell, shapes in SHAPES.items() for shape in shapes]


@pytest.fixture
def select():
    from charrnn_fast import _C

    chosen = _C.isa()
    yield _C.select_isa
    _C.select_isa(chosen)


@pytest.mark.parametrize(("cell", "shape"), CASES)
def bench_isas(cell, shape, select, side_by_side, seconds, left_out):
    from charrnn_fast import _C

    left_out(cell != "RNN" or shape.H > 128)
    problem = problem_of(cell, shape)
    sides = []
    for name in _C.isas():
        side = peers.our_op(problem, True)
        side.name = name
        side.prepare = lambda name=name: select(name)
        sides.append(side)
    sides.append(peers.torch_module(problem, True))
    for side in sides:
        check(side, problem.reference(True), 1e-3)
    side_by_side("ISAs", cell, shape, sides, budget=seconds / 2, flops=problem.flops(True))
