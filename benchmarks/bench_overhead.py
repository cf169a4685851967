"""The cost of a call that computes next to nothing: T = B = I = H = 1."""

import pytest
import torch

from . import peers
from .common import Problem, Shape, Side


@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def bench_overhead(grad, side_by_side):
    import charrnn_fast

    problem = Problem(Shape(1, 1, 1, 1))
    sides = []
    for name, cls in (("module", charrnn_fast.RNN), ("nn.RNN", torch.nn.RNN)):
        module = problem.module(cls)

        def run(module=module):
            return module(problem.x)

        with torch.set_grad_enabled(grad):
            sides.append(
                Side(name, peers.counted(run, "forward_fused") if cls is not torch.nn.RNN else run)
            )
        sides[-1].grad = grad
    sides.append(peers.our_op(problem, False))
    with torch.no_grad():
        assert torch.allclose(sides[0].run()[0], sides[1].run()[0], atol=1e-6)
    side_by_side(f"overhead {'grad' if grad else 'no_grad'}", problem.shape, sides)
