"""A training step of recurrent layers as people use them: the README's picture.

Forward and all gradients, the input's too, by the modules; JAX and oneDNN, which have no autograd
engine, as they are called. ONNX Runtime computes no gradients. Packed sequences are between the
modules: a scan in JAX or a primitive of oneDNN has no lengths.
"""

import pytest
import torch

import charrnn_fast

from . import peers
from .bench_sequences import module_side, ragged
from .common import CELLS, Shape, check, problem_of

WORKLOADS = {
    # A minibatch of PPO: eight environments, 16 steps of each.
    "RL policy": Shape(8, 16, 64, 64),
    # Four days of hourly values, eight series each.
    "forecaster": Shape(64, 96, 8, 64),
    # Sentences of 20 to 60 words, packed, read in both directions.
    "tagger": Shape(32, 60, 100, 128),
    # Truncated backpropagation over 50 characters, each an embedding of 64.
    "character model": Shape(50, 50, 64, 128),
    "large layer": Shape(32, 50, 512, 512),
}
PACKED = ("tagger",)


def sides_of(problem, packed, installed):
    if not packed:
        return [peers.our_module(problem, True), *installed(problem, True)]
    classes = {
        "module": getattr(charrnn_fast, problem.cell),
        problem.torch_name: getattr(torch.nn, problem.cell),
    }
    with torch.enable_grad():
        return [module_side(problem, name, cls, "packed") for name, cls in classes.items()]


@pytest.mark.parametrize("workload", WORKLOADS)
@pytest.mark.parametrize("cell", CELLS)
def bench_workload(cell, workload, side_by_side, installed, seconds, left_out):
    left_out(workload == "large layer" or (cell != "RNN" and workload != "RL policy"))
    shape, packed = WORKLOADS[workload], workload in PACKED
    problem = ragged(cell, shape, bidirectional=True) if packed else problem_of(cell, shape)
    sides = sides_of(problem, packed, installed)
    for side in sides:
        check(side, problem.reference(True), 1e-3)
    side_by_side(
        f"workload {workload}",
        cell,
        shape,
        sides,
        budget=seconds / 2,
        flops=problem.flops(True),
        packed=packed,
    )
