"""Gradients of RNN against nn.RNN's: for any subset, with in-place changes, hooks, checkpoints."""

import pytest
import torch
from helpers import assert_same, pair

import charrnn_fast


@pytest.mark.parametrize("wanted", range(6))
def test_gradient_of_one_alone(wanted):
    """Each input may be the only one that needs a gradient."""
    results = []
    for module in pair(3, 5):
        x, hx = torch.ones(4, 2, 3), torch.ones(1, 2, 5)
        leaves = [x, hx, *module.parameters()]
        for index, tensor in enumerate(leaves):
            tensor.requires_grad_(index == wanted)
        output, h_n = module(x, hx)
        (output.sum() + h_n.square().sum()).backward()
        assert [t.grad is not None for t in leaves] == [i == wanted for i in range(6)]
        results.append({"grad": leaves[wanted].grad})
    assert_same(results[1], results[0])


@pytest.mark.parametrize("through", ["output", "h_n"])
def test_gradient_through_one_result(through):
    """Only output, or only h_n, may be used."""
    results = []
    for module in pair(3, 5, 2, bidirectional=True):
        x = torch.ones(4, 2, 3, requires_grad=True)
        output, h_n = module(x)
        (output if through == "output" else h_n).square().sum().backward()
        results.append({"x": x.grad, **{n: p.grad for n, p in module.named_parameters()}})
    for name, grad in results[0].items():
        assert (results[1][name] is None) == (grad is None)
    assert_same(*[{k: v for k, v in r.items() if v is not None} for r in results[::-1]])


def test_no_gradient_needed():
    """Frozen weights and plain inputs give results that need no gradient."""
    rnn = charrnn_fast.RNN(3, 5).requires_grad_(False)
    output, h_n = rnn(torch.ones(2, 1, 3))
    assert not output.requires_grad
    assert not h_n.requires_grad


def test_frozen_weights_get_no_gradient():
    """A frozen layer below a trained one has no gradients, and the others are right."""
    results = []
    for module in pair(3, 5, 2):
        module.weight_hh_l0.requires_grad_(False)
        module.bias_ih_l1.requires_grad_(False)
        results.append(module)
        module(torch.ones(4, 2, 3))[0].sum().backward()
    stock, ours = results
    for (name, a), b in zip(ours.named_parameters(), stock.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad)


def test_backward_twice():
    """retain_graph allows a second backward; without it the error is autograd's."""
    rnn = charrnn_fast.RNN(3, 5)
    x = torch.randn(4, 2, 3, requires_grad=True)
    loss = rnn(x)[0].sum()
    loss.backward(retain_graph=True)
    first = x.grad.clone()
    loss.backward()
    assert torch.equal(x.grad, 2 * first)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("what", ["output", "h_n", "view of output", "output by relu_"])
@pytest.mark.parametrize("layers", [1, 2])
def test_results_may_change_in_place(what, layers):
    """nn.RNN's results may be changed before backward; so may ours, with the same gradients."""
    results = []
    for module in pair(3, 5, layers):
        x = torch.linspace(-1, 1, 24).reshape(4, 2, 3).requires_grad_()
        output, h_n = module(x)
        if what == "output":
            output.mul_(3)
        elif what == "h_n":
            h_n.zero_()
        elif what == "view of output":
            output[1].fill_(2)
        else:
            torch.relu_(output)
        (output.square().sum() + h_n.sum()).backward()
        results.append({"x": x.grad, **{n: p.grad for n, p in module.named_parameters()}})
    assert_same(results[1], results[0])


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("tracked", [False, True])
def test_h_n_is_not_a_view(bidirectional, tracked):
    """Writing into h_n does not reach output, nor the other way round."""
    rnn = charrnn_fast.RNN(3, 5, bidirectional=bidirectional)
    with torch.set_grad_enabled(tracked):
        output, h_n = rnn(torch.randn(4, 2, 3))
    before, state = output.detach().clone(), h_n.detach().clone()
    h_n.detach().zero_()
    assert torch.equal(output, before)
    output.detach().zero_()
    assert torch.equal(h_n, torch.zeros_like(state))
    assert output.untyped_storage().data_ptr() != h_n.untyped_storage().data_ptr()
    assert h_n._base is None


@pytest.mark.parametrize("what", ["input", "hx", "weight_ih_l0", "weight_hh_l0"])
def test_changed_operands_are_noticed(what):
    """Changing what backward needs raises autograd's version error, as for nn.RNN."""
    for module in pair(3, 5):
        x, hx = torch.randn(4, 2, 3, requires_grad=True), torch.randn(1, 2, 5)
        output, _ = module(x, hx)
        with torch.no_grad():
            {"input": x, "hx": hx}.get(what, getattr(module, what, None)).mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()


def test_changes_that_do_not_matter():
    """Backward reads no bias, and W_ih only for the input's gradient: they may change before it."""
    results = []
    for module in pair(3, 5, bidirectional=True):
        output, _ = module(torch.ones(4, 2, 3))
        with torch.no_grad():
            module.weight_ih_l0.mul_(2)
            module.bias_ih_l0.mul_(2)
            module.bias_hh_l0.mul_(2)
        output.sum().backward()
        results.append({n: p.grad for n, p in module.named_parameters()})
    assert_same(results[1], results[0])


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(
    ("changed", "frozen", "T", "batch_first"),
    [
        ("input", None, 4, True),  # nn.RNN has a copy of it
        ("input", "weight_ih", 4, False),
        ("hx", "weight_hh", 4, False),
        ("weight_hh", None, 1, False),  # no step comes after
    ],
)
def test_changed_operands_that_are_not_read(changed, frozen, T, batch_first, bidirectional):
    """What no gradient needs may be changed before backward, as with nn.RNN."""
    results = []
    for module in pair(3, 5, bidirectional=bidirectional, batch_first=batch_first):
        operands = {
            "input": torch.linspace(-1, 1, 6 * T).reshape((2, T, 3) if batch_first else (T, 2, 3)),
            "hx": torch.linspace(-1, 1, 20).reshape(2, 2, 5)[: 1 + bidirectional].clone(),
            **dict(module.named_parameters()),
        }
        for name, operand in module.named_parameters():
            operand.requires_grad_(frozen is None or frozen not in name)
        output, h_n = module(operands["input"], operands["hx"])
        with torch.no_grad():
            for name, operand in operands.items():
                if changed in name:
                    operand.mul_(2)
        (output.square().sum() + h_n.sum()).backward()
        results.append({n: p.grad for n, p in module.named_parameters() if p.grad is not None})
    assert results[0]
    assert_same(results[1], results[0])


def test_changed_operands_and_results():
    """An output that was changed is not computed again from an input that was changed, too."""
    rnn = charrnn_fast.RNN(3, 5)
    rnn.weight_ih_l0.requires_grad_(False)
    x = torch.randn(4, 2, 3)
    output, _ = rnn(x)
    output.mul_(2)
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_bias_gradients_are_two_tensors():
    """The gradients of b_ih and b_hh are equal, but changing one leaves the other alone."""
    rnn = charrnn_fast.RNN(3, 5)
    rnn(torch.randn(4, 2, 3))[0].sum().backward()
    assert torch.equal(rnn.bias_ih_l0.grad, rnn.bias_hh_l0.grad)
    before = rnn.bias_hh_l0.grad.clone()
    rnn.bias_ih_l0.grad.zero_()
    assert torch.equal(rnn.bias_hh_l0.grad, before)


def test_saved_tensor_hooks():
    """Saved tensors pass through saved_tensors_hooks, so offloading to disk or host works."""
    packed = []
    rnn = charrnn_fast.RNN(3, 5)
    x = torch.randn(4, 2, 3)
    rnn(x)[0].sum().backward()
    want = rnn.weight_hh_l0.grad.clone()
    rnn.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: packed.append(t) or t.clone(), lambda t: t
    ):
        output, _ = rnn(x)
    output.sum().backward()
    assert packed
    assert torch.equal(rnn.weight_hh_l0.grad, want)


def test_checkpointing():
    """Activation checkpointing gives the same gradients."""
    from torch.utils.checkpoint import checkpoint

    rnn = charrnn_fast.RNN(3, 5)
    x = torch.randn(4, 2, 3, requires_grad=True)
    rnn(x)[0].square().sum().backward()
    want = x.grad.clone()
    x.grad = None
    checkpoint(lambda x: rnn(x)[0], x, use_reentrant=False).square().sum().backward()
    assert torch.equal(x.grad, want)


@pytest.mark.parametrize("B", [1, 7])
def test_one_step_needs_no_recurrent_weight(isa, B):
    """Without a state before the only step, what W_hh holds has no influence."""
    x, dy, W_ih = torch.randn(1, B, 3), torch.randn(1, B, 70), torch.randn(70, 3)
    y = torch.randn(1, B, 70)

    def backward(W_hh):
        return torch.ops.charrnn_fast.rnn_layer_backward(
            dy,
            None,
            x,
            None,
            [W_ih, W_hh],
            y,
            None,
            None,
            "RNN_TANH",
            False,
            [True, False, True, True],
        )

    for got, want in zip(
        backward(torch.full((70, 70), torch.nan)), backward(torch.zeros(70, 70)), strict=True
    ):
        assert torch.equal(got, want)
