"""Weights that are not plain parameters: replaced, parametrized, pruned, swapped."""

import warnings

import pytest
import torch
from helpers import assert_same, loss_of
from kinds import flat
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune


def replaced_by_tensor(module):
    """WeightDrop: the parameter is kept under another name, a plain tensor takes its place."""
    raw = module.weight_hh_l0
    del module._parameters["weight_hh_l0"]
    module.register_parameter("weight_hh_l0_raw", nn.Parameter(raw.data))
    module.weight_hh_l0 = module.weight_hh_l0_raw * 0.5


class Positive(nn.Module):
    """Dale's law: no weight changes its sign."""

    def forward(self, weight):
        return weight.abs()


def old_weight_norm(module):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(module, "weight_hh_l0")


def edit_data(module):
    module.weight_hh_l0.data.mul_(0.5)
    module.weight_ih_l0.data = module.weight_ih_l0.data * 2


def reassign(module):
    module.weight_hh_l0 = nn.Parameter(torch.ones_like(module.weight_hh_l0).tril() * 0.3)


def tie(module):
    module.weight_hh_l1 = module.weight_hh_l0


REPLACEMENTS = {
    "parametrize": lambda m: parametrize.register_parametrization(m, "weight_hh_l0", Positive()),
    "orthogonal": lambda m: parametrizations.orthogonal(m, "weight_hh_l0"),
    "weight_norm": lambda m: parametrizations.weight_norm(m, "weight_hh_l0"),
    "spectral_norm": lambda m: parametrizations.spectral_norm(m, "weight_hh_l0"),
    "old weight_norm": old_weight_norm,
    "prune": lambda m: prune.random_unstructured(m, "weight_hh_l0", 0.5),
    "plain tensor": replaced_by_tensor,
    "data edits": edit_data,
    "re-assigned": reassign,
    "tied": tie,
}


@pytest.mark.parametrize("how", REPLACEMENTS)
def test_replaced_weights(kind, how):
    """Weights that were replaced, by whatever means, are the ones that are used and trained."""
    results = []
    for module in kind.pair(3, 5, 2):
        module(torch.ones(4, 2, 3))  # the weights of a first call must not be remembered
        torch.manual_seed(5)
        REPLACEMENTS[how](module)
        for _ in range(2):
            x = torch.linspace(-1, 1, 24).reshape(4, 2, 3).requires_grad_()
            torch.manual_seed(6)
            output, _ = module(x)
            output.square().sum().backward(retain_graph=True)
        results.append(
            {"output": output, "x": x.grad, **{n: p.grad for n, p in module.named_parameters()}}
        )
    assert_same(results[1], results[0])


@pytest.mark.parametrize("strict", [False, True])
def test_functional_call(kind, strict):
    """functional_call runs with the tensors that it is given, and leaves the module alone."""
    stock, ours = kind.pair(3, 5, 2)
    x = torch.randn(4, 2, 3)
    before = ours(x)[0]
    params = {name: p.detach() * 0.5 for name, p in ours.named_parameters()}
    for name in params:
        params[name].requires_grad_()
    got = torch.func.functional_call(ours, params, (x,), strict=strict)[0]
    want = torch.func.functional_call(stock, params, (x,), strict=strict)[0]
    torch.testing.assert_close(got, want)
    for a, b in zip(
        torch.autograd.grad(got.sum(), list(params.values())),
        torch.autograd.grad(want.sum(), list(params.values())),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    assert torch.equal(ours(x)[0], before)


def test_flat_weights_count(kind):
    """_flat_weights that a program set itself are what is used, as by torch.nn."""
    results = []
    for module in kind.pair(3, 5):
        x = torch.linspace(-1, 1, 24).reshape(4, 2, 3)
        module(x)
        module._flat_weights = [weight * 2 for weight in module._flat_weights]
        results.append(module(x))
    torch.testing.assert_close(results[1], results[0])


def test_random_parametrization(kind):
    """A parametrization that draws numbers draws as many as with torch.nn, here and afterwards."""

    class Dropped(nn.Module):
        def forward(self, weight):
            return nn.functional.dropout(weight, 0.5)

    results = []
    for module in kind.pair(3, 5, 2):
        parametrize.register_parametrization(module, "weight_hh_l0", Dropped())
        torch.manual_seed(8)
        outputs = [module(torch.ones(4, 2, 3))[0] for _ in range(3)]
        results.append([*outputs, torch.rand(1)])
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("shape", [(1,), (1, -1)])
def test_broadcast_bias(kind, shape):
    """A bias that must be broadcast is, or is refused, as by torch.nn and its cells."""
    layers = kind.pair(3, 5, 2, bidirectional=True)
    for modules, name in ((layers, "bias_hh_l1"), (kind.cells(3, 5), "bias_ih")):
        results = []
        for module in modules:
            width = 5 * kind.gates if shape[-1] < 0 else shape[-1]
            setattr(module, name, nn.Parameter(torch.full((*shape[:-1], width), 0.5)))
            x = torch.linspace(-1, 1, 24).reshape(8, 3)
            try:
                found = module(x if name == "bias_ih" else x[:, None])
            except RuntimeError as error:
                results.append(type(error))
                continue
            loss_of(found).backward()
            results.append([*flat(found), *[p.grad for p in module.parameters()]])
        if isinstance(results[0], list):
            torch.testing.assert_close(results[1], results[0])
        else:
            assert results[1] == results[0]


@pytest.mark.parametrize("how", ["removed", "None"])
def test_missing_weight(kind, how):
    """A weight that was removed or set to None: as torch.nn, down to the type of the error."""
    results = []
    for module in kind.pair(3, 5):
        x = torch.linspace(-1, 1, 24).reshape(4, 2, 3)
        if how == "removed":
            del module.weight_hh_l0
        else:
            module.weight_hh_l0 = None
        try:
            results.append(flat(module(x)))
        except Exception as error:
            results.append(type(error))
    if isinstance(results[0], list):
        torch.testing.assert_close(results[1], results[0])
    else:
        assert results[1] == results[0]


def test_assigned_state(kind):
    """load_state_dict(assign=True) and swapped parameters are the ones in use."""
    results = []
    for module in kind.pair(3, 5):
        x = torch.linspace(-1, 1, 24).reshape(4, 2, 3)
        module(x)
        module.load_state_dict({k: v * 2 for k, v in module.state_dict().items()}, assign=True)
        results.append(flat(module(x)))
    torch.testing.assert_close(results[1], results[0])
