"""The networks against torch.nn's: outputs, states and gradients for every option and input."""

import pytest
import torch
from helpers import (
    assert_as_accurate,
    assert_same,
    exact_run,
    leaf,
    loss_of,
    rounding_of,
    run,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import KINDS, VARIANTS, each, flat
from reference import stack
from torch.nn.utils.rnn import pack_padded_sequence

from charrnn_fast.ops import assert_fused, counters

CONFIGURATIONS = [
    *[(kind, variant) for kind, variant in VARIANTS],
    *[(kind, {"num_layers": 2}) for kind in KINDS],
    *[(kind, {"bidirectional": True}) for kind in KINDS],
    *[
        (kind, {"num_layers": 3, "bidirectional": True, "batch_first": True, "bias": False})
        for kind in KINDS
    ],
    *[(kind, {"bias": False, "bidirectional": True} | variant) for kind, variant in VARIANTS],
]
SHAPES = [(1, 1, 1, 1), (1, 4, 3, 5), (7, 1, 3, 5), (5, 3, 6, 17), (12, 9, 33, 64), (3, 33, 16, 70)]
MODES = [(kind, mode) for kind in KINDS for mode in kind.modes]


def of_mode(kind, mode, *args, **kwargs):
    """Our network of a mode of the ops'."""
    if mode.startswith("RNN_"):
        kwargs["nonlinearity"] = mode.removeprefix("RNN_").lower()
    return kind.ours(*args, **kwargs)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("kind", "options"), CONFIGURATIONS, ids=str)
def test_as_accurate_as_stock(isa, kind, options, shape):
    """Results and all gradients are as close to float64 as torch.nn's, on every ISA, fused."""
    T, B, I, H = shape
    stock, ours = kind.pair(I, H, **options)
    x = torch.randn((B, T, I) if options.get("batch_first") else (T, B, I))
    layers = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    hx = kind.state(layers, B, H)
    with assert_fused():
        got = run(ours, x, hx)
    terms = rounding_of(ours, x)
    assert_as_accurate(got, run(stock, x, hx), exact_run(stock, x, hx), terms)


def test_large_layer_as_accurate_as_stock(isa, kind):
    """Large weights are prefetched while others are multiplied, and large rows of deltas are packed
    for the weights' gradients, where AVX-512 reads others in place."""
    T, B, I, H = 6, 25, 130, 2060 if kind.gates == 1 else 517
    stock, ours = kind.pair(I, H)
    x, hx = torch.randn(T, B, I), kind.state(1, B, H)
    with assert_fused():
        got = run(ours, x, hx)
    assert_as_accurate(got, run(stock, x, hx), exact_run(stock, x, hx), rounding_of(ours, x))


@pytest.mark.parametrize(("kind", "mode"), MODES, ids=str)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_against_the_formula(isa, kind, mode, bidirectional):
    """In float64 the results and gradients are those of the formula, to rounding."""
    rnn = of_mode(kind, mode, 4, 6, num_layers=2, bidirectional=bidirectional, dtype=torch.float64)
    x = leaf(torch.randn(5, 3, 4, dtype=torch.float64))
    hx = each(leaf, kind.state(4 if bidirectional else 2, 3, 6, dtype=torch.float64))
    leaves = [x, *flat(hx), *rnn.parameters()]
    with assert_fused():
        got = rnn(x, hx)
        got_grads = torch.autograd.grad(loss_of(got), leaves)
    want = stack(x, hx, rnn._flat_weights, mode, True, 2, bidirectional)[:2]
    want_grads = torch.autograd.grad(loss_of(want), leaves)
    for a, b in zip([*flat(got), *got_grads], [*flat(want), *want_grads], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@settings(max_examples=40 * len(VARIANTS), deadline=None)
@given(
    T=st.integers(1, 9),
    B=st.integers(0, 9),
    I=st.integers(1, 40),
    H=st.integers(1, 80),
    layers=st.integers(1, 3),
    variant=st.sampled_from(VARIANTS),
    flags=st.tuples(*[st.booleans()] * 4),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_shape(T, B, I, H, layers, variant, flags, seed):
    """Any sizes, any options: the same results as torch.nn's in float64."""
    bias, batch_first, bidirectional, with_hx = flags
    kind, options = variant
    torch.manual_seed(seed)
    stock, ours = kind.pair(
        I,
        H,
        num_layers=layers,
        bias=bias,
        batch_first=batch_first,
        bidirectional=bidirectional,
        dtype=torch.float64,
        **options,
    )
    x = torch.randn((B, T, I) if batch_first else (T, B, I), dtype=torch.float64)
    hx = None
    if with_hx:
        hx = kind.state(layers * (2 if bidirectional else 1), B, H, dtype=torch.float64)
    assert_same(run(ours, x, hx), run(stock, x, hx), rtol=1e-9, atol=1e-9)


@settings(max_examples=30 * len(MODES), deadline=None)
@given(
    lengths=st.lists(st.integers(1, 8), min_size=1, max_size=7),
    kind_and_mode=st.sampled_from(MODES),
    bidirectional=st.booleans(),
    tokens=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_lengths(lengths, kind_and_mode, bidirectional, tokens, seed):
    """Any lengths, ids or vectors: the same outputs, states and gradients as the formula."""
    kind, mode = kind_and_mode
    torch.manual_seed(seed)
    T, B = max(lengths), len(lengths)
    rnn = of_mode(kind, mode, 5, 7, num_layers=2, bidirectional=bidirectional, dtype=torch.float64)
    x = torch.randint(5, (T, B)) if tokens else torch.randn(T, B, 5, dtype=torch.float64)
    hx = each(leaf, kind.state(4 if bidirectional else 2, B, 7, dtype=torch.float64))
    leaves = [*flat(hx), *rnn.parameters()]
    got = rnn(x, hx, torch.tensor(lengths))
    want = stack(x, hx, rnn._flat_weights, mode, True, 2, bidirectional, lengths)[:2]
    got_grads = torch.autograd.grad(loss_of(got), leaves)
    want_grads = torch.autograd.grad(loss_of(want), leaves)
    for a, b in zip([*flat(got), *got_grads], [*flat(want), *want_grads], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("with_hx", [False, True])
def test_unbatched(kind, batch_first, with_hx):
    """A 2-D input is one sequence; shapes and values are torch.nn's."""
    stock, ours = kind.pair(3, 5, 2, batch_first=batch_first)
    hx = kind.state(2, 5) if with_hx else None
    x = torch.randn(4, 3)
    assert_same(run(ours, x, hx), run(stock, x, hx))


@pytest.mark.parametrize("layers", [1, 2])
def test_empty_batch(kind, layers):
    """B=0 gives empty results and zero gradients."""
    stock, ours = kind.pair(3, 5, layers)
    x = torch.randn(4, 0, 3)
    assert_same(run(ours, x), run(stock, x))


def test_hx_expanded(kind):
    """A state expanded from one works, and its gradient is the sum."""
    results = []
    for module in kind.pair(3, 5, 2):
        state = torch.linspace(-1, 1, 5).requires_grad_()
        hx = each(lambda tensor: state.expand(2, 6, 5), kind.state(1))
        output = module(torch.ones(4, 6, 3), hx)
        loss_of(output).backward()
        results.append({"output": output[0], "d state": state.grad})
    assert_same(results[1], results[0])


@pytest.mark.parametrize("form", [tuple, list])
def test_states_as_tuple_and_list(kind, form):
    """Two states come as a tuple or a list; what torch.nn takes for one is what ours takes."""
    stock, ours = kind.pair(3, 5, 2)
    x, hx = torch.randn(4, 2, 3), kind.state(2, 2, 5)
    if kind.has_cell_state:
        assert_same(run(ours, x, form(hx)), run(stock, x, form(hx)))
        assert type(ours(x, form(hx))[1]) is tuple
    else:
        for module in (stock, ours):
            with pytest.raises(AttributeError, match=f"'{form.__name__}' object has no attribute"):
                module(x, form([hx]))


def test_strides(kind):
    """Non-contiguous inputs, states and incoming gradients, and their mixtures, change nothing."""
    stock, ours = kind.pair(3, 5)
    x = torch.randn(3, 2, 8).permute(2, 1, 0)[::2]
    hx = each(lambda tensor: tensor.permute(2, 1, 0), kind.state(5, 2, 1))
    assert not x.is_contiguous()
    assert not flat(hx)[0].is_contiguous()
    results = []
    for module in (stock, ours):
        a, b = leaf(x), each(leaf, hx)
        output, states = module(a.transpose(0, 1).transpose(0, 1), b)
        grad = torch.randn(5, 4, 2, generator=torch.Generator().manual_seed(1)).permute(1, 2, 0)
        output.backward(grad, retain_graph=True)
        for state in flat(states):
            state.backward(torch.ones(1).expand(1, 2, 5), retain_graph=True)
        results.append({"x": a.grad, "W": module.weight_hh_l0.grad})
        results[-1] |= {f"d {i}": tensor.grad for i, tensor in enumerate(flat(b))}
    assert_same(results[1], results[0])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_dropout_draws_the_same_masks(kind, packed, bidirectional):
    """The same seed drops the same units as torch.nn's, padded and packed; eval mode drops none."""
    stock, ours = kind.pair(4, 6, 3, dropout=0.5, bidirectional=bidirectional)
    x = torch.randn(5, 3, 4)
    if packed:
        x = pack_padded_sequence(x, torch.tensor([5, 3, 2]))
    results = []
    for module in (stock, ours):
        torch.manual_seed(11)
        results.append(flat(module(x)))
    torch.testing.assert_close(results[1], results[0])
    assert not torch.allclose(results[1][0], flat(ours(x))[0]), "dropout must be on"
    stock.eval()
    ours.eval()
    torch.testing.assert_close(flat(ours(x)), flat(stock(x)))


def test_dropout_of_everything(kind):
    """dropout=1 leaves the later layers without input."""
    stock, ours = kind.pair(4, 6, 2, dropout=1.0)
    x = torch.randn(5, 3, 4)
    torch.testing.assert_close(ours(x)[0], stock(x)[0])


def test_fused_is_counted(kind):
    """A plain float32 call runs fused, forward and backward, and the counters say so."""
    before = counters()
    kind.ours(3, 5, 2)(torch.randn(4, 2, 3))[0].sum().backward()
    after = counters()
    assert after["forward_fused"] - before["forward_fused"] == 2
    assert after["backward_fused"] - before["backward_fused"] == 2
    assert after["forward_composite"] == before["forward_composite"]
    assert after["backward_composite"] == before["backward_composite"]
