"""Accuracy (ulp against float64 over a dense grid of floats) and speed of tanh and sigmoid."""

import numpy as np
import pytest
import torch

from .common import Shape, Side

REFERENCES = {
    "RNN_TANH": (np.tanh, torch.tanh),
    "RNN_SIGMOID": (lambda x: 1 / (1 + np.exp(-x)), torch.sigmoid),
}


def grid() -> torch.Tensor:
    """Every 1021st float of either sign, with the ends of the range, inf and nan."""
    bits = np.arange(0, 0x7F800000, 1021, dtype=np.uint32)
    ends = np.array([1, 0x7F7FFFFF, 0x7F800000], np.uint32)
    positive = np.concatenate([bits, ends]).view(np.float32)
    return torch.from_numpy(np.concatenate([positive, -positive, np.float32([np.nan])]))


def ulps(value: np.ndarray, exact: np.ndarray) -> float:
    """Largest error in units of the last place of exact values that are zero or normal numbers.

    Below them, where sigmoid is zero (docs/numerics.md), an ulp is no measure of relative error.
    """
    normal = (exact == 0) | (np.abs(exact) >= np.finfo(np.float32).tiny)
    value, exact = value[normal], exact[normal]
    spacing = np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)
    return float(np.max(np.abs(value.astype(np.float64) - exact) / spacing))


@pytest.mark.parametrize("mode", REFERENCES)
def bench_activation(mode, side_by_side, seconds):
    from charrnn_fast import ops

    x = grid()
    # One step, one input of weight one, no state: y = act(x).
    weights = [torch.ones(1, 1), torch.zeros(1, 1)]
    exact_function, torch_function = REFERENCES[mode]

    @torch.no_grad()
    def ours(values=x):
        rows = values.reshape(1, -1, 1)
        return ops.rnn(
            rows, None, None, weights, None, None, None, mode, False, 1, 0.0, False, False
        )[0]

    with np.errstate(over="ignore"):
        exact = exact_function(x.numpy().astype(np.float64))
    sides = [Side("op", ours), Side("torch", lambda: torch_function(x))]
    for side in sides:
        value = side.run().numpy().reshape(-1)
        assert np.array_equal(np.isnan(value), np.isnan(exact))
        known = ~np.isnan(exact)
        side.info["max_ulp"] = ulps(value[known], exact[known])
        side.info["max_abs_error"] = float(np.abs(value[known] - exact[known]).max())
    side_by_side(f"activation {mode}", "RNN", Shape(x.numel(), 1, 1, 1), sides, budget=seconds / 4)
