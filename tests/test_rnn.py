"""RNN against nn.RNN: outputs, states and gradients for every option and kind of input."""

import copy

import pytest
import torch
from helpers import assert_as_accurate, assert_same, leaf, pair, run
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import elman
from torch.nn.utils.rnn import pack_padded_sequence

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


def test_fused_is_counted():
    """A plain float32 call runs fused, forward and backward, and the counters say so."""
    before = counters()
    charrnn_fast.RNN(3, 5, 2)(torch.randn(4, 2, 3))[0].sum().backward()
    after = counters()
    assert after["forward_fused"] - before["forward_fused"] == 2
    assert after["backward_fused"] - before["backward_fused"] == 2
    assert after["forward_composite"] == before["forward_composite"]
    assert after["backward_composite"] == before["backward_composite"]
