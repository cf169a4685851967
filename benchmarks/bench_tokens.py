"""Token ids as input beside the same as one-hot; forward and weight gradients."""

import pytest
import torch

from . import peers
from .common import Problem, Shape, Side, check

SHAPES = [
    Shape(50, 50, 65, 128),
    Shape(1, 200, 65, 128),
    Shape(32, 50, 65, 512),
    Shape(32, 50, 1000, 64),
    Shape(1, 2, 65, 128),
    Shape(1, 2, 1000, 64),
]
NEEDS = [False, False, True, True, True, True]  # ids have no gradient


def sides_of(problem):
    import charrnn_fast

    T, B, V = problem.x.shape
    ids = torch.randint(V, (T, B), generator=torch.Generator().manual_seed(1))
    one_hot = torch.nn.functional.one_hot(ids, V).float()
    problem.x = one_hot  # the reference sees one-hot
    ops, weights, dy = torch.ops.charrnn_fast, problem.weights, problem.dy

    def op(name, x):
        def run():
            y, _ = ops.rnn_layer.default(x, None, weights, None, None, "RNN_TANH", True)
            dweights = ops.rnn_layer_backward.default(
                dy, None, x, None, weights, y, None, None, "RNN_TANH", True, NEEDS
            )[2:]
            return y, *dweights

        with torch.no_grad():
            peers.fused(run, True)
        return Side(name, run, by_name)

    def module(name, cls, encode):
        rnn = problem.module(cls)

        def run():
            y, _ = rnn(encode())
            return y.detach(), *torch.autograd.grad(y, list(rnn.parameters()), dy)

        return Side(name, run, by_name, grad=True)

    return [
        op("op, tokens", ids),
        op("op, one-hot", one_hot),
        module("module, tokens", charrnn_fast.RNN, lambda: ids),
        module(
            "nn.RNN, one-hot made",
            torch.nn.RNN,
            lambda: torch.nn.functional.one_hot(ids, V).float(),
        ),
    ]


def by_name(out):
    return {name: t.numpy() for name, t in zip(("y", "dW_ih", "dW_hh", "db"), out, strict=False)}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_tokens(shape, side_by_side):
    problem = Problem(shape)
    sides = sides_of(problem)
    expected = {name: value for name, value in problem.reference(True).items() if name != "dx"}
    for side in sides:
        check(side, expected, 1e-3)
    side_by_side("tokens", shape, sides)
