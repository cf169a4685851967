"""bfloat16, float16 and float64 beside float32: times, and errors against float64."""

import numpy as np
import pytest
import torch

from . import peers
from .common import Problem, Shape, Side, named, relative_error

SHAPES = [Shape(32, 100, 64, 256), Shape(32, 64, 128, 512), Shape(64, 50, 96, 256)]
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
# Rounding of the results to the dtype, with room for what T steps add.
TOLERANCE = {"float32": 1e-4, "bfloat16": 6e-2, "float16": 1e-2, "float64": 1e-12}


def op_side(problem, name, dtype):
    typed = Problem(problem.shape)
    typed.x, typed.dy = problem.x.to(dtype), problem.dy.to(dtype)
    typed.weights = [w.to(dtype) for w in problem.weights]
    side = peers.our_op(typed, True)
    side.name = name
    return side


def module_side(problem, name, dtype):
    """Float32 weights and x, computed in float32 or under autocast; dy comes in y's dtype."""
    import charrnn_fast

    module = problem.module(charrnn_fast.RNN)
    inputs = [problem.x.clone().requires_grad_(), *module.parameters()]
    dy = problem.dy.to(dtype)

    def run():
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            y, _ = module(inputs[0])
        return y, *torch.autograd.grad(y, inputs, dy)

    def results(out):
        return named([result.detach().double() for result in out])

    return Side(name, peers.fused(run, True), results, grad=True)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_dtypes(shape, side_by_side, request):
    problem = Problem(shape)
    expected = {k: np.asarray(v) for k, v in problem.reference(True).items()}
    sides = []
    for name, dtype in DTYPES.items():
        try:
            side = op_side(problem, name, dtype)
        except (AssertionError, RuntimeError, NotImplementedError) as reason:
            request.node.warn(pytest.PytestWarning(f"{name} has no fused path here: {reason}"))
            continue
        sides.append(side)
    sides.append(module_side(problem, "module, float32", torch.float32))
    try:
        sides.append(module_side(problem, "module, autocast bfloat16", torch.bfloat16))
    except (AssertionError, RuntimeError) as reason:
        request.node.warn(pytest.PytestWarning(f"autocast has no fused path here: {reason}"))
    for side in sides:
        torch.set_grad_enabled(side.grad)
        error = relative_error(side.results(side.run()), expected)
        assert error <= TOLERANCE[side.name.split()[-1]], f"{side.name}: {error:.1e}"
        side.info["error"] = error
    side_by_side("dtypes", shape, sides, flops=shape.flops(True))
