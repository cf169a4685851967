"""Every instruction set this CPU has, forward and all gradients: time and error beside nn.RNN."""

import pytest

from . import peers
from .common import Problem, Shape, check

SHAPES = [
    Shape(1, 100, 64, 128),
    Shape(16, 100, 64, 64),
    Shape(32, 100, 64, 128),
    Shape(32, 32, 128, 512),
]


@pytest.fixture
def select():
    from charrnn_fast import _C

    chosen = _C.isa()
    yield _C.select_isa
    _C.select_isa(chosen)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_isas(shape, select, side_by_side, seconds):
    from charrnn_fast import _C

    problem = Problem(shape)
    sides = []
    for name in _C.isas():
        side = peers.our_op(problem, True)
        side.name = name
        side.prepare = lambda name=name: select(name)
        sides.append(side)
    sides.append(peers.torch_rnn(problem, True))
    for side in sides:
        check(side, problem.reference(True), 1e-3)
    side_by_side("ISAs", shape, sides, budget=seconds / 2, flops=shape.flops(True))
