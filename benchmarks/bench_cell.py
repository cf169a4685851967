"""One step at a time, as a policy or a sampler runs: RNNCell beside nn.RNNCell."""

import pytest
import torch

from . import peers
from .common import Shape, Side


def cells(H, dtype=torch.float32):
    import charrnn_fast

    ours, theirs = charrnn_fast.RNNCell(64, H).to(dtype), torch.nn.RNNCell(64, H).to(dtype)
    theirs.load_state_dict(ours.state_dict())
    return {"RNNCell": ours, "nn.RNNCell": theirs}


@pytest.mark.parametrize("B", [1, 16, 256])
@pytest.mark.parametrize("H", [12, 128, 256, 512, 1024, 2048])
def bench_cell(B, H, side_by_side, seconds):
    """Without gradients."""
    ours, theirs = cells(H).values()
    x, h = torch.randn(B, 64), torch.randn(B, H)
    with torch.no_grad():
        assert torch.allclose(ours(x, h), theirs(x, h), atol=1e-5)
        fused = peers.fused(lambda: ours(x, h), False)
    sides = [Side("RNNCell", fused), Side("nn.RNNCell", lambda: theirs(x, h))]
    side_by_side("cell step", Shape(B, 1, 64, H), sides, budget=seconds / 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("B", [1, 16])
@pytest.mark.parametrize("H", [128, 1024])
def bench_cell_gradients(H, B, dtype, side_by_side, seconds):
    """With the gradients of state and weights."""
    h, dy = torch.randn(B, H, dtype=dtype, requires_grad=True), torch.randn(B, H, dtype=dtype)
    x = torch.randn(B, 64, dtype=dtype)
    sides, gradients = [], []
    for name, cell in cells(H, dtype).items():
        wanted = [h, *cell.parameters()]

        def run(cell=cell, wanted=wanted):
            return torch.autograd.grad(cell(x, h), wanted, dy)

        gradients.append(run())
        sides.append(Side(name, peers.fused(run, True) if name == "RNNCell" else run, grad=True))
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0, "atol": 0.2}
    torch.testing.assert_close(*gradients, **tolerance)
    topic = f"cell gradients {str(dtype).removeprefix('torch.')}"
    side_by_side(topic, Shape(B, 1, 64, H), sides, budget=seconds / 2)
