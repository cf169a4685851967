"""Transforms: vmap, per-sample gradients, higher and forward-mode derivatives, beside nn.RNN's."""

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from helpers import loss_of
from kinds import KINDS, VARIANTS, each, flat
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

# torch's own forward-mode AD warns of a module of torch that it uses.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")

OPTIONS = [
    *[(kind, {"bias": False} | variant) for kind, variant in VARIANTS],
    *[(kind, {"num_layers": 2, "bidirectional": True}) for kind in KINDS],
]


def detached(module):
    return {name: p.detach() for name, p in module.named_parameters()}


@pytest.mark.parametrize(("kind", "options"), OPTIONS, ids=str)
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
def test_derivatives(derivative, kind, options):
    """Every derivative that torch.nn has, ours has with the same value; of each state, too."""
    stock, ours = kind.pair(3, 4, dtype=torch.float64, **options)
    x = torch.randn(3, 2, 3, dtype=torch.float64)
    for part in range(1 + len(kind.states)):
        got = derivative(lambda x: flat(ours(x))[part], x)
        torch.testing.assert_close(got, derivative(lambda x: flat(stock(x))[part], x))


def test_dual_numbers(kind):
    """Forward-mode AD by make_dual, of the input, of states and of a weight.

    Against torch.nn in float64, which oneDNN, whose LSTM has no forward mode, does not serve.
    """
    x, tangent = torch.randn(2, 3, 2, 3, dtype=torch.float64)
    hx = kind.state(2, 2, 4, dtype=torch.float64)
    results = []
    for module in kind.pair(3, 4, 2, dtype=torch.float64):
        params = detached(module)
        with fwAD.dual_level():
            params["weight_hh_l0"] = fwAD.make_dual(
                params["weight_hh_l0"], torch.ones_like(params["weight_hh_l0"])
            )
            state = each(lambda tensor: fwAD.make_dual(tensor, tensor.cos()), hx)
            found = functional_call(module, params, (fwAD.make_dual(x, tangent), state))
            results.append([fwAD.unpack_dual(t).tangent for t in flat(found)])
    torch.testing.assert_close(results[1], results[0])
    assert all(tangent is not None for tangent in results[1])


def test_forward_mode_in_float32(kind):
    """The same in float32, where nn.LSTM raises; against the difference quotient in float64."""
    ours = kind.ours(3, 4)
    x, tangent = torch.randn(2, 3, 2, 3)
    with fwAD.dual_level():
        got = [fwAD.unpack_dual(t).tangent for t in flat(ours(fwAD.make_dual(x, tangent)))]
    exact, step = ours.double(), 1e-6
    after = flat(exact(x.double() + step * tangent.double()))
    before = flat(exact(x.double() - step * tangent.double()))
    for a, b, c in zip(got, after, before, strict=True):
        torch.testing.assert_close(a.double(), (b - c) / (2 * step), rtol=1e-4, atol=1e-5)


def test_gradient_penalty(kind):
    """create_graph=True: a loss on the gradient of the input trains the weights as torch.nn's."""
    grads = []
    for module in kind.pair(3, 5, 2, bidirectional=True, dtype=torch.float64):
        x = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(4, 2, 3).requires_grad_()
        (g,) = torch.autograd.grad(loss_of(module(x)), x, create_graph=True)
        (g.norm() - 1).square().backward()
        grads.append([x.grad, *[p.grad for p in module.parameters()]])
    torch.testing.assert_close(grads[1], grads[0])


def test_batched_gradients(kind):
    """torch.autograd.grad(is_grads_batched=True) serves ours as it does torch.nn in float64."""
    results = []
    for module in kind.pair(3, 5, 2, bidirectional=True, dtype=torch.float64):
        x = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(4, 2, 3).requires_grad_()
        output, _ = module(x)
        cotangents = torch.linspace(-1, 2, 3 * output.numel(), dtype=x.dtype).reshape(
            3, *output.shape
        )
        leaves = [x, *module.parameters()]
        results.append(torch.autograd.grad(output, leaves, cotangents, is_grads_batched=True))
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("tokens", [False, True])
def test_vmap(kind, tokens):
    """vmap over inputs and states gives the results of a loop; torch.nn fails there."""
    stock, ours = kind.pair(3, 5, 2, bidirectional=True)
    x = torch.randint(3, (6, 4, 2)) if tokens else torch.randn(6, 4, 2, 3)
    hx = kind.state(6, 4, 2, 5)
    got = vmap(lambda x, hx: ours(x, hx))(x, hx)
    for i in range(6):
        want = ours(x[i], each(lambda tensor: tensor[i], hx))
        for a, b in zip(flat(got), flat(want), strict=True):
            torch.testing.assert_close(a[i], b)
    with pytest.raises(RuntimeError):
        vmap(lambda x: stock(x))(torch.randn(6, 4, 2, 3))


def test_vmap_over_lengths(kind):
    """Each element of the map may have lengths of its own."""
    rnn = kind.ours(3, 5)
    x, lengths = torch.randn(3, 4, 2, 3), torch.tensor([[4, 1], [2, 3], [1, 4]])
    got = vmap(lambda x, n: rnn(x, lengths=n))(x, lengths)
    for i in range(3):
        want = flat(rnn(x[i], lengths=lengths[i]))
        torch.testing.assert_close([tensor[i] for tensor in flat(got)], want)


def test_ensemble(kind):
    """vmap over stacked weights runs several networks at once."""
    networks = [kind.ours(3, 5, 2) for _ in range(4)]
    params, buffers = stack_module_state(networks)
    x = torch.randn(4, 2, 3)

    def call(p, b):
        return functional_call(networks[0], (p, b), (x,))[0]

    got = vmap(call)(params, buffers)
    torch.testing.assert_close(got, torch.stack([network(x)[0] for network in networks]))


def test_per_sample_gradients(kind):
    """vmap(grad) gives the gradients that each sample has alone.

    torch.nn fails there, or warns that oneDNN's LSTM runs sample by sample.
    """
    stock, ours = kind.pair(3, 5, 2, bidirectional=True)
    x = torch.randn(6, 4, 3)

    def gradients(module):
        return grad(lambda p, x: loss_of(functional_call(module, p, (x,))))

    got = vmap(gradients(ours), in_dims=(None, 0))(detached(ours), x)
    for i in range(6):
        want = gradients(stock)(detached(stock), x[i])
        for name in want:
            torch.testing.assert_close(got[name][i], want[name])
    with pytest.raises((RuntimeError, UserWarning)):
        vmap(gradients(stock), in_dims=(None, 0))(detached(stock), x)


def test_cell_derivatives(kind):
    """Cells: jacrev, jvp and hessian as torch.nn's, of each state."""
    stock, ours = kind.cells(3, 4, dtype=torch.float64)
    x = torch.randn(2, 3, dtype=torch.float64)
    for derivative in (
        lambda f: jacrev(f)(x),
        lambda f: jvp(f, (x,), (x,))[1],
        lambda f: hessian(lambda x: f(x).square().sum())(x),
    ):
        for part in range(len(kind.states)):
            got = derivative(lambda x: flat(ours(x))[part])
            torch.testing.assert_close(got, derivative(lambda x: flat(stock(x))[part]))
