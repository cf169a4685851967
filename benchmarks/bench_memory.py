"""What a training step holds: bytes saved for backward, and growth of the process at its peak."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from .common import CELLS, Shape, Side

SHAPES = [Shape(32, 1000, 64, 256)]
TOKENS = Shape(64, 1000, 1000, 32)  # one-hot would be 256 MB, y is 8 MB


def report(package: str, cell: str, shape: Shape, tokens: bool = False) -> dict:
    """Runs memory_step.py in a process of its own, so that the peak is that step's alone."""
    command = [sys.executable, "-m", "benchmarks.memory_step", package, cell]
    command += [*map(str, shape), str(int(tokens))]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def record(topic, cell, shape, tokens, side_by_side):
    sides = []
    for package, name in (("charrnn_fast", "module"), ("torch.nn", f"nn.{cell}")):
        figures = report(package, cell, shape, tokens)
        sides.append(Side(name, lambda: None, info=figures))
    side_by_side(topic, cell, shape, sides, budget=0.0)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_memory(cell, shape, side_by_side, left_out):
    left_out(cell != "RNN")
    record("memory", cell, shape, False, side_by_side)


def bench_memory_tokens(side_by_side):
    record("memory tokens", "RNN", TOKENS, True, side_by_side)
