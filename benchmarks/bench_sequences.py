"""Sequences of different lengths, packed and by `lengths`, and both directions: modules, with all
gradients."""

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from . import peers
from .common import CELLS, Problem, Shape, Side, check

# As taggers have them: a batch of sentences, the longest three times the shortest.
TAGGERS = [
    Shape(8, 30, 50, 50),
    Shape(8, 45, 100, 100),
    Shape(16, 45, 100, 128),
    Shape(32, 45, 50, 100),
    Shape(32, 60, 100, 200),
    Shape(64, 60, 100, 256),
]
BOTH = [Shape(1, 100, 64, 128), Shape(16, 60, 100, 128), Shape(32, 60, 100, 256)]
QUICK = (TAGGERS[2], BOTH[1])


@pytest.fixture(params=CELLS)
def cell(request):
    return request.param


def ragged(cell, shape, bidirectional=False):
    """Lengths from T/3 to T, evenly, falling."""
    lengths = torch.linspace(shape.T, shape.T / 3, shape.B).round().long()
    return Problem(shape, cell, lengths, bidirectional)


def module_side(problem, name, cls, way):
    """`way`: packed, lengths or dense."""
    module, T = problem.module(cls), problem.shape.T
    states = [state.clone().requires_grad_() for state in problem.states]
    hx = problem.as_hx(states)
    x, dy = problem.x, problem.dy
    if way == "packed":
        packed = pack_padded_sequence(x, problem.lengths)
        x, dy = packed.data, pack_padded_sequence(dy, problem.lengths).data
    x = x.clone().requires_grad_()
    wanted = [x, *states, *module.parameters()]

    def run():
        if way == "packed":
            y = module(packed._replace(data=x), hx)[0].data
        elif way == "lengths":
            y, _ = module(x, hx, lengths=problem.lengths)
        else:
            y, _ = module(x, hx)
        return y, *torch.autograd.grad(y, wanted, dy)

    def padded(rows):
        return pad_packed_sequence(packed._replace(data=rows), total_length=T)[0]

    def results(out):
        y, dx, *gradients = out
        if way == "packed":
            y, dx = padded(y), padded(dx)
        return problem.named([y.detach(), dx, *gradients])

    ours = cls.__module__.startswith("charrnn_fast")
    return Side(name, peers.fused(run, True) if ours else run, results, grad=True)


def compare(topic, problem, ways, side_by_side, seconds):
    """`ways` of our module by the name of their side; the first one is torch's, too."""
    import charrnn_fast

    ours, theirs = getattr(charrnn_fast, problem.cell), getattr(torch.nn, problem.cell)
    way = next(iter(ways.values()))
    with torch.enable_grad():
        sides = [module_side(problem, name, ours, ways[name]) for name in ways]
        sides.append(module_side(problem, problem.torch_name, theirs, way))
    for side in sides:
        check(side, problem.reference(True), 1e-3)
    info = {"flops": problem.flops(True), "steps": problem.steps}
    cell, shape = problem.cell, problem.shape
    side_by_side(topic, cell, shape, sides, budget=seconds / 2, **info)


@pytest.mark.parametrize("shape", TAGGERS, ids=str)
def bench_packed(cell, shape, side_by_side, seconds, left_out):
    left_out(shape not in QUICK)
    ways = {"module": "packed", "module, lengths": "lengths"}
    compare("packed", ragged(cell, shape), ways, side_by_side, seconds)


@pytest.mark.parametrize("shape", BOTH, ids=str)
def bench_bidirectional(cell, shape, side_by_side, seconds, left_out):
    left_out(shape not in QUICK)
    problem = Problem(shape, cell, bidirectional=True)
    compare("bidirectional", problem, {"module": "dense"}, side_by_side, seconds)


def bench_packed_bidirectional(cell, side_by_side, seconds):
    ways = {"module": "packed", "module, lengths": "lengths"}
    compare("packed bidirectional", ragged(cell, TAGGERS[2], True), ways, side_by_side, seconds)
