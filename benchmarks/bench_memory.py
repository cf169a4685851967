"""What a training step holds: bytes saved for backward, and growth of the process at its peak."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from .common import Shape, Side

SHAPES = [Shape(32, 1000, 64, 256)]
TOKENS = Shape(64, 1000, 1000, 32)  # one-hot would be 256 MB, y is 8 MB


def report(module: str, shape: Shape, tokens: bool = False) -> dict:
    """Runs memory_step.py in a process of its own, so that the peak is that step's alone."""
    command = [sys.executable, "-m", "benchmarks.memory_step", module]
    command += [*map(str, shape), str(int(tokens))]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def record(topic, shape, tokens, side_by_side):
    sides = []
    for module in ("charrnn_fast", "torch"):
        figures = report(module, shape, tokens)
        seconds = figures.pop("seconds")
        side = Side("module" if module == "charrnn_fast" else "nn.RNN", lambda: None, info=figures)
        side.info["seconds"] = seconds
        sides.append(side)
    side_by_side(topic, shape, sides, budget=0.0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_memory(shape, side_by_side):
    record("memory", shape, False, side_by_side)


def bench_memory_tokens(side_by_side):
    record("memory tokens", TOKENS, True, side_by_side)
