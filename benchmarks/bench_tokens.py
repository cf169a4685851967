"""Token ids as input beside the same as one-hot; forward and weight gradients."""

import copy

import pytest
import torch

from . import peers
from .common import Problem, Shape, Side, check, named

SHAPES = [
    Shape(50, 50, 65, 128),
    Shape(1, 200, 65, 128),
    Shape(32, 50, 65, 512),
    Shape(32, 50, 1000, 64),
    Shape(1, 2, 65, 128),
    Shape(1, 2, 1000, 64),
]
NAMES = ("y", "dW_ih", "dW_hh", "db")  # ids have no gradient


def sides_of(problem):
    import charrnn_fast

    T, B, V = problem.x.shape
    ids = torch.randint(V, (T, B), generator=torch.Generator().manual_seed(1))

    def make_one_hot():
        return torch.nn.functional.one_hot(ids, V).float()

    one_hot = make_one_hot()
    problem.x = one_hot  # the reference sees one-hot

    def op(name, x):
        with_x = copy.copy(problem)
        with_x.x = x
        side = peers.our_op(with_x, True, x_needs_gradient=False)
        side.name = name
        return side

    def module(name, cls, encode):
        rnn = problem.module(cls)

        def train():
            y, _ = rnn(encode())
            return y.detach(), *torch.autograd.grad(y, list(rnn.parameters()), problem.dy)

        run = train if cls is torch.nn.RNN else peers.fused(train, True)
        return Side(name, run, lambda out: named(out, NAMES), grad=True)

    return [
        op("op, tokens", ids),
        op("op, one-hot", one_hot),
        module("module, tokens", charrnn_fast.RNN, lambda: ids),
        module("module, one-hot made", charrnn_fast.RNN, make_one_hot),
        module("nn.RNN, one-hot made", torch.nn.RNN, make_one_hot),
    ]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_tokens(shape, side_by_side):
    problem = Problem(shape)
    sides = sides_of(problem)
    expected = {name: value for name, value in problem.reference(True).items() if name != "dx"}
    for side in sides:
        check(side, expected, 1e-3)
    side_by_side("tokens", shape, sides)
