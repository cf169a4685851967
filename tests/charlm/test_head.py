from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from charrnn_fast import ops
from charrnn_fast.charlm.head import Head

# [T, B, H] and V: from one product to those that are worth several threads.
LARGE = [(50, 50, 128, 65), (50, 50, 512, 65), (300, 2, 600, 33)]
SHAPES = [(1, 1, 1, 1), (16, 3, 12, 15), (20, 8, 40, 33), *LARGE]


def problem(shape, dtype=torch.float32):
    """Layer, input and gradient: the same numbers in each dtype."""
    T, B, H, V = shape
    torch.manual_seed(0)
    layer, input, gradient = Head(H, V), torch.randn(T, B, H), torch.randn(T, B, V)
    return layer.to(dtype), input.to(dtype).requires_grad_(), gradient.to(dtype)


def ours(layer, input, gradient):
    return results(layer(input), layer, input, gradient)


def plain(layer, input, gradient):
    return results(F.linear(input, layer.weight, layer.bias), layer, input, gradient)


def results(y, layer, input, gradient):
    return [y.detach(), *torch.autograd.grad(y, (input, layer.weight, layer.bias), gradient)]


def errors(values, exact):
    """The largest difference, relative to the largest value, of each."""
    pairs = zip(values, exact, strict=True)
    return [float((a - b).abs().max() / b.abs().max()) for a, b in pairs]


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_a_linear_layer(shape):
    """In float64 the same as F.linear; in float32 at most twice as far from it."""
    exact = plain(*problem(shape, torch.float64))
    assert max(errors(ours(*problem(shape, torch.float64)), exact)) < 1e-13
    theirs = errors(plain(*problem(shape)), exact)
    for a, b in zip(errors(ours(*problem(shape)), exact), theirs, strict=True):
        assert a <= max(2 * b, 1e-7)


@pytest.mark.parametrize("shape", [*SHAPES, (32, 8, 64, 2), (2, 127, 16, 8), (50, 50, 128, 103)])
def test_same_bits_for_any_number_of_threads(shape):
    """At sizes on both sides of the limit."""
    runs = []
    for threads in (1, 2, 3, 4, 7):
        torch.set_num_threads(threads)
        runs.append(ours(*problem(shape)))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("shape", SHAPES[1:4])
def test_second_derivatives(shape):
    """The norm of the input's gradient, differentiated: that of F.linear."""
    found = []
    for apply in (Head.forward, F.linear):
        layer, input, gradient = problem(shape)
        more = () if apply is Head.forward else (layer.weight, layer.bias)
        y = apply(layer, input) if not more else apply(input, *more)
        (dx,) = torch.autograd.grad(y.tanh(), input, gradient, create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), (input, layer.weight)))
    for a, b in zip(*found, strict=True):
        assert errors([a], [b])[0] < 1e-5


def test_autocast():
    """As F.linear: in bfloat16."""
    for shape in SHAPES[1:4]:
        layer, input, gradient = problem(shape)
        exact = ours(layer, input, gradient)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(input.bfloat16())
        assert max(errors(results(y, layer, input, gradient.bfloat16()), exact)) < 2e-2


@pytest.mark.parametrize("shape", [SHAPES[2], *LARGE])
def test_backward_is_one_call_of_our_kernels(shape):
    def run():
        before = ops.counters()
        ours(*problem(shape))
        return {name: count - before[name] for name, count in ops.counters().items()}

    ran = run()
    assert (ran["forward_fused"], ran["backward_fused"]) == (0, 1)


@pytest.mark.parametrize("shape", SHAPES[1:4])
def test_gradients_of_each_sample(shape):
    """vmap over samples: those of one after the other."""
    layer, input, _ = problem(shape)
    inputs = torch.stack([input.detach(), 2 * input.detach()])
    weights = dict(layer.named_parameters())

    def loss(weights, input):
        return torch.func.functional_call(layer, weights, (input,)).square().sum()

    gradient = torch.func.grad(loss)
    together = torch.func.vmap(gradient, (None, 0))(weights, inputs)
    for n, one in enumerate(inputs):
        for name, expected in gradient(weights, one).items():
            torch.testing.assert_close(together[name][n], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES[1:4])
def test_compiler_sees_a_linear_layer(shape):
    """torch.compile chooses the products."""
    layer, input, _ = problem(shape)
    graphs = []

    def backend(graph, inputs):
        graphs.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(input), layer(input))
    assert graphs == [[torch._C._nn.linear]]
