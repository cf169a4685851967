"""RNN against nn.RNN: outputs, states, gradients, and what surrounds them."""

import copy
import io
import pickle
import threading
import warnings

import pytest
import torch
from helpers import assert_as_accurate, assert_same, leaf, pair, run
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import elman
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import charrnn_fast
from charrnn_fast.ops import assert_fused, counters

CONFIGURATIONS = [
    {},
    {"nonlinearity": "relu"},
    {"num_layers": 2},
    {"bidirectional": True},
    {"num_layers": 3, "bidirectional": True, "batch_first": True},
    {"bias": False, "num_layers": 2},
    {"bias": False, "bidirectional": True, "nonlinearity": "relu"},
]
SHAPES = [(1, 1, 1, 1), (1, 4, 3, 5), (7, 1, 3, 5), (5, 3, 6, 17), (12, 9, 33, 64), (3, 33, 16, 70)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", CONFIGURATIONS, ids=str)
def test_as_accurate_as_stock(isa, options, shape):
    """Outputs, h_n and all gradients are as close to float64 as nn.RNN's, on every ISA, fused."""
    T, B, I, H = shape
    stock, ours = pair(I, H, **options)
    exact = copy.deepcopy(stock).double()
    x = torch.randn((B, T, I) if options.get("batch_first") else (T, B, I))
    layers = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    hx = torch.randn(layers, B, H)
    with assert_fused():
        got = run(ours, x, hx)
    assert_as_accurate(got, run(stock, x, hx), run(exact, x.double(), hx.double()))


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu", "sigmoid"])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_against_the_formula(isa, nonlinearity, bidirectional):
    """In float64 the results and gradients are those of the formula, to rounding."""
    rnn = charrnn_fast.RNN(4, 6, 2, nonlinearity, bidirectional=bidirectional, dtype=torch.float64)
    x = leaf(torch.randn(5, 3, 4, dtype=torch.float64))
    hx = leaf(torch.randn(4 if bidirectional else 2, 3, 6, dtype=torch.float64))
    leaves = [x, hx, *rnn.parameters()]
    with assert_fused():
        got = rnn(x, hx)
        got_grads = torch.autograd.grad(got[0].cos().sum() + got[1].sin().sum(), leaves)
    want = elman(x, hx, rnn._flat_weights, rnn.mode, True, 2, bidirectional)
    want_grads = torch.autograd.grad(want[0].cos().sum() + want[1].sin().sum(), leaves)
    for a, b in zip([*got, *got_grads], [*want, *want_grads], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    T=st.integers(1, 9),
    B=st.integers(0, 9),
    I=st.integers(1, 40),
    H=st.integers(1, 80),
    layers=st.integers(1, 3),
    nonlinearity=st.sampled_from(["tanh", "relu"]),
    flags=st.tuples(*[st.booleans()] * 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_shape(T, B, I, H, layers, nonlinearity, flags, seed):
    """Any sizes, any options: the same results as nn.RNN in float64."""
    bias, batch_first, bidirectional, with_hx = flags
    torch.manual_seed(seed)
    stock, ours = pair(
        I, H, layers, nonlinearity, bias, batch_first, 0.0, bidirectional, dtype=torch.float64
    )
    x = torch.randn((B, T, I) if batch_first else (T, B, I), dtype=torch.float64)
    hx = None
    if with_hx:
        hx = torch.randn(layers * (2 if bidirectional else 1), B, H, dtype=torch.float64)
    assert_same(run(ours, x, hx), run(stock, x, hx), rtol=1e-9, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 8), min_size=1, max_size=7),
    nonlinearity=st.sampled_from(["tanh", "relu", "sigmoid"]),
    bidirectional=st.booleans(),
    tokens=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_lengths(lengths, nonlinearity, bidirectional, tokens, seed):
    """Any lengths, ids or vectors: the same outputs, states and gradients as the formula."""
    torch.manual_seed(seed)
    T, B = max(lengths), len(lengths)
    rnn = charrnn_fast.RNN(5, 7, 2, nonlinearity, bidirectional=bidirectional, dtype=torch.float64)
    x = torch.randint(5, (T, B)) if tokens else torch.randn(T, B, 5, dtype=torch.float64)
    hx = torch.randn(4 if bidirectional else 2, B, 7, dtype=torch.float64, requires_grad=True)
    leaves = [hx, *rnn.parameters()]
    got = rnn(x, hx, torch.tensor(lengths))
    want = elman(x, hx, rnn._flat_weights, rnn.mode, True, 2, bidirectional, lengths)
    got_grads = torch.autograd.grad(got[0].cos().sum() + got[1].sin().sum(), leaves)
    want_grads = torch.autograd.grad(want[0].cos().sum() + want[1].sin().sum(), leaves)
    for a, b in zip([*got, *got_grads], [*want, *want_grads], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


# Construction and what a module is


def test_constructor_takes_the_same_arguments():
    """Positional and keyword arguments, device and dtype mean what they mean in nn.RNN."""
    positional = (3, 5, 2, "relu", False, True, 0.25, True)
    keywords = dict(
        zip(
            [
                "input_size",
                "hidden_size",
                "num_layers",
                "nonlinearity",
                "bias",
                "batch_first",
                "dropout",
                "bidirectional",
            ],
            positional,
            strict=True,
        )
    )
    for ours in (
        charrnn_fast.RNN(*positional, device="cpu", dtype=torch.float64),
        charrnn_fast.RNN(**keywords, device="cpu", dtype=torch.float64),
    ):
        stock = nn.RNN(*positional, device="cpu", dtype=torch.float64)
        assert repr(ours) == repr(stock)
        assert ours.__dict__.keys() == stock.__dict__.keys()
        for name in (*keywords, "mode"):
            assert getattr(ours, name) == getattr(stock, name), name
        assert [p.dtype for p in ours.parameters()] == [torch.float64] * 8
        assert isinstance(ours, nn.RNN)


def test_same_seed_same_weights():
    """The parameters are drawn as nn.RNN draws them."""
    torch.manual_seed(3)
    stock = nn.RNN(3, 5, 2, bidirectional=True)
    torch.manual_seed(3)
    ours = charrnn_fast.RNN(3, 5, 2, bidirectional=True)
    for a, b in zip(ours.parameters(), stock.parameters(), strict=True):
        assert torch.equal(a, b)


def test_sigmoid_shows_in_repr():
    """A sigmoid network says so; it is not nn.RNN's default."""
    assert "sigmoid" in repr(charrnn_fast.RNN(2, 3, nonlinearity="sigmoid"))
    assert charrnn_fast.RNN(2, 3, 1, "sigmoid").nonlinearity == "sigmoid"


def test_weight_lists():
    """all_weights, _flat_weights and flatten_parameters are nn.RNN's."""
    stock, ours = pair(3, 5, 2, bidirectional=True)
    ours.flatten_parameters()
    assert [len(w) for w in ours.all_weights] == [len(w) for w in stock.all_weights]
    assert ours._flat_weights_names == stock._flat_weights_names
    assert all(a is b for a, b in zip(ours._flat_weights, ours.parameters(), strict=True))


def test_state_dict_both_ways():
    """A state_dict of either module loads into the other, through a file too."""
    stock, ours = nn.RNN(3, 5, 2), charrnn_fast.RNN(3, 5, 2)
    stock.load_state_dict(ours.state_dict())
    buffer = io.BytesIO()
    torch.save(stock.state_dict(), buffer)
    buffer.seek(0)
    other = charrnn_fast.RNN(3, 5, 2)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    x = torch.randn(4, 2, 3)
    assert torch.equal(ours(x)[0], other(x)[0])
    torch.testing.assert_close(ours(x)[0], stock(x)[0])


@pytest.mark.parametrize("nonlinearity", ["tanh", "sigmoid"])
def test_copies(nonlinearity):
    """deepcopy and pickle give a module of the same results with weights of its own."""
    ours = charrnn_fast.RNN(3, 5, 2, nonlinearity)
    x = torch.randn(4, 2, 3)
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    for copied in (
        copy.deepcopy(ours),
        pickle.loads(pickle.dumps(ours)),
        torch.load(buffer, weights_only=False),
    ):
        assert type(copied) is charrnn_fast.RNN
        assert torch.equal(copied(x)[0], ours(x)[0])
        with torch.no_grad():
            copied.weight_hh_l0.zero_()
        assert not torch.equal(copied(x)[0], ours(x)[0])


def test_subclass():
    """A subclass may override forward and call ours by super()."""

    class Residual(charrnn_fast.RNN):
        def forward(self, input, hx=None):
            output, h_n = super().forward(input, hx)
            return output + input, h_n

    rnn = Residual(4, 4)
    x = torch.randn(3, 2, 4)
    plain = charrnn_fast.RNN(4, 4)
    plain.load_state_dict(rnn.state_dict())
    assert torch.equal(rnn(x)[0], plain(x)[0] + x)


def test_hooks_run():
    """Forward hooks, pre-hooks and full backward hooks see what nn.RNN's see."""
    seen = []
    for module in pair(3, 5):
        calls = []
        module.register_forward_pre_hook(lambda m, a, c=calls: c.append(len(a)))
        module.register_forward_hook(lambda m, a, o, c=calls: c.append(o[0].shape))
        module.register_full_backward_hook(lambda m, gi, go, c=calls: c.append(go[0].shape))
        module(torch.randn(4, 2, 3, requires_grad=True))[0].sum().backward()
        seen.append(calls)
    assert seen[0] == seen[1]
    assert len(seen[0]) == 3


# Inputs


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("with_hx", [False, True])
def test_unbatched(batch_first, with_hx):
    """A 2-D input is one sequence; shapes and values are nn.RNN's."""
    stock, ours = pair(3, 5, 2, batch_first=batch_first)
    hx = torch.randn(2, 5) if with_hx else None
    x = torch.randn(4, 3)
    assert_same(run(ours, x, hx), run(stock, x, hx))


@pytest.mark.parametrize("layers", [1, 2])
def test_empty_batch(layers):
    """B=0 gives empty results and zero gradients."""
    stock, ours = pair(3, 5, layers)
    x = torch.randn(4, 0, 3)
    assert_same(run(ours, x), run(stock, x))


def test_hx_expanded():
    """An hx expanded from one state works, and its gradient is the sum."""
    results = []
    for module in pair(3, 5, 2):
        state = torch.linspace(-1, 1, 5).requires_grad_()
        output, h_n = module(torch.ones(4, 6, 3), state.expand(2, 6, 5))
        (output.sum() + h_n.sum()).backward()
        results.append({"output": output, "d state": state.grad})
    assert_same(results[1], results[0])


def test_strides():
    """Non-contiguous input, hx and incoming gradients, and their mixtures, change nothing."""
    stock, ours = pair(3, 5)
    base = torch.randn(3, 2, 8)
    x = base.permute(2, 1, 0)[::2]
    hx = torch.randn(5, 2, 1).permute(2, 1, 0)
    assert not x.is_contiguous()
    assert not hx.is_contiguous()
    results = []
    for module in (stock, ours):
        a, b = leaf(x), leaf(hx)
        output, h_n = module(a.transpose(0, 1).transpose(0, 1), b)
        grad = torch.randn(5, 4, 2, generator=torch.Generator().manual_seed(1)).permute(1, 2, 0)
        output.backward(grad, retain_graph=True)
        h_n.backward(torch.ones(1).expand(1, 2, 5))
        results.append({"x": a.grad, "hx": b.grad, "W": module.weight_hh_l0.grad})
    assert_same(results[1], results[0])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_dropout_draws_the_same_masks(packed, bidirectional):
    """The same seed drops the same units as nn.RNN's, padded and packed; eval mode drops none."""
    stock, ours = pair(4, 6, 3, dropout=0.5, bidirectional=bidirectional)
    x = torch.randn(5, 3, 4)
    if packed:
        x = pack_padded_sequence(x, torch.tensor([5, 3, 2]))
    outputs = []
    for module in (stock, ours):
        torch.manual_seed(11)
        outputs.append(module(x)[0])
    if packed:
        outputs = [o.data for o in outputs]
    torch.testing.assert_close(outputs[1], outputs[0])
    assert not torch.allclose(outputs[1], ours(x)[0].data if packed else ours(x)[0]), (
        "dropout must be on"
    )
    stock.eval()
    ours.eval()
    a, b = stock(x)[0], ours(x)[0]
    torch.testing.assert_close(b.data if packed else b, a.data if packed else a)


def test_dropout_of_everything():
    """dropout=1 leaves the later layers without input."""
    stock, ours = pair(4, 6, 2, dropout=1.0)
    x = torch.randn(5, 3, 4)
    torch.testing.assert_close(ours(x)[0], stock(x)[0])


# Gradients


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


# Weights that are not plain parameters


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
    module.weight_hh_l0 = nn.Parameter(torch.eye(5) * 0.3)


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
def test_replaced_weights(how):
    """Weights that were replaced, by whatever means, are the ones that are used and trained."""
    results = []
    for module in pair(3, 5, 2):
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
def test_functional_call(strict):
    """functional_call runs with the tensors that it is given, and leaves the module alone."""
    stock, ours = pair(3, 5, 2)
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


# Modes, dtypes, threads


def test_inference_mode():
    """Works in inference_mode, and on weights that were made in it."""
    rnn = charrnn_fast.RNN(3, 5, 2)
    x = torch.randn(4, 2, 3)
    with torch.inference_mode():
        made_inside = charrnn_fast.RNN(3, 5, 2)
        made_inside.load_state_dict(rnn.state_dict())
        output, _ = rnn(x)
        assert output.is_inference()
        assert torch.equal(made_inside(x)[0], output)
    assert torch.equal(rnn(x)[0], output)


def test_deterministic_algorithms():
    """Nothing here is refused by use_deterministic_algorithms; results have the same bits."""
    rnn = charrnn_fast.RNN(3, 70, 2, bidirectional=True)
    x = torch.randn(40, 30, 3)
    want = run(rnn, x)
    torch.use_deterministic_algorithms(True)
    try:
        got = run(rnn, x)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    """bfloat16 and float16 give results of that dtype, at least as close to float64 as nn.RNN's."""
    stock, ours = pair(8, 16, 2, bidirectional=True, dtype=dtype)
    exact = copy.deepcopy(stock).double()
    x, hx = torch.randn(6, 3, 8, dtype=dtype), torch.randn(4, 3, 16, dtype=dtype)
    got = run(ours, x, hx)
    assert all(tensor.dtype == dtype for tensor in got.values())
    assert_as_accurate(got, run(stock, x, hx), run(exact, x.double(), hx.double()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    """Under CPU autocast the dtypes of results and gradients are nn.RNN's, the values close."""
    stock, ours = pair(8, 16, 2)
    x = torch.randn(6, 3, 8)
    results = []
    for module in (stock, ours):
        with torch.autocast("cpu", dtype=dtype):
            output, h_n = module(x)
        (output.sum() + h_n.sum()).backward()
        results.append(
            {"output": output, "h_n": h_n, **{n: p.grad for n, p in module.named_parameters()}}
        )
    assert_same(results[1], results[0], rtol=0.05, atol=0.05)
    assert results[1]["output"].dtype == dtype


def test_autocast_with_half_input():
    """An input that is already in the lower precision is accepted under autocast, as by nn.RNN."""
    stock, ours = pair(8, 16)
    x = torch.randn(6, 3, 8).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        a, b = stock(x)[0], ours(x)[0]
    assert a.dtype == b.dtype
    torch.testing.assert_close(a, b, rtol=0.05, atol=0.05)


def test_meta_device():
    """On the meta device shapes and dtypes come out as nn.RNN's."""
    stock = nn.RNN(3, 5, 2, bidirectional=True, device="meta")
    ours = charrnn_fast.RNN(3, 5, 2, bidirectional=True, device="meta")
    x = torch.empty(4, 2, 3, device="meta")
    for a, b in zip(ours(x), stock(x), strict=True):
        assert a.shape == b.shape
        assert a.device.type == "meta"
    ours(x)[0].sum().backward()
    assert ours.weight_hh_l0.grad.shape == (5, 5)
    ours.to_empty(device="cpu").reset_parameters()
    assert ours(torch.randn(4, 2, 3))[0].isfinite().all()


def test_to_moves_the_weights_in_use():
    """After .double() and .to(...) the new weights are the ones in use."""
    rnn = charrnn_fast.RNN(3, 5)
    rnn(torch.randn(4, 2, 3))
    rnn.double()
    assert rnn(torch.randn(4, 2, 3, dtype=torch.float64))[0].dtype == torch.float64


def test_python_threads():
    """Several Python threads may run one module at once, forward and backward."""
    rnn = charrnn_fast.RNN(3, 40, 2)
    inputs = [torch.randn(20, 4, 3) for _ in range(4)]
    want = [run(rnn, x) for x in inputs]
    got = [None] * 4

    def work(index):
        for _ in range(10):
            got[index] = run(rnn, inputs[index])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for a, b in zip(got, want, strict=True):
        assert_same(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(50, 64, 20, 128), (60, 3, 20, 320), (30, 7, 5, 96)], ids=str)
def test_same_bits_for_any_number_of_threads(isa, shape):
    """Results and gradients have the same bits for one thread and for several."""
    T, B, I, H = shape
    rnn = charrnn_fast.RNN(I, H, bidirectional=True)
    x = torch.randn(T, B, I)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run(rnn, x))
    assert_same(results[1], results[0], rtol=0, atol=0)
    assert_same(results[2], results[0], rtol=0, atol=0)


def test_same_bits_in_any_batch(isa):
    """A sequence's forward result does not depend on what else is in the batch."""
    rnn = charrnn_fast.RNN(9, 50, 2)
    x = torch.randn(11, 20, 9)
    with torch.no_grad():
        whole = rnn(x)[0]
        for b in (0, 7, 19):
            assert torch.equal(rnn(x[:, b : b + 1])[0], whole[:, b : b + 1])
        assert torch.equal(rnn(x[:, 3:9])[0], whole[:, 3:9])


class Sequences(torch.utils.data.Dataset):
    """Runs the module inside a worker."""

    def __init__(self, module):
        self.module = module

    def __len__(self):
        return 8

    def __getitem__(self, index):
        with torch.no_grad():
            return self.module(torch.full((40, 8, 16), index / 8.0))[0]


def test_dataloader_workers():
    """The module runs in forked DataLoader workers after it ran, with threads, in the parent."""
    rnn = charrnn_fast.RNN(16, 128)
    dataset = Sequences(rnn)
    want = torch.stack([dataset[i] for i in range(8)])
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=4, num_workers=2, multiprocessing_context="fork"
    )
    assert torch.equal(torch.cat(list(loader)), want)


# Token ids and lengths


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_tokens_equal_one_hot(isa, batch_first, bidirectional):
    """Ids give the outputs and gradients of their one-hot vectors."""
    stock, ours = pair(11, 6, 2, batch_first=batch_first, bidirectional=bidirectional)
    ids = torch.randint(11, (5, 3))
    one_hot = nn.functional.one_hot(ids, 11).float()
    want = run(stock, one_hot)
    del want["d input"]
    with assert_fused():
        got = run(ours, ids)
    assert_same(got, want)
    unbatched = ours(ids[:, 0])[0]
    torch.testing.assert_close(unbatched, ours(one_hot[:, 0])[0])


@pytest.mark.parametrize("bad", [11, -1, 2**40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_out_of_range(bad, dtype):
    """An id outside the vocabulary is an IndexError that names it."""
    rnn = charrnn_fast.RNN(11, 6, dtype=dtype)
    ids = torch.randint(11, (5, 3))
    ids[3, 1] = bad
    with pytest.raises(IndexError, match=f"token id {bad} .*input_size is 11.*step 3.*sequence 1"):
        rnn(ids)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_lengths_equal_packing(isa, bidirectional, batch_first):
    """lengths= gives the outputs (zero past the end), states and gradients of a packed batch."""
    stock, ours = pair(4, 6, 2, batch_first=batch_first, bidirectional=bidirectional)
    lengths = torch.tensor([2, 5, 1, 4])
    shape = (4, 5, 4) if batch_first else (5, 4, 4)
    data, hx = torch.randn(shape), torch.randn(4 if bidirectional else 2, 4, 6)

    def packed(module, x, h):
        sequence = pack_padded_sequence(x, lengths, batch_first, enforce_sorted=False)
        output, h_n = module(sequence, h)
        return pad_packed_sequence(output, batch_first)[0], h_n

    results = []
    for call in (
        lambda x, h: packed(stock, x, h),
        lambda x, h: ours(x, h, lengths),
    ):
        x, h = leaf(data), leaf(hx)
        output, h_n = call(x, h)
        (output.cos().sum() + h_n.sin().sum()).backward()
        results.append({"output": output, "h_n": h_n, "x": x.grad, "h": h.grad})
    assert_same(results[1], results[0])
    for a, b in zip(ours.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    padding = results[1]["output"]
    assert (padding if batch_first else padding.transpose(0, 1))[0, 2:].abs().sum() == 0


def test_padding_is_never_read():
    """What lies past a sequence's end, be it nan, touches neither results nor gradients."""
    rnn = charrnn_fast.RNN(4, 6, bidirectional=True)
    lengths = torch.tensor([2, 5, 1])
    clean = torch.randn(5, 3, 4)
    for b, n in enumerate(lengths):
        clean[n:, b] = 0
    dirty = clean.clone()
    for b, n in enumerate(lengths):
        dirty[n:, b] = float("nan")
    a, b = run(rnn, clean, lengths=lengths), run(rnn, dirty, lengths=lengths)
    assert_same(b, a, rtol=0, atol=0)


def test_lengths_may_be_a_list():
    """A list of ints serves as lengths."""
    rnn = charrnn_fast.RNN(4, 6)
    x = torch.randn(5, 2, 4)
    assert torch.equal(rnn(x, lengths=[5, 2])[0], rnn(x, lengths=torch.tensor([5, 2]))[0])


# The path that was taken


def test_fused_is_counted():
    """A plain float32 call runs fused, forward and backward, and the counters say so."""
    before = counters()
    charrnn_fast.RNN(3, 5, 2)(torch.randn(4, 2, 3))[0].sum().backward()
    after = counters()
    assert after["forward_fused"] - before["forward_fused"] == 2
    assert after["backward_fused"] - before["backward_fused"] == 2
    assert after["forward_composite"] == before["forward_composite"]
    assert after["backward_composite"] == before["backward_composite"]
