"""The cells against torch.nn's."""

import pytest
import torch
from helpers import loss_of, rounding_of_product, run
from kinds import KINDS, VARIANTS, each, flat
from torch import nn
from torch.nn.utils import parametrize

import charrnn_fast
from charrnn_fast.ops import assert_fused


@pytest.mark.parametrize(("kind", "variant"), VARIANTS, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("with_hx", [False, True])
def test_step(isa, kind, variant, bias, batched, with_hx):
    """One step gives the states and all gradients of torch.nn's cell, batched or not."""
    stock, ours = kind.cells(3, 5, bias, dtype=torch.float64, **variant)
    shape = (4,) if batched else ()
    x = torch.randn(*shape, 3, dtype=torch.float64)
    hx = kind.state(*shape, 5, dtype=torch.float64) if with_hx else None
    want = run(stock, x, hx)
    with assert_fused():
        got = run(ours, x, hx)
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], msg=name)
    assert type(ours(x, hx)) is type(stock(x, hx))


def test_unrolled(kind):
    """A loop of steps, changed in place between them, gives the gradients of torch.nn's cell."""
    results = []
    for cell in kind.cells(3, 5):
        x = torch.linspace(-1, 1, 24).reshape(4, 2, 3).requires_grad_()
        state = None
        losses = []
        for step in x:
            state = cell(step, state)
            losses.append(loss_of(each(lambda tensor: tensor * 2, state)))
        torch.stack(losses).square().sum().backward()
        results.append([x.grad, *[p.grad for p in cell.parameters()]])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_state_may_change_in_place(kind):
    """The new state may be changed before backward, which torch.nn's cells may refuse."""
    stock, ours = kind.cells(3, 5)
    x = torch.ones(2, 3)
    loss_of(each(lambda tensor: (tensor * 2).square(), stock(x))).backward()
    states = ours(x)
    for tensor in flat(states):
        tensor.mul_(2)
    loss_of(each(torch.square, states)).backward()
    for a, b in zip(stock.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_states_as_tuple_and_list():
    """LSTMCell takes its two states as torch.nn's does: as a tuple or a list."""
    for kind in KINDS:
        if kind.has_cell_state:
            stock, ours = kind.cells(3, 5)
            x, hx = torch.randn(2, 3), kind.state(2, 5)
            for form in (tuple, list):
                torch.testing.assert_close(ours(x, form(hx)), stock(x, form(hx)))


def test_tokens(kind):
    """Beyond torch.nn: ids in place of one-hot vectors, batched or not."""
    ours = kind.cell(4, 5)
    ids, hx = torch.tensor([3, 0]), kind.state(2, 5)
    with assert_fused():
        got = ours(ids, hx)
    torch.testing.assert_close(got, ours(torch.eye(4)[ids], hx))
    torch.testing.assert_close(
        ours(ids[0], each(lambda tensor: tensor[0], hx)), each(lambda tensor: tensor[0], got)
    )
    with pytest.raises(IndexError, match="token id 4"):
        ours(torch.tensor([4]))


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


def test_replaced_weights(kind):
    """Parametrized weights and functional_call are followed."""

    class Half(nn.Module):
        def forward(self, weight):
            return weight / 2

    stock, ours = kind.cells(3, 5)
    x, hx = torch.randn(2, 3), kind.state(2, 5)
    params = {n: p * 2 for n, p in ours.named_parameters()}
    torch.testing.assert_close(
        torch.func.functional_call(ours, params, (x, hx)),
        torch.func.functional_call(stock, params, (x, hx)),
    )
    for cell in (stock, ours):
        parametrize.register_parametrization(cell, "weight_hh", Half())
    torch.testing.assert_close(ours(x, hx), stock(x, hx))


def test_transforms_and_dtypes(kind):
    """vmap of per-sample gradients, autocast and bfloat16 work."""
    stock, ours = kind.cells(3, 5)
    x = torch.randn(6, 3)

    def loss(cell, params, x):
        return loss_of(torch.func.functional_call(cell, params, (x,)))

    params = {n: p.detach() for n, p in ours.named_parameters()}
    per_sample = torch.func.vmap(torch.func.grad(lambda p, x: loss(ours, p, x)), in_dims=(None, 0))(
        params, x
    )
    for i in range(6):
        want = torch.func.grad(lambda p, x: loss(stock, p, x))(params, x[i])
        for name in params:
            torch.testing.assert_close(per_sample[name][i], want[name])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, want = flat(ours(x)), flat(stock(x))
    assert [t.dtype for t in got] == [t.dtype for t in want]
    torch.testing.assert_close(
        ours.bfloat16()(x.bfloat16()), stock.bfloat16()(x.bfloat16()), rtol=0.02, atol=0.02
    )


def test_empty_batch(kind):
    """B=0 gives empty states and zero gradients."""
    stock, ours = kind.cells(3, 5)
    x = torch.zeros(0, 3)
    assert [t.shape for t in flat(ours(x))] == [t.shape for t in flat(stock(x))]
    loss_of(ours(x)).backward()
    assert all(not p.grad.any() for p in ours.parameters())


# One column more or less than whole tiles; x or h or both in several pieces.
ONE_STEP = [(1, 5, 7), (4, 64, 48), (2, 40, 1100), (7, 600, 129), (3, 1300, 21), (97, 28, 66)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("B", "I", "H"), ONE_STEP)
def test_bits_of_one_step(isa, kind, B, I, H, dtype):
    """A sequence of one step has the same bits alone, beside longer ones and for any threads."""
    rnn = kind.ours(I, H, bidirectional=True, dtype=dtype)
    x, hx = torch.randn(3, B, I, dtype=dtype), kind.state(2, B, H, dtype=dtype)
    ids = torch.randint(I, (3, B))
    lengths = torch.tensor([3, 1, 2, 1] * B)[1 : B + 1]
    for input, state in ((x, hx), (x, None), (ids, hx), (ids, None)):
        one, states = rnn(input[:1], state)
        h_n = flat(states)[0]
        assert torch.equal(torch.cat(list(h_n), 1), one[0])
        mixed, mixed_states = rnn(input, state, lengths)
        assert torch.equal(mixed[0, lengths == 1], one[0, lengths == 1])
        for got, want in zip(flat(mixed_states), flat(states), strict=True):
            assert torch.equal(got[:, lengths == 1], want[:, lengths == 1])
        alone = rnn(input[:1, B - 1 :], each(lambda tensor: tensor[:, B - 1 :], state))[0]
        assert torch.equal(alone[:, 0], one[:, B - 1])
        torch.set_num_threads(3)
        assert torch.equal(rnn(input[:1], state)[0], one)
        assert torch.equal(rnn(input, state, lengths)[0], mixed)
        torch.set_num_threads(1)


@pytest.mark.parametrize(("B", "I", "H"), ONE_STEP)
def test_error_of_one_step(isa, kind, B, I, H):
    """Against float64: at most twice that of torch.nn's cell, or what a sum may round.

    torch's own depends on how its library sums on this CPU; the second bound does not. No formula
    of a step makes more of an error of its sums than there is, and c adds that of its product.
    """
    stock, ours = kind.cells(I, H)
    x, hx = torch.randn(B, I), kind.state(B, H)
    for state in (hx, None):
        exact = flat(stock.double()(x.double(), each(lambda tensor: tensor.double(), state)))
        theirs = flat(stock.float()(x, state))
        sums = rounding_of_product(x, ours.weight_ih)
        if state is not None:
            sums = sums + rounding_of_product(flat(state)[0], ours.weight_hh)
        scale = max(1.0, *[tensor.abs().max().item() for tensor in exact])
        bound = sums.max().item() * scale
        for got, want, truth in zip(flat(ours(x, state)), theirs, exact, strict=True):
            error = (got - truth).abs().max().item()
            assert error <= max(2 * (want - truth).abs().max().item(), bound)
