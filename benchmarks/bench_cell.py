"""One step at a time, as a policy or a sampler runs: RNNCell beside nn.RNNCell, under no_grad."""

import pytest
import torch

from . import peers
from .common import Shape, Side


@pytest.mark.parametrize("B", [1, 16, 256])
@pytest.mark.parametrize("H", [12, 128, 256, 512, 1024, 2048])
def bench_cell(B, H, side_by_side, seconds):
    import charrnn_fast

    ours, theirs = charrnn_fast.RNNCell(64, H), torch.nn.RNNCell(64, H)
    theirs.load_state_dict(ours.state_dict())
    x, h = torch.randn(B, 64), torch.randn(B, H)
    with torch.no_grad():
        assert torch.allclose(ours(x, h), theirs(x, h), atol=1e-5)
        fused = peers.fused(lambda: ours(x, h), False)
    sides = [Side("RNNCell", fused), Side("nn.RNNCell", lambda: theirs(x, h))]
    side_by_side("cell step", Shape(B, 1, 64, H), sides, budget=seconds / 2)
