"""Token ids as input beside the same as one-hot; forward and weight gradients."""

import copy

import pytest
import torch

from . import peers
from .common import CELLS, Problem, Shape, Side, check

SHAPES = [
    Shape(50, 50, 65, 128),
    Shape(1, 200, 65, 128),
    Shape(32, 50, 65, 512),
    Shape(32, 50, 1000, 64),
    Shape(1, 2, 65, 128),
    Shape(1, 2, 1000, 64),
]
GATED = SHAPES[:1] + SHAPES[2:3]
CASES = [(cell, shape) for cell in CELLS for shape in (SHAPES if cell == "RNN" else GATED)]


def sides_of(problem):
    import charrnn_fast

    T, B, V = problem.x.shape
    ids = torch.randint(V, (T, B), generator=torch.Generator().manual_seed(1))

    def make_one_hot():
        return torch.nn.functional.one_hot(ids, V).float()

    one_hot = make_one_hot()
    problem.x = one_hot  # the reference sees one-hot
    names = [name for name in problem.names if name != "dx"]  # ids have no gradient
    ours, theirs = getattr(charrnn_fast, problem.cell), getattr(torch.nn, problem.cell)

    def op(name, x):
        with_x = copy.copy(problem)
        with_x.x = x
        side = peers.our_op(with_x, True, x_needs_gradient=False)
        side.name = name
        return side

    def module(name, cls, encode):
        rnn = problem.module(cls)
        states = [state.clone().requires_grad_() for state in problem.states]
        hx = problem.as_hx(states)
        wanted = [*states, *rnn.parameters()]

        def train():
            y, _ = rnn(encode(), hx)
            return y.detach(), *torch.autograd.grad(y, wanted, problem.dy)

        run = train if cls is theirs else peers.fused(train, True)
        return Side(name, run, lambda out: problem.named(out, names), grad=True)

    return [
        op("op, tokens", ids),
        op("op, one-hot", one_hot),
        module("module, tokens", ours, lambda: ids),
        module("module, one-hot made", ours, make_one_hot),
        module(f"{problem.torch_name}, one-hot made", theirs, make_one_hot),
    ]


@pytest.mark.parametrize(("cell", "shape"), CASES)
def bench_tokens(cell, shape, side_by_side, seconds, left_out):
    left_out(cell != "RNN")
    problem = Problem(shape, cell)
    sides = sides_of(problem)
    expected = {name: value for name, value in problem.reference(True).items() if name != "dx"}
    for side in sides:
        check(side, expected, 1e-3)
    side_by_side("tokens", cell, shape, sides, budget=seconds / 2)
