"""One step at a time, as a policy or a sampler runs: our cells beside torch's."""

import pytest
import torch

from . import peers
from .common import CELLS, Problem, Shape, Side

STEPS = {
    "RNN": [(B, H) for B in (1, 16, 256) for H in (12, 128, 256, 512, 1024, 2048)],
    "LSTM": [(B, H) for B in (1, 16, 256) for H in (40, 128, 256, 512)],
    "GRU": [(B, H) for B in (1, 16, 256) for H in (40, 128, 256, 512)],
}
CASES = [(cell, B, H) for cell, sizes in STEPS.items() for B, H in sizes]
GRADIENT_CASES = [
    (cell, B, H)
    for cell in CELLS
    for B in (1, 16)
    for H in ((128, 1024) if cell == "RNN" else (128,))
]


def cells(problem, dtype=torch.float32):
    """Our cell and torch's, with the same weights, by name."""
    import charrnn_fast

    _, _, I, H = problem.shape
    name = f"{problem.cell}Cell"
    ours = getattr(charrnn_fast, name)(I, H).to(dtype)
    theirs = getattr(torch.nn, name)(I, H).to(dtype)
    theirs.load_state_dict(ours.state_dict())
    return {name: ours, f"nn.{name}": theirs}


def states_of(problem, dtype=torch.float32, grad=False):
    B, _, _, H = problem.shape
    return [torch.randn(B, H, dtype=dtype, requires_grad=grad) for _ in problem.kind.states]


def outputs(result):
    """h, or h and c."""
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize(("cell", "B", "H"), CASES)
def bench_cell(cell, B, H, side_by_side, seconds, left_out):
    """Without gradients."""
    left_out(B > 1 or H not in (128, 256))
    problem = Problem(Shape(B, 1, 64, H), cell)
    x, hx = problem.x[0], problem.as_hx(states_of(problem))
    sides, results = [], []
    with torch.no_grad():
        for name, module in cells(problem).items():

            def run(module=module):
                return module(x, hx)

            sides.append(Side(name, run if name.startswith("nn.") else peers.fused(run, False)))
            results.append(outputs(run()))
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
    side_by_side("cell step", problem.cell, problem.shape, sides, budget=seconds / 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("cell", "B", "H"), GRADIENT_CASES)
def bench_cell_gradients(cell, B, H, dtype, side_by_side, seconds, left_out):
    """With the gradients of state and weights."""
    left_out(B > 1 or H != 128)
    problem = Problem(Shape(B, 1, 64, H), cell)
    x, dy = problem.x[0].to(dtype), problem.dy[0].to(dtype)
    states = states_of(problem, dtype, grad=True)
    sides, gradients = [], []
    for name, module in cells(problem, dtype).items():
        wanted = [*states, *module.parameters()]

        def run(module=module, wanted=wanted):
            h = outputs(module(x, problem.as_hx(states)))[0]
            return torch.autograd.grad(h, wanted, dy)

        gradients.append(run())
        sides.append(Side(name, run if name.startswith("nn.") else peers.fused(run, True)))
        sides[-1].grad = True
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0, "atol": 0.2}
    torch.testing.assert_close(*gradients, **tolerance)
    topic = f"cell gradients {str(dtype).removeprefix('torch.')}"
    side_by_side(topic, problem.cell, problem.shape, sides, budget=seconds / 2)
