"""Transforms: vmap, per-sample gradients, higher and forward-mode derivatives, beside nn.RNN's."""

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from helpers import cells, pair
from torch.func import (
    functional_call,
    functionalize,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    stack_module_state,
    vjp,
    vmap,
)

import charrnn_fast

# torch's own forward-mode AD warns of a module of torch that it uses.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")

OPTIONS = [{}, {"num_layers": 2, "bidirectional": True}, {"nonlinearity": "relu", "bias": False}]


def detached(module):
    return {name: p.detach() for name, p in module.named_parameters()}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(
    "derivative",
    [
        lambda f, x: jacrev(f)(x),
        lambda f, x: jacfwd(f)(x),
        lambda f, x: hessian(lambda x: f(x).square().sum())(x),
        lambda f, x: jvp(f, (x,), (x.cos(),))[1],
        lambda f, x: vjp(f, x)[1](f(x))[0],
        lambda f, x: torch.autograd.functional.jacobian(f, x, vectorize=True),
        lambda f, x: torch.autograd.functional.hessian(lambda x: f(x).sum(), x, vectorize=True),
        lambda f, x: functionalize(f)(x),
    ],
    ids=["jacrev", "jacfwd", "hessian", "jvp", "vjp", "jacobian", "autograd hessian", "functional"],
)
def test_derivatives(derivative, options):
    """Every derivative that nn.RNN has, ours has with the same value; of h_n, too."""
    stock, ours = pair(3, 4, dtype=torch.float64, **options)
    x = torch.randn(3, 2, 3, dtype=torch.float64)
    for part in (0, 1):
        got = derivative(lambda x: ours(x)[part], x)
        torch.testing.assert_close(got, derivative(lambda x: stock(x)[part], x))


def test_dual_numbers():
    """Forward-mode AD by make_dual, of the input and of a weight."""
    stock, ours = pair(3, 4, 2)
    x, tangent = torch.randn(3, 2, 3), torch.randn(3, 2, 3)
    results = []
    for module in (stock, ours):
        params = detached(module)
        with fwAD.dual_level():
            params["weight_hh_l0"] = fwAD.make_dual(
                params["weight_hh_l0"], torch.ones_like(params["weight_hh_l0"])
            )
            output, h_n = functional_call(module, params, (fwAD.make_dual(x, tangent),))
            results.append([fwAD.unpack_dual(t).tangent for t in (output, h_n)])
    torch.testing.assert_close(results[1], results[0])


def test_gradient_penalty():
    """create_graph=True: a loss on the gradient of the input trains the weights as nn.RNN's."""
    grads = []
    for module in pair(3, 5, 2, bidirectional=True):
        x = torch.linspace(-1, 1, 24).reshape(4, 2, 3).requires_grad_()
        (g,) = torch.autograd.grad(module(x)[0].square().sum(), x, create_graph=True)
        (g.norm() - 1).square().backward()
        grads.append([x.grad, *[p.grad for p in module.parameters()]])
    torch.testing.assert_close(grads[1], grads[0])


def test_batched_gradients():
    """torch.autograd.grad(is_grads_batched=True) serves ours as it does nn.RNN."""
    results = []
    for module in pair(3, 5, 2, bidirectional=True):
        x = torch.linspace(-1, 1, 24).reshape(4, 2, 3).requires_grad_()
        output, _ = module(x)
        cotangents = torch.linspace(-1, 2, 3 * output.numel()).reshape(3, *output.shape)
        leaves = [x, *module.parameters()]
        results.append(torch.autograd.grad(output, leaves, cotangents, is_grads_batched=True))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("tokens", [False, True])
def test_vmap(tokens):
    """vmap over inputs gives the results of a loop; nn.RNN fails there."""
    stock, ours = pair(3, 5, 2, bidirectional=True)
    x = torch.randint(3, (6, 4, 2)) if tokens else torch.randn(6, 4, 2, 3)
    got = vmap(lambda x: ours(x))(x)
    for i in range(6):
        torch.testing.assert_close((got[0][i], got[1][i]), ours(x[i]))
    with pytest.raises(RuntimeError):
        vmap(lambda x: stock(x))(torch.randn(6, 4, 2, 3))


def test_vmap_over_lengths():
    """Each element of the map may have lengths of its own."""
    rnn = charrnn_fast.RNN(3, 5)
    x, lengths = torch.randn(3, 4, 2, 3), torch.tensor([[4, 1], [2, 3], [1, 4]])
    got = vmap(lambda x, n: rnn(x, lengths=n)[0])(x, lengths)
    for i in range(3):
        torch.testing.assert_close(got[i], rnn(x[i], lengths=lengths[i])[0])


def test_ensemble():
    """vmap over stacked weights runs several networks at once."""
    networks = [charrnn_fast.RNN(3, 5, 2) for _ in range(4)]
    params, buffers = stack_module_state(networks)
    x = torch.randn(4, 2, 3)

    def call(p, b):
        return functional_call(networks[0], (p, b), (x,))[0]

    got = vmap(call)(params, buffers)
    torch.testing.assert_close(got, torch.stack([network(x)[0] for network in networks]))


def test_per_sample_gradients():
    """vmap(grad) gives the gradients that each sample has alone; nn.RNN fails there."""
    stock, ours = pair(3, 5, 2, bidirectional=True)
    x, y = torch.randn(6, 4, 3), torch.randn(6, 4, 10)

    def gradients(module):
        def loss(p, x, y):
            return (functional_call(module, p, (x,))[0] - y).square().sum()

        return grad(loss)

    got = vmap(gradients(ours), in_dims=(None, 0, 0))(detached(ours), x, y)
    for i in range(6):
        want = gradients(stock)(detached(stock), x[i], y[i])
        for name in want:
            torch.testing.assert_close(got[name][i], want[name])
    with pytest.raises(RuntimeError):
        vmap(gradients(stock), in_dims=(None, 0, 0))(detached(stock), x, y)


def test_cell_derivatives():
    """RNNCell: jacrev, jvp and hessian as nn.RNNCell, and vmap(grad) over samples."""
    stock, ours = cells(3, 4, dtype=torch.float64)
    x = torch.randn(2, 3, dtype=torch.float64)
    for derivative in (
        lambda f: jacrev(f)(x),
        lambda f: jvp(f, (x,), (x,))[1],
        lambda f: hessian(lambda x: f(x).square().sum())(x),
    ):
        torch.testing.assert_close(derivative(ours), derivative(stock))
