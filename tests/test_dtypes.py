"""bfloat16 and float16 in the kernels: accuracy, dtypes, autocast, special values, same bits."""

import contextlib
import copy
import itertools

import pytest
import torch
from helpers import (
    STATES,
    assert_same_bits,
    call_op,
    exact_run,
    leaf,
    loss_of,
    named,
    op_arguments,
    run,
    run_if_it_can,
    worst,
)
from kinds import KINDS, VARIANTS, each, flat
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import charrnn_fast
from charrnn_fast.ops import assert_fused, computed_in, counters

LOW = [torch.bfloat16, torch.float16]
OPTIONS = [
    *VARIANTS,
    *[(kind, {"num_layers": 2, "bidirectional": True, "batch_first": True}) for kind in KINDS],
    *[(kind, {"bias": False, "bidirectional": True}) for kind in KINDS],
]
MODES = [(kind, mode) for kind in KINDS for mode in kind.modes]
# Among them odd I and H, and a batch wider than a block of sequences.
SHAPES = [(20, 7, 33, 67), (6, 130, 9, 40)]


def rms(value, truth):
    return (value.double() - truth).square().mean().sqrt().item()


def assert_more_accurate(ours, stock, exact, factor=1):
    """In root mean square at most `factor` as far from float64 as torch.nn, anywhere twice that.

    Gradients at most half as far again, as those of few biases are as much luck as theirs. Or
    within half a unit in the last place of what the dtype resolves at the largest value, which is
    what rounding the exact result may cost. Where torch has no kernel, within twice that.
    """
    assert ours.keys() == exact.keys()
    if stock is None:
        stock, factor = {name: truth.to(ours[name].dtype) for name, truth in exact.items()}, 2
    for name, truth in exact.items():
        assert ours[name].dtype == stock[name].dtype, name
        assert ours[name].shape == truth.shape, name
        floor = torch.finfo(stock[name].dtype).eps / 2 * truth.abs().max().item()
        times = factor * (1.5 if name.startswith("d ") else 1)
        error, allowed = rms(ours[name], truth), times * max(rms(stock[name], truth), floor)
        assert error <= allowed, f"{name}: rms error {error:.3g}, allowed {allowed:.3g}"
        error = worst(ours[name], truth)
        allowed = 2 * times * max(worst(stock[name], truth), floor)
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("kind", "options"), OPTIONS, ids=str)
def test_more_accurate_than_stock(isa, kind, options, shape, dtype):
    """Results and every gradient: fused, of torch.nn's dtypes, nearer to float64 than its."""
    T, B, I, H = shape
    stock, ours = kind.pair(I, H, dtype=dtype, **options)
    x = torch.randn((B, T, I) if options.get("batch_first") else (T, B, I)).to(dtype)
    rows = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    hx = each(lambda tensor: tensor.to(dtype), kind.state(rows, B, H))
    with assert_fused():
        got = run(ours, x, hx)
    # Which sums fall below 0 is up to rounding, and a slope of 1 or 0 hangs on it.
    factor = 2 if options.get("nonlinearity") == "relu" else 1
    assert_more_accurate(got, run_if_it_can(stock, x, hx), exact_run(stock, x, hx), factor)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (9, 4, 3, 5), (2, 3, 4, 15)], ids=str)
def test_smallest(isa, kind, shape, dtype):
    """Shapes below one vector, in two layers of two directions."""
    T, B, I, H = shape
    ours = kind.ours(I, H, 2, bidirectional=True, dtype=dtype)
    x, hx = torch.randn(T, B, I).to(dtype), each(lambda t: t.to(dtype), kind.state(4, B, H))
    with assert_fused():
        got = run(ours, x, hx)
    for name, truth in exact_run(ours, x, hx).items():
        allowed = 8 * torch.finfo(dtype).eps * max(1.0, truth.abs().max().item())
        assert worst(got[name], truth) <= allowed, name


# Of results and of gradients, in eps of the dtype, relative to the largest value.
STATED = [
    (kind, mode, (1, 6) if kind.name == "RNN" else (2, 8))
    for kind in KINDS
    for mode in kind.modes
    if mode != "RNN_RELU"
]


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize(("kind", "mode", "bounds"), STATED, ids=str)
def test_stated_accuracy(isa, kind, mode, bounds, dtype):
    """What docs/numerics.md says: at H=256 over 100 steps, relative to the largest value."""
    options = {"nonlinearity": "sigmoid"} if mode == "RNN_SIGMOID" else {}
    ours = kind.ours(64, 256, dtype=dtype, **options)
    x = torch.randn(100, 16, 64).to(dtype)
    with assert_fused():
        got = run(ours, x)
    eps = torch.finfo(dtype).eps
    for name, truth in exact_run(ours, x).items():
        error = worst(got[name], truth) / truth.abs().max().item()
        bound = bounds[name.startswith("d ")]
        assert error <= bound * eps, f"{name}: {error / eps:.2f} eps"


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("with_hx", [False, True])
def test_packed(isa, kind, with_hx, dtype):
    """Packed sequences of several lengths run fused, as close to float64 as torch.nn's."""
    stock, ours = kind.pair(7, 20, 2, bidirectional=True, dtype=dtype)
    lengths = torch.tensor([3, 9, 1, 9, 6])
    hx = each(lambda t: t.to(dtype), kind.state(4, 5, 20)) if with_hx else None
    packed = pack_padded_sequence(torch.randn(9, 5, 7).to(dtype), lengths, enforce_sorted=False)
    with assert_fused():
        got = run(ours, packed, hx)
    theirs = run_if_it_can(stock, packed, hx)
    # Few values, whose root mean square is as much luck as theirs.
    assert_more_accurate(got, theirs, exact_run(stock, packed, hx), factor=2)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_lengths(isa, kind, dtype):
    """lengths= gives the bits of packing; zeros past each end."""
    ours = kind.ours(7, 20, bidirectional=True, dtype=dtype)
    lengths = torch.tensor([3, 9, 1, 9, 6])
    data = torch.randn(9, 5, 7).to(dtype)
    with assert_fused():
        x = leaf(data)
        found = ours(x, None, lengths)
        sum(tensor.sum() for tensor in flat(found)).backward()
        y = leaf(data)
        packed, states = ours(pack_padded_sequence(y, lengths, enforce_sorted=False))
        want = (pad_packed_sequence(packed)[0], states)
        sum(tensor.sum() for tensor in flat(want)).backward()
    assert all(map(torch.equal, flat(found), flat(want)))
    assert torch.equal(x.grad, y.grad)
    assert x.grad[3:, 0].abs().sum() == 0


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_tokens(isa, kind, bidirectional, dtype):
    """Token ids give what one-hot vectors give in float64, to the dtype's rounding."""
    ours = kind.ours(11, 37, 2, bidirectional=bidirectional, dtype=dtype)
    ids = torch.randint(11, (13, 6))
    with assert_fused():
        got = run(ours, ids)
    want = exact_run(ours, nn.functional.one_hot(ids, 11).float())
    del want["d input"]
    eps = torch.finfo(dtype).eps
    for name, truth in want.items():
        assert got[name].dtype == dtype
        assert worst(got[name], truth) <= 4 * eps * truth.abs().max().item(), name


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize(("kind", "options"), OPTIONS, ids=str)
def test_autocast(isa, kind, options, dtype):
    """Under autocast: fused, torch.nn's dtypes, gradients in float32, and nearer to float64."""
    stock, ours = kind.pair(24, 50, **options)
    exact = copy.deepcopy(stock).double()
    data = torch.randn(15, 8, 24)

    def results(module, x, **kwargs):
        with torch.autocast("cpu", dtype=dtype, **kwargs):
            found = module(x)
        loss_of(
            each(lambda t: t if t.dtype == torch.float64 else t.float(), flat(found))
        ).backward()
        grads = {f"d {name}": p.grad for name, p in module.named_parameters()}
        return named(found) | {"d input": x.grad} | grads

    before = counters()
    got = results(ours, leaf(data))
    after = counters()
    assert after["forward_fused"] > before["forward_fused"]
    assert after["backward_fused"] > before["backward_fused"]
    assert after["backward_composite"] == before["backward_composite"]
    assert ours.weight_hh_l0.grad.dtype == torch.float32
    want = results(exact, leaf(data.double()), enabled=False)
    try:
        theirs = results(stock, leaf(data))
    except RuntimeError:  # oneDNN's LSTM of float16 has no gradients
        assert kind.has_cell_state
        theirs = got
    for name, truth in want.items():
        assert got[name].dtype == theirs[name].dtype, name
        floor = torch.finfo(dtype).eps / 2 * truth.abs().max().item()
        error, allowed = rms(got[name], truth), max(rms(theirs[name], truth), floor)
        # Twice where theirs are sums of float32, or none.
        assert error <= (1.2 if kind.name == "RNN" else 2) * allowed, name


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_autocast_of_the_cell(kind, dtype):
    """A cell under autocast gives the dtypes of torch.nn's."""
    stock, ours = kind.cells(5, 6)
    with torch.autocast("cpu", dtype=dtype):
        got, want = flat(ours(torch.ones(3, 5))), flat(stock(torch.ones(3, 5)))
    torch.testing.assert_close(got, want, rtol=0.02, atol=0.02)


@contextlib.contextmanager
def without_onednn():
    """oneDNN's results are of the lower precision, on the CPUs where it serves a call."""
    # torch.backends.mkldnn.flags sets TF32 as well, and torch warns of it.
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("layout", ["padded", "packed", "packed float32", "unbatched"])
def test_autocast_of_states(kind, dtype, layout):
    """A state that is wider than autocast's dtype widens the results, as by torch.nn's formula."""
    stock, ours = kind.pair(5, 6, 2, bidirectional=True)
    x = torch.randn(4, 2, 5)
    x = x if layout == "packed float32" else x.to(dtype)
    if layout == "unbatched":
        x = x[:, 0]
    elif layout != "padded":
        x = pack_padded_sequence(x, torch.tensor([4, 2]))
    state = kind.state(*((4, 6) if layout == "unbatched" else (4, 2, 6)))
    dtypes = (torch.float32, dtype)
    states = [None]
    for combination in itertools.product(dtypes, repeat=len(kind.states)):
        parts = [h.to(d) for h, d in zip(flat(state), combination, strict=True)]
        states.append(tuple(parts) if kind.has_cell_state else parts[0])
    for hx in states:
        with torch.autocast("cpu", dtype=dtype):
            got = flat(ours(x, hx))
            with without_onednn():
                want = flat(stock(x, hx))
        torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_autocast_of_states_of_the_cell(kind, dtype):
    """A cell under autocast gives the dtypes of torch.nn's, or its error, for any states."""
    stock, ours = kind.cells(5, 6)
    x = torch.randn(3, 5)
    for combination in itertools.product((torch.float32, torch.float64, dtype), repeat=2):
        parts = [h.to(d) for h, d in zip(flat(kind.state(3, 6)), combination, strict=False)]
        hx = tuple(parts) if kind.has_cell_state else parts[0]
        with torch.autocast("cpu", dtype=dtype):
            try:
                want = flat(stock(x, hx))
            except RuntimeError:
                with pytest.raises(RuntimeError):
                    ours(x, hx)
            else:
                torch.testing.assert_close(flat(ours(x, hx)), want, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("shape", [(50, 64, 20, 128), (60, 3, 20, 321), (30, 7, 5, 96)], ids=str)
def test_same_bits_for_any_number_of_threads(isa, kind, shape, dtype):
    """Results and gradients have the same bits for one thread and for several."""
    T, B, I, H = shape
    rnn = kind.ours(I, H, bidirectional=True, dtype=dtype)
    x = torch.randn(T, B, I).to(dtype)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        with assert_fused():
            results.append(run(rnn, x))
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_same_bits_in_any_batch(isa, kind, dtype):
    """A sequence's forward result does not depend on what else is in the batch."""
    rnn = kind.ours(9, 51, 2, dtype=dtype)
    x = torch.randn(11, 20, 9).to(dtype)
    with torch.no_grad():
        whole = flat(rnn(x))
        for part in (slice(0, 1), slice(7, 8), slice(19, 20), slice(3, 9)):
            for got, want in zip(flat(rnn(x[:, part])), whole, strict=True):
                assert torch.equal(got, want[:, part])


@pytest.mark.parametrize("I", [1, 2])
def test_rounding_to_bfloat16(isa, I):
    """Results round to the nearest bfloat16, ties to even; NaN stays, infinities come of overflow.

    With relu, W_ih = 1 and a bias the output is the sum of two bfloat16s, which float32 holds.
    """
    x = torch.randn(4096).mul(10).exp2().bfloat16()
    for bias in (1.0, 0.00390625, 3.0e38, torch.inf, torch.nan):
        weights = [torch.ones(1, I), torch.zeros(1, 1), torch.full((1,), bias), torch.zeros(1)]
        input = torch.zeros(1, 4096, I)
        input[0, :, I - 1] = x.float()
        y, h_n = call_op(
            "rnn_layer",
            input=input.bfloat16(),
            weights=[w.bfloat16() for w in weights],
            mode="RNN_RELU",
            has_biases=True,
        )[:2]
        want = (x.float() + torch.tensor(bias).bfloat16().float()).bfloat16()
        torch.testing.assert_close(y[0, :, 0], want, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(h_n[0, :, 0], want, rtol=0, atol=0, equal_nan=True)


def test_overflow_to_infinity_in_float16(isa):
    """Beyond 65504 results are inf in float16, as conversion has it; NaN stays."""
    weights = [torch.ones(1, 1), torch.zeros(1, 1), torch.zeros(1), torch.zeros(1)]
    input = torch.tensor([60000.0, 65504.0, torch.inf, torch.nan, 6e-8]).half().reshape(1, 5, 1)
    weights[2].fill_(40.0)
    y = call_op(
        "rnn_layer",
        input=input,
        weights=[w.half() for w in weights],
        mode="RNN_RELU",
        has_biases=True,
    )[0]
    want = (input.float() + 40).half()
    assert want[0, 1, 0].isinf()
    torch.testing.assert_close(y, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize(("kind", "variant"), VARIANTS, ids=str)
def test_nan_and_infinity_stay_in_their_sequence(isa, kind, variant, dtype):
    """A NaN or infinity in one sequence shows there, and changes no bit of the others."""
    rnn = kind.ours(9, 35, dtype=dtype, **variant)
    x = torch.randn(6, 8, 9).to(dtype)
    with torch.no_grad():
        clean = rnn(x)[0]
        x[2, 3, 8] = torch.nan
        x[2, 5, 8] = torch.inf
        y = rnn(x)[0]
    assert y[2:, 3].isnan().all()
    assert torch.equal(y[:2], clean[:2])
    others = [0, 1, 2, 4, 6, 7]
    assert torch.equal(y[:, others], clean[:, others])
    if kind.name == "RNN" and not variant:
        reached = rnn.weight_ih_l0[:, 8] != 0  # the others have 0 times infinity
        assert y[2, 5][reached].abs().eq(1).all()


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_denormals(isa, kind, dtype):
    """Values below the normal range give results within that range of the exact ones."""
    tiny = torch.finfo(dtype).tiny
    stock, ours = kind.pair(4, 6, bias=False, dtype=dtype)
    x = (torch.randn(3, 2, 4) * tiny).to(dtype)
    got, want = ours(x)[0], copy.deepcopy(stock).double()(x.double())[0]
    assert worst(got, want) <= 8 * tiny


@pytest.mark.parametrize(("kind", "mode"), MODES, ids=str)
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_opcheck(kind, mode, dtype):
    """torch.library.opcheck passes for both ops in low precision."""

    def tensor(*shape):
        return torch.randn(*shape).to(dtype)

    G = kind.gates
    weights = [tensor(5 * G, 2), tensor(5 * G, 5), tensor(5 * G), tensor(5 * G)]
    x, states = tensor(4, 3, 2), dict.fromkeys(("hx", "cx")[: len(kind.states)])
    states = {name: tensor(1, 3, 5) for name in states}
    # Not the comparison of gradients with and without AOTAutograd: older torch has no tolerance.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    layer = torch.ops.charrnn_fast.rnn_layer.default
    plain = {"mode": mode, "has_biases": True}
    for prepare in (torch.Tensor.detach, leaf):
        args = op_arguments(
            "rnn_layer",
            input=prepare(x),
            weights=[prepare(w) for w in weights],
            **{name: prepare(state) for name, state in states.items()},
            **plain,
        )
        torch.library.opcheck(layer, args, test_utils=checks)
    y = layer(*args)[0].detach()
    args = op_arguments(
        "rnn_layer_backward",
        dy=tensor(*y.shape),
        input=x,
        weights=weights,
        y=y,
        needs=[True, *(name in states for name in STATES), True, True, True, True],
        **states,
        **plain,
    )
    torch.library.opcheck(
        torch.ops.charrnn_fast.rnn_layer_backward.default, args, test_utils=checks
    )


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_each_gradient_alone(isa, kind, dtype):
    """Each gradient asked for alone has the bits that it has among all, and the dtype."""
    x = leaf(torch.randn(7, 5, 6).to(dtype))
    hx = each(lambda tensor: leaf(tensor.to(dtype)), kind.state(1, 5, 19))
    rnn = kind.ours(6, 19, dtype=dtype)
    leaves = [x, *flat(hx), *rnn.parameters()]
    together = torch.autograd.grad(loss_of(rnn(x, hx)), leaves)
    for leaf_, want in zip(leaves, together, strict=True):
        assert want.dtype == dtype
        assert torch.equal(torch.autograd.grad(loss_of(rnn(x, hx)), leaf_)[0], want)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_double_backward_goes_composite(kind, dtype):
    """Second derivatives run the composite formula, and are close to float64's."""
    rnn = kind.ours(3, 4, dtype=dtype)
    data = torch.randn(5, 2, 3).to(dtype)
    results = []
    for module, x in ((rnn, leaf(data)), (copy.deepcopy(rnn).double(), leaf(data.double()))):
        grad = torch.autograd.grad(module(x)[0].sum(), x, create_graph=True)[0]
        results.append(torch.autograd.grad(grad.square().sum(), module.weight_hh_l0)[0])
    assert results[0].dtype == dtype
    torch.testing.assert_close(results[0].double(), results[1], rtol=0.1, atol=0.1)


def test_explain_says_what_is_multiplied(isa, kind):
    """explain() names the dtype of the products, for .bfloat16(), .half() and autocast."""
    rnn, x = kind.ours(3, 4), torch.zeros(2, 1, 3)
    assert "products" not in str(charrnn_fast.explain(rnn, x))
    for dtype in LOW:
        name = str(computed_in(dtype)).removeprefix("torch.")
        with torch.autocast("cpu", dtype=dtype):
            cast = charrnn_fast.explain(rnn, x)
        plain = charrnn_fast.explain(copy.deepcopy(rnn).to(dtype), x.to(dtype))
        for explanation in (cast, plain):
            assert explanation.fused
            assert f"products: of {name}, summed in float32" in str(explanation)
    assert computed_in(torch.float16) == torch.float32
    assert computed_in(torch.float64) == torch.float64
