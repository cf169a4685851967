"""RNNCell against nn.RNNCell."""

import copy
import pickle

import pytest
import torch
from helpers import cells, leaf
from torch import nn
from torch.nn.utils import parametrize

import charrnn_fast
from charrnn_fast.ops import assert_fused


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("with_hx", [False, True])
def test_step(isa, nonlinearity, bias, batched, with_hx):
    """One step gives the state and all gradients of nn.RNNCell's, batched or not."""
    stock, ours = cells(3, 5, bias, nonlinearity, dtype=torch.float64)
    shape = (4,) if batched else ()
    data = torch.randn(*shape, 3, dtype=torch.float64)
    state = torch.randn(*shape, 5, dtype=torch.float64) if with_hx else None
    results = []
    for cell in (stock, ours):
        x, hx = leaf(data), None if state is None else leaf(state)
        h = cell(x, hx)
        h.cos().sum().backward()
        leaves = [x, *([] if hx is None else [hx]), *cell.parameters()]
        results.append([h, *[tensor.grad for tensor in leaves]])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    with assert_fused():
        ours(data, state)


def test_unrolled():
    """A loop of steps, changed in place between them, gives nn.RNNCell's gradients."""
    results = []
    for cell in cells(3, 5):
        x = torch.linspace(-1, 1, 24).reshape(4, 2, 3).requires_grad_()
        h = None
        states = []
        for step in x:
            h = cell(step, h)
            states.append(h * 2)
        torch.stack(states).square().sum().backward()
        results.append([x.grad, *[p.grad for p in cell.parameters()]])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_state_may_change_in_place():
    """The new state may be changed before backward, which nn.RNNCell refuses."""
    stock, ours = cells(3, 5)
    x = torch.ones(2, 3)
    (stock(x) * 2).square().sum().backward()
    h = ours(x)
    h.mul_(2)
    h.square().sum().backward()
    for a, b in zip(stock.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_sigmoid_and_ids():
    """Beyond nn.RNNCell: sigmoid, and ids in place of one-hot vectors."""
    cell = charrnn_fast.RNNCell(4, 5, nonlinearity="sigmoid")
    ids = torch.tensor([3, 0])
    want = torch.sigmoid(
        cell.weight_ih.T[ids] + cell.bias_ih + cell.bias_hh + torch.ones(2, 5) @ cell.weight_hh.T
    )
    torch.testing.assert_close(cell(ids, torch.ones(2, 5)), want)
    torch.testing.assert_close(cell(torch.eye(4)[ids], torch.ones(2, 5)), want)
    torch.testing.assert_close(cell(ids[0], torch.ones(5)), want[0])
    with pytest.raises(IndexError, match="token id 4"):
        cell(torch.tensor([4]))


def test_module_behaviour():
    """repr, state_dict, copies and isinstance are nn.RNNCell's."""
    stock, ours = cells(3, 5, nonlinearity="relu")
    assert repr(ours) == repr(stock)
    assert isinstance(ours, nn.RNNCell)
    x = torch.randn(2, 3)
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(copied(x), ours(x))
    stock.load_state_dict(ours.state_dict())


def test_replaced_weights():
    """Parametrized weights and functional_call are followed."""

    class Half(nn.Module):
        def forward(self, weight):
            return weight / 2

    stock, ours = cells(3, 5)
    x, h = torch.randn(2, 3), torch.randn(2, 5)
    params = {n: p * 2 for n, p in ours.named_parameters()}
    torch.testing.assert_close(
        torch.func.functional_call(ours, params, (x, h)),
        torch.func.functional_call(stock, params, (x, h)),
    )
    for cell in (stock, ours):
        parametrize.register_parametrization(cell, "weight_hh", Half())
    torch.testing.assert_close(ours(x, h), stock(x, h))


def test_transforms_and_dtypes():
    """vmap of per-sample gradients, autocast and bfloat16 work."""
    stock, ours = cells(3, 5)
    x = torch.randn(6, 3)

    def loss(cell, params, x):
        return torch.func.functional_call(cell, params, (x,)).square().sum()

    params = {n: p.detach() for n, p in ours.named_parameters()}
    per_sample = torch.func.vmap(torch.func.grad(lambda p, x: loss(ours, p, x)), in_dims=(None, 0))(
        params, x
    )
    for i in range(6):
        want = torch.func.grad(lambda p, x: loss(stock, p, x))(params, x[i])
        for name in params:
            torch.testing.assert_close(per_sample[name][i], want[name])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ours(x).dtype == stock(x).dtype
    torch.testing.assert_close(ours.bfloat16()(x.bfloat16()), stock.bfloat16()(x.bfloat16()))


def test_empty_batch():
    """B=0 gives an empty state."""
    stock, ours = cells(3, 5)
    assert ours(torch.zeros(0, 3)).shape == stock(torch.zeros(0, 3)).shape


# One column more or less than whole tiles; x or h or both in several pieces.
ONE_STEP = [(1, 5, 7), (4, 64, 48), (2, 40, 1100), (7, 600, 129), (3, 1300, 21), (97, 28, 66)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("B", "I", "H"), ONE_STEP)
def test_bits_of_one_step(isa, B, I, H, dtype):
    """A sequence of one step has the same bits alone, beside longer ones and for any threads."""
    rnn = charrnn_fast.RNN(I, H, bidirectional=True, dtype=dtype)
    x, hx = torch.randn(3, B, I, dtype=dtype), torch.randn(2, B, H, dtype=dtype)
    ids = torch.randint(I, (3, B))
    lengths = torch.tensor([3, 1, 2, 1] * B)[1 : B + 1]
    for input, state in ((x, hx), (x, None), (ids, hx), (ids, None)):
        one, h_n = rnn(input[:1], state)
        assert torch.equal(torch.cat(list(h_n), 1), one[0])
        mixed, h_n = rnn(input, state, lengths)
        assert torch.equal(mixed[0, lengths == 1], one[0, lengths == 1])
        assert torch.equal(torch.cat(list(h_n), 1)[lengths == 1], one[0, lengths == 1])
        alone = rnn(input[:1, B - 1 :], None if state is None else state[:, B - 1 :])[0]
        assert torch.equal(alone[:, 0], one[:, B - 1])
        torch.set_num_threads(3)
        assert torch.equal(rnn(input[:1], state)[0], one)
        assert torch.equal(rnn(input, state, lengths)[0], mixed)


@pytest.mark.parametrize(("B", "I", "H"), ONE_STEP)
def test_error_of_one_step(isa, B, I, H):
    """At most twice the error of nn.RNNCell against float64, with and without a state."""
    stock, ours = cells(I, H)
    x, h = torch.randn(B, I), torch.randn(B, H)
    for state in (h, None):
        exact = stock.double()(x.double(), None if state is None else state.double())
        error = (ours(x, state) - exact).abs().max()
        assert error <= 2 * (stock.float()(x, state) - exact).abs().max()
