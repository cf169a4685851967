"""bfloat16, float16 and float64 beside float32: times, and errors against float64."""

import pytest
import torch

from . import peers
from .common import Shape, Side, check, problem_of

SHAPES = {
    "RNN": [Shape(32, 100, 64, 256), Shape(32, 64, 128, 512), Shape(64, 50, 96, 256)],
    "LSTM": [Shape(32, 50, 64, 128), Shape(32, 64, 128, 512)],
    "GRU": [Shape(32, 50, 64, 128), Shape(32, 64, 128, 512)],
}
CASES = [(cell, shape) for cell, shapes in SHAPES.items() for shape in shapes]
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
# Rounding of the results to the dtype, with room for what T steps add.
TOLERANCE = {"float32": 1e-4, "bfloat16": 6e-2, "float16": 1e-2, "float64": 1e-12}


def op_side(problem, name, dtype):
    side = peers.our_op(problem.to(dtype), True)
    side.name = name
    return side


def converted_side(problem, name, dtype):
    """Without kernels for `dtype`: convert, compute in float32, convert the results."""
    typed = problem.to(dtype)
    converted = typed.to(torch.float32)
    side = peers.our_op(converted, True)

    def tensors(of):
        return [of.x, of.dy, *of.states, *of.weights]

    # The op is bound to tensors of its own: not to those of the problem, which others share.
    pairs = list(zip(tensors(converted), tensors(typed), strict=True))
    compute, read = side.run, side.results

    def run():
        for to, value in pairs:
            to.copy_(value)
        compute()
        return [result.to(dtype) for result in compute.__self__.results()]

    return Side(name, run, read)


def module_side(problem, name, dtype):
    """Float32 weights and x, computed in float32 or under autocast; dy comes in y's dtype."""
    import charrnn_fast

    module = problem.module(getattr(charrnn_fast, problem.cell))
    inputs = [tensor.clone().requires_grad_() for tensor in (problem.x, *problem.states)]
    hx = problem.as_hx(inputs[1:])
    wanted = [*inputs, *module.parameters()]
    dy = problem.dy.to(dtype)

    def run():
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            y, _ = module(inputs[0], hx)
        return y, *torch.autograd.grad(y, wanted, dy)

    def results(out):
        return problem.named([result.detach().double() for result in out])

    return Side(name, peers.fused(run, True), results, grad=True)


def torch_side(problem, name, dtype):
    """torch's module with weights, x and states of `dtype`."""
    side = peers.torch_module(problem.to(dtype), True)
    side.name = name

    def results(out):
        return problem.named([result.detach().double() for result in out])

    side.results = results
    return side


@pytest.mark.parametrize(("cell", "shape"), CASES)
def bench_dtypes(cell, shape, side_by_side, request, seconds, left_out):
    left_out(shape != SHAPES[cell][0])
    problem = problem_of(cell, shape)
    wanted = [(op_side, name, dtype) for name, dtype in DTYPES.items()]
    wanted += [
        (converted_side, "converted from bfloat16", torch.bfloat16),
        (module_side, "module, float32", torch.float32),
        (module_side, "module, autocast bfloat16", torch.bfloat16),
        (torch_side, f"{problem.torch_name}, bfloat16", torch.bfloat16),
    ]
    sides = []
    for make, name, dtype in wanted:
        with torch.enable_grad():
            try:
                side = make(problem, name, dtype)
            except (AssertionError, RuntimeError, NotImplementedError) as reason:
                request.node.warn(pytest.PytestWarning(f"{name} has no fused path here: {reason}"))
                continue
        # torch's module rounds the state in each step: several times our error.
        tolerance = TOLERANCE[name.split()[-1]] * (4 if make is torch_side else 1)
        check(side, problem.reference(True), tolerance)
        sides.append(side)
    side_by_side("dtypes", cell, shape, sides, budget=seconds / 2, flops=problem.flops(True))
