"""Gradients against torch.nn's: for any subset, with in-place changes, hooks, checkpoints."""

import copy
import itertools

import pytest
import torch
from helpers import NO_STATES, assert_same, call_op, leaf, loss_of
from kinds import KINDS, each, flat

import charrnn_fast

# One result of each kind of network, by its place among them.
RESULTS = [(kind, result) for kind in KINDS for result in range(1 + len(kind.states))]


@pytest.mark.parametrize("wanted", range(7))
def test_gradient_of_one_alone(kind, wanted):
    """Each input may be the only one that needs a gradient."""
    count = 5 + len(kind.states)
    if wanted >= count:
        pytest.skip(f"{kind} has no such input")
    results = []
    for module in kind.pair(3, 5):
        x, hx = torch.ones(4, 2, 3), kind.state(1, 2, 5, make=torch.ones)
        leaves = [x, *flat(hx), *module.parameters()]
        for index, tensor in enumerate(leaves):
            tensor.requires_grad_(index == wanted)
        loss_of(module(x, hx)).backward()
        assert [t.grad is not None for t in leaves] == [i == wanted for i in range(count)]
        results.append({"grad": leaves[wanted].grad})
    assert_same(results[1], results[0])


@pytest.mark.parametrize("seed", range(12))
def test_gradients_of_any_subset(kind, seed):
    """Any subset of inputs needs gradients, any subset of results is used: as torch.nn's."""
    generator = torch.Generator().manual_seed(seed)
    results = []
    draws = torch.rand(40, generator=generator)
    for module in kind.pair(3, 5, 2, bidirectional=True, dtype=torch.float64):
        x = leaf(torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(4, 2, 3))
        hx = each(leaf, kind.state(4, 2, 5, make=torch.ones, dtype=torch.float64))
        leaves = [x, *flat(hx), *module.parameters()]
        for index, tensor in enumerate(leaves):
            tensor.requires_grad_(bool(draws[index] < 0.5))
        wanted = [tensor for tensor in leaves if tensor.requires_grad]
        outputs = flat(module(x, hx))
        used = [t for index, t in enumerate(outputs) if draws[-1 - index] < 0.6] or outputs[-1:]
        grads = torch.autograd.grad(loss_of(used), wanted, materialize_grads=True)
        results.append(dict(enumerate(grads)))
    assert_same(results[1], results[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("kind", "through"), RESULTS, ids=str)
def test_gradient_through_one_result(kind, through):
    """Only output, only h_n or only c_n may be used."""
    results = []
    for module in kind.pair(3, 5, 2, bidirectional=True):
        x = torch.ones(4, 2, 3, requires_grad=True)
        hx = each(leaf, kind.state(4, 2, 5, make=torch.ones))
        flat(module(x, hx))[through].square().sum().backward()
        results.append({"x": x.grad, **{n: p.grad for n, p in module.named_parameters()}})
        results[-1] |= {f"d {i}": tensor.grad for i, tensor in enumerate(flat(hx))}
    for name, grad in results[0].items():
        assert (results[1][name] is None) == (grad is None), name
    assert_same(*[{k: v for k, v in r.items() if v is not None} for r in results[::-1]])


def test_no_gradient_needed(kind):
    """Frozen weights and plain inputs give results that need no gradient."""
    rnn = kind.ours(3, 5).requires_grad_(False)
    assert not any(tensor.requires_grad for tensor in flat(rnn(torch.ones(2, 1, 3))))


def test_frozen_weights_get_no_gradient(kind):
    """A frozen layer below a trained one has no gradients, and the others are right."""
    results = []
    for module in kind.pair(3, 5, 2):
        module.weight_hh_l0.requires_grad_(False)
        module.bias_ih_l1.requires_grad_(False)
        results.append(module)
        module(torch.ones(4, 2, 3))[0].sum().backward()
    stock, ours = results
    for (name, a), b in zip(ours.named_parameters(), stock.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad)


def test_backward_twice(kind):
    """retain_graph allows a second backward; without it the error is autograd's."""
    rnn = kind.ours(3, 5)
    x = torch.randn(4, 2, 3, requires_grad=True)
    loss = rnn(x)[0].sum()
    loss.backward(retain_graph=True)
    first = x.grad.clone()
    loss.backward()
    assert torch.equal(x.grad, 2 * first)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


CHANGES = {
    "output": lambda output, *states: output.mul_(3),
    "h_n": lambda output, *states: states[0].zero_(),
    "last state": lambda output, *states: states[-1].zero_(),
    "all": lambda output, *states: [tensor.mul_(2) for tensor in (output, *states)],
    "view of output": lambda output, *states: output[1].fill_(2),
    "output by relu_": lambda output, *states: torch.relu_(output),
}


@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("layers", [1, 2])
def test_results_may_change_in_place(kind, what, layers):
    """torch.nn's results may be changed before backward; so may ours, with the same gradients."""
    results = []
    # In float64: oneDNN's LSTM of float32 does not allow it.
    for module in kind.pair(3, 5, layers, dtype=torch.float64):
        x = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(4, 2, 3).requires_grad_()
        found = flat(module(x))
        CHANGES[what](*found)
        loss_of([tensor.square() for tensor in found]).backward()
        results.append({"x": x.grad, **{n: p.grad for n, p in module.named_parameters()}})
    assert_same(results[1], results[0])


@pytest.mark.parametrize("what", CHANGES)
def test_results_of_float32_may_change_in_place(kind, what):
    """The same, against what is changed not in place."""
    ours = kind.ours(3, 5, 2)
    x = torch.linspace(-1, 1, 24).reshape(4, 2, 3)
    found = flat(ours(x))
    copies = [tensor.clone() for tensor in flat(ours(x))]
    for tensors in (found, copies):
        CHANGES[what](*tensors)
    got, want = (torch.autograd.grad(loss_of(t), ours.parameters()) for t in (found, copies))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("tracked", [False, True])
@pytest.mark.parametrize("T", [1, 4])
def test_h_n_is_not_a_view(kind, bidirectional, tracked, T):
    """Writing into one result reaches no other."""
    rnn = kind.ours(3, 5, bidirectional=bidirectional)
    with torch.set_grad_enabled(tracked):
        results = flat(rnn(torch.randn(T, 2, 3)))
    before = [tensor.detach().clone() for tensor in results]
    assert len({tensor.untyped_storage().data_ptr() for tensor in results}) == len(results)
    for index, tensor in enumerate(results):
        assert tensor._base is None
        tensor.detach().zero_()
        for other, want in zip(results[index + 1 :], before[index + 1 :], strict=True):
            assert torch.equal(other, want)


@pytest.mark.parametrize("what", ["input", "hx", "last state", "weight_ih_l0", "weight_hh_l0"])
def test_changed_operands_are_noticed(kind, what):
    """Changing what backward needs raises autograd's version error, as for torch.nn."""
    for module in kind.pair(3, 5):
        x, hx = torch.randn(4, 2, 3, requires_grad=True), kind.state(1, 2, 5)
        output, _ = module(x, hx)
        places = {"input": x, "hx": flat(hx)[0], "last state": flat(hx)[-1]}
        with torch.no_grad():
            places.get(what, getattr(module, what, None)).mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()


@pytest.mark.parametrize("what", ["lengths", "resets"])
def test_changed_lengths_and_resets_are_noticed(kind, what):
    """A buffer of dones that is filled anew before backward must not cut what forward did not."""
    given = {"lengths": torch.tensor([2, 4]), "resets": torch.rand(4, 2) < 0.5}[what]
    output, _ = kind.ours(3, 5)(torch.randn(4, 2, 3), **{what: given})
    given.fill_(1)
    with pytest.raises(RuntimeError, match=f"modified by an inplace operation: {what}"):
        output.sum().backward()


@pytest.mark.parametrize("what", ["lengths", "resets"])
def test_arrays_of_lengths_and_resets_may_change(kind, what):
    """NumPy's arrays have no versions, so a module keeps none of them."""
    rnn, x = kind.ours(3, 5), torch.randn(4, 2, 3)
    grads = []
    for change in (False, True):
        given = {"lengths": torch.tensor([2, 4]), "resets": torch.tensor([[0, 0], [0, 1]] * 2) > 0}
        array = given[what].numpy()
        rnn.zero_grad()
        results = rnn(x, **{what: array})
        if change:
            array.fill(1)
        loss_of(results).backward()
        grads.append({name: p.grad.clone() for name, p in rnn.named_parameters()})
    for name, grad in grads[0].items():
        assert torch.equal(grad, grads[1][name]), name


def gradients_after(change, module, x, hx, loss=loss_of):
    """Gradients of the parameters where `change` comes between forward and backward.

    None where autograd complains of it.
    """
    results = module(x, hx)
    with torch.no_grad():
        change()
    try:
        loss(results).backward()
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        return None
    return {n: p.grad for n, p in module.named_parameters() if p.grad is not None}


def assert_sound(stock, ours, truth):
    """Ours are the gradients before the change; it complains of changes that torch.nn does, too."""
    assert truth
    if ours is None:
        assert stock is None, "torch.nn allows that change"
    else:
        assert_same(ours, truth)


def test_changes_that_do_not_matter(kind):
    """Backward reads no bias, and W_ih only for the input's gradient: they may change before it."""
    stock, ours = kind.pair(3, 5)
    results = []
    for module, is_changed in ((stock, True), (ours, True), (kind.pair(3, 5)[0], False)):
        for index, parameter in enumerate(module.parameters(), 1):
            parameter.data = torch.linspace(-1, 1, parameter.numel()).view_as(parameter) / index

        def change():
            if is_changed:
                module.weight_ih_l0.mul_(2)
                module.bias_ih_l0.mul_(2)
                module.bias_hh_l0.mul_(2)

        results.append(gradients_after(change, module, torch.ones(4, 2, 3), None))
    assert results[1] is not None
    assert_sound(*results)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(
    ("changed", "frozen", "T", "batch_first"),
    [
        ("input", None, 4, True),  # torch.nn has a copy of it
        ("input", "weight_ih", 4, False),
        ("hx", "weight_hh", 4, False),
        ("weight_hh", None, 1, False),  # no step comes after
    ],
)
def test_changed_operands_that_are_not_read(kind, changed, frozen, T, batch_first, bidirectional):
    """What no gradient needs may be changed before backward, as with torch.nn."""
    stock, ours = kind.pair(3, 5, bidirectional=bidirectional, batch_first=batch_first)
    results = []
    for module, is_changed in ((stock, True), (ours, True), (stock, False)):
        module.zero_grad()
        x = torch.linspace(-1, 1, 6 * T).reshape((2, T, 3) if batch_first else (T, 2, 3))
        state = torch.linspace(-1, 1, 20).reshape(2, 2, 5)[: 1 + bidirectional]
        hx = each(lambda tensor: state.clone(), kind.state(1))
        saved = {name: p.detach().clone() for name, p in module.named_parameters()}
        for name, operand in module.named_parameters():
            operand.requires_grad_(frozen is None or frozen not in name)
        operands = {"input": x, "hx": flat(hx)[0], **dict(module.named_parameters())}

        def change():
            for name, operand in operands.items():
                if changed in name and is_changed:
                    operand.mul_(2)

        results.append(gradients_after(change, module, x, hx))
        if kind.name == "GRU" and changed == "hx" and results[-1] is None:
            return  # z's gradient reads the state before, of which nn.GRU has saved a difference
        with torch.no_grad():
            for name, p in module.named_parameters():
                p.copy_(saved[name])
    assert_sound(*results)


@pytest.mark.parametrize("how", ["create_graph", "is_grads_batched"])
@pytest.mark.parametrize("changed", ["input", "bias_hh_l0"])
def test_changed_operands_that_gates_are_computed_from_again(kind, how, changed):
    """Double backward and batched gradients compute the gates again: no operand may have changed.

    An Elman network has no gates but y, and its gradients stay what they were.
    """
    rnn = kind.ours(3, 5)
    rnn.weight_ih_l0.requires_grad_(False)
    leaves = [p for p in rnn.parameters() if p.requires_grad]
    x = torch.randn(4, 2, 3)
    operand = x if changed == "input" else rnn.get_parameter(changed)

    def gradients(change):
        output, _ = rnn(x)
        with torch.no_grad():
            change()
        if how == "create_graph":
            return torch.autograd.grad(output.sum(), leaves, create_graph=True)
        seeds = torch.ones(1, *output.shape)
        return torch.autograd.grad(output, leaves, seeds, is_grads_batched=True)

    want = gradients(lambda: None)
    if kind.gates == 1:
        torch.testing.assert_close(gradients(lambda: operand.add_(1)), want, rtol=0, atol=0)
        return
    name = changed.removesuffix("_l0")
    with pytest.raises(RuntimeError, match=f"modified by an inplace operation: {name}"):
        gradients(lambda: operand.add_(1))


def test_changed_bias_and_another_isa(kind):
    """Kernels that compute bfloat16 in another dtype than forward's compute the gates again."""
    start = kind.ours(3, 5, dtype=torch.bfloat16)
    x = torch.randn(4, 2, 3).bfloat16()

    def gradient(forward, backward, change):
        rnn = copy.deepcopy(start)
        with charrnn_fast.use_isa(forward):
            output, _ = rnn(x)
        if change:  # adding zero would count as a change, too
            with torch.no_grad():
                rnn.bias_ih_l0.add_(change)
        with charrnn_fast.use_isa(backward):
            return torch.autograd.grad(output.sum(), rnn.weight_hh_l0)[0]

    isas = charrnn_fast.available_isas()
    for forward, backward in itertools.product(isas, isas):
        want = gradient(forward, backward, 0)
        try:
            got = gradient(forward, backward, 1)
        except RuntimeError as error:
            got = error
        if isinstance(got, RuntimeError):
            assert "modified by an inplace operation: bias_ih" in str(got)
        else:
            assert torch.equal(got, want)


def test_changed_operands_and_results(kind):
    """An output that was changed is not computed again from an input that was changed, too."""
    rnn = kind.ours(3, 5)
    rnn.weight_ih_l0.requires_grad_(False)
    x = torch.randn(4, 2, 3)
    truth = gradients_after(lambda: None, rnn, x, None, lambda results: 2 * results[0].sum())
    rnn.zero_grad()

    def change_output(*args):
        results = rnn(*args)
        results[0].mul_(2)
        return results

    change_output.named_parameters = rnn.named_parameters
    got = gradients_after(lambda: x.mul_(2), change_output, x, None, lambda r: r[0].sum())
    if got is not None:
        assert_same(got, truth)


def test_bias_gradients_are_two_tensors(kind):
    """Changing the gradient of b_ih leaves that of b_hh alone, where they are equal, too."""
    rnn = kind.ours(3, 5)
    rnn(torch.randn(4, 2, 3))[0].sum().backward()
    assert torch.equal(rnn.bias_ih_l0.grad, rnn.bias_hh_l0.grad) == (kind.name != "GRU")
    before = rnn.bias_hh_l0.grad.clone()
    rnn.bias_ih_l0.grad.zero_()
    assert torch.equal(rnn.bias_hh_l0.grad, before)


def test_saved_tensor_hooks(kind):
    """Saved tensors pass through saved_tensors_hooks, so offloading to disk or host works."""
    packed = []
    rnn = kind.ours(3, 5)
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


def test_checkpointing(kind):
    """Activation checkpointing gives the same gradients."""
    from torch.utils.checkpoint import checkpoint

    rnn = kind.ours(3, 5)
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
    needs = [True, *NO_STATES, True, True]

    def backward(W_hh):
        return call_op(
            "rnn_layer_backward",
            dy=dy,
            input=x,
            weights=[W_ih, W_hh],
            y=y,
            mode="RNN_TANH",
            has_biases=False,
            needs=needs,
        )

    for got, want in zip(
        backward(torch.full((70, 70), torch.nan)), backward(torch.zeros(70, 70)), strict=True
    ):
        assert torch.equal(got, want)
