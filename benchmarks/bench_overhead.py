"""The cost of calls that compute next to nothing, and of one step with gradients."""

import pytest
import torch

from . import peers
from .common import CELLS, Shape, Side, check, problem_of


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def bench_overhead(cell, grad, side_by_side, seconds):
    """T = B = I = H = 1, and the state of zeros that a module makes."""
    import charrnn_fast

    problem = problem_of(cell, Shape(1, 1, 1, 1))
    sides = []
    for name, package in (("module", charrnn_fast), (problem.torch_name, torch.nn)):
        module = problem.module(getattr(package, cell))

        def run(module=module):
            return module(problem.x)

        with torch.set_grad_enabled(grad):
            ours = package is charrnn_fast
            sides.append(Side(name, peers.counted(run, "forward_fused") if ours else run))
        sides[-1].grad = grad
    sides.append(peers.our_op(problem, False))
    with torch.no_grad():
        assert torch.allclose(sides[0].run()[0], sides[1].run()[0], atol=1e-6)
    topic = f"overhead {'grad' if grad else 'no_grad'}"
    side_by_side(topic, problem.cell, problem.shape, sides, budget=seconds / 2)


@pytest.mark.parametrize("cell", CELLS)
def bench_one_step(cell, side_by_side, installed, seconds):
    """B = T = 1 with all gradients: mostly calls, of autograd and of allocators."""
    problem = problem_of(cell, Shape(1, 1, 28, 40))
    sides = [peers.our_op(problem, True), peers.our_module(problem, True)]
    sides += installed(problem, True)
    for side in sides:
        check(side, problem.reference(True), 1e-3)
    side_by_side(
        "one step",
        problem.cell,
        problem.shape,
        sides,
        budget=seconds / 2,
        flops=problem.flops(True),
    )
