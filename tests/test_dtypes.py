"""bfloat16 and float16 in the kernels: accuracy, dtypes, autocast, special values, same bits."""

import copy

import pytest
import torch
from helpers import assert_same, leaf, pair, run, worst
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import charrnn_fast
from charrnn_fast.ops import assert_fused, computed_in, counters

LOW = [torch.bfloat16, torch.float16]
MODES = ["RNN_TANH", "RNN_RELU", "RNN_SIGMOID"]
OPTIONS = [
    {},
    {"nonlinearity": "relu"},
    {"num_layers": 2, "bidirectional": True, "batch_first": True},
    {"bias": False, "bidirectional": True},
]
# Among them odd I and H, and a batch wider than a block of sequences.
SHAPES = [(20, 7, 33, 67), (6, 130, 9, 40)]


def rms(value, truth):
    return (value.double() - truth).square().mean().sqrt().item()


def assert_more_accurate(ours, stock, exact, factor=1):
    """In root mean square at most `factor` as far from float64 as nn.RNN, nor twice that anywhere.

    Or within half a unit in the last place of what the dtype resolves at the largest value, which
    is what rounding the exact result may cost.
    """
    assert ours.keys() == stock.keys() == exact.keys()
    for name, truth in exact.items():
        assert ours[name].dtype == stock[name].dtype, name
        assert ours[name].shape == truth.shape, name
        floor = torch.finfo(stock[name].dtype).eps / 2 * truth.abs().max().item()
        error, allowed = rms(ours[name], truth), factor * max(rms(stock[name], truth), floor)
        assert error <= allowed, f"{name}: rms error {error:.3g}, allowed {allowed:.3g}"
        error, allowed = (
            worst(ours[name], truth),
            2 * factor * max(worst(stock[name], truth), floor),
        )
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_more_accurate_than_stock(isa, options, shape, dtype):
    """Outputs, h_n and every gradient: fused, of nn.RNN's dtypes, nearer to float64 than its."""
    T, B, I, H = shape
    stock, ours = pair(I, H, dtype=dtype, **options)
    exact = copy.deepcopy(stock).double()
    x = torch.randn((B, T, I) if options.get("batch_first") else (T, B, I)).to(dtype)
    rows = options.get("num_layers", 1) * (2 if options.get("bidirectional") else 1)
    hx = torch.randn(rows, B, H).to(dtype)
    with assert_fused():
        got = run(ours, x, hx)
    # Which sums fall below 0 is up to rounding, and a slope of 1 or 0 hangs on it.
    factor = 2 if options.get("nonlinearity") == "relu" else 1
    assert_more_accurate(got, run(stock, x, hx), run(exact, x.double(), hx.double()), factor)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (9, 4, 3, 5), (2, 3, 4, 15)], ids=str)
def test_smallest(isa, shape, dtype):
    """Shapes below one vector, in two layers of two directions."""
    T, B, I, H = shape
    ours = charrnn_fast.RNN(I, H, 2, bidirectional=True, dtype=dtype)
    x, hx = torch.randn(T, B, I).to(dtype), torch.randn(4, B, H).to(dtype)
    with assert_fused():
        got = run(ours, x, hx)
    for name, truth in run(copy.deepcopy(ours).double(), x.double(), hx.double()).items():
        allowed = 8 * torch.finfo(dtype).eps * max(1.0, truth.abs().max().item())
        assert worst(got[name], truth) <= allowed, name


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("nonlinearity", ["tanh", "sigmoid"])
def test_stated_accuracy(isa, nonlinearity, dtype):
    """What the README says: at H=256 over 100 steps, relative to the largest value."""
    ours = charrnn_fast.RNN(64, 256, nonlinearity=nonlinearity, dtype=dtype)
    x = torch.randn(100, 16, 64).to(dtype)
    with assert_fused():
        got = run(ours, x)
    want = run(copy.deepcopy(ours).double(), x.double())
    eps = torch.finfo(dtype).eps
    for name, truth in want.items():
        error = worst(got[name], truth) / truth.abs().max().item()
        bound = 1 if name in ("output", "h_n") else 6
        assert error <= bound * eps, f"{name}: {error / eps:.2f} eps"


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("with_hx", [False, True])
def test_packed(isa, with_hx, dtype):
    """Packed sequences of several lengths run fused, as close to float64 as nn.RNN's."""
    stock, ours = pair(7, 20, 2, bidirectional=True, dtype=dtype)
    exact = copy.deepcopy(stock).double()
    lengths = torch.tensor([3, 9, 1, 9, 6])
    hx = torch.randn(4, 5, 20).to(dtype) if with_hx else None
    packed = pack_padded_sequence(torch.randn(9, 5, 7).to(dtype), lengths, enforce_sorted=False)

    def results(module, convert):
        data = leaf(convert(packed.data))
        state = None if hx is None else leaf(convert(hx))
        output, h_n = module(PackedSequence(data, *packed[1:]), state)
        (output.data.cos().sum() + h_n.sin().sum()).backward()
        found = {"output": output.data.detach(), "h_n": h_n.detach(), "d data": data.grad}
        if state is not None:
            found["d hx"] = state.grad
        return found | {f"d {name}": p.grad for name, p in module.named_parameters()}

    with assert_fused():
        got = results(ours, lambda t: t)
    assert_more_accurate(got, results(stock, lambda t: t), results(exact, torch.Tensor.double))


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_lengths(isa, dtype):
    """lengths= gives the bits of packing, forward; zeros past each end; gradients to rounding."""
    ours = charrnn_fast.RNN(7, 20, bidirectional=True, dtype=dtype)
    lengths = torch.tensor([3, 9, 1, 9, 6])
    data = torch.randn(9, 5, 7).to(dtype)
    with assert_fused():
        x = leaf(data)
        output, h_n = ours(x, None, lengths)
        (output.sum() + h_n.sum()).backward()
        y = leaf(data)
        packed, h_packed = ours(pack_padded_sequence(y, lengths, enforce_sorted=False))
        want, _ = pad_packed_sequence(packed)
        (want.sum() + h_packed.sum()).backward()
    assert torch.equal(output, want)
    assert torch.equal(h_n, h_packed)
    assert torch.equal(x.grad, y.grad)
    assert x.grad[3:, 0].abs().sum() == 0


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("bidirectional", [False, True])
def test_tokens(isa, bidirectional, dtype):
    """Token ids give what one-hot vectors give in float64, to the dtype's rounding."""
    ours = charrnn_fast.RNN(11, 37, 2, bidirectional=bidirectional, dtype=dtype)
    ids = torch.randint(11, (13, 6))
    with assert_fused():
        got = run(ours, ids)
    want = run(copy.deepcopy(ours).double(), nn.functional.one_hot(ids, 11).double())
    del want["d input"]
    eps = torch.finfo(dtype).eps
    for name, truth in want.items():
        assert got[name].dtype == dtype
        assert worst(got[name], truth) <= 4 * eps * truth.abs().max().item(), name


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_autocast(isa, options, dtype):
    """Under autocast: fused, the dtypes of nn.RNN, gradients in float32, and nearer to float64."""
    stock, ours = pair(24, 50, **options)
    exact = copy.deepcopy(stock).double()
    data = torch.randn(15, 8, 24)
    results = []
    for module in (ours, stock):
        x = leaf(data)
        before = counters()
        with torch.autocast("cpu", dtype=dtype):
            output, h_n = module(x)
        (output.float().cos().sum() + h_n.float().sin().sum()).backward()
        after = counters()
        results.append({"output": output, "h_n": h_n, "d input": x.grad})
        results[-1] |= {f"d {name}": p.grad for name, p in module.named_parameters()}
        if module is ours:
            assert after["forward_fused"] > before["forward_fused"]
            assert after["backward_fused"] > before["backward_fused"]
            assert after["backward_composite"] == before["backward_composite"]
    assert results[0]["output"].dtype == dtype
    assert ours.weight_hh_l0.grad.dtype == torch.float32
    x = leaf(data.double())
    output, h_n = exact(x)
    (output.cos().sum() + h_n.sin().sum()).backward()
    want = {"output": output, "h_n": h_n, "d input": x.grad}
    want |= {f"d {name}": p.grad for name, p in exact.named_parameters()}
    for name, truth in want.items():
        ours_low, stock_low = results[0][name], results[1][name]
        assert ours_low.dtype == stock_low.dtype, name
        floor = torch.finfo(dtype).eps / 2 * truth.abs().max().item()
        assert rms(ours_low, truth) <= 1.2 * max(rms(stock_low, truth), floor), name


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_autocast_of_the_cell(dtype):
    """RNNCell under autocast gives nn.RNNCell's dtype."""
    stock = nn.RNNCell(5, 6)
    ours = charrnn_fast.RNNCell(5, 6)
    ours.load_state_dict(stock.state_dict())
    with torch.autocast("cpu", dtype=dtype):
        got, want = ours(torch.ones(3, 5)), stock(torch.ones(3, 5))
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("shape", [(50, 64, 20, 128), (60, 3, 20, 321), (30, 7, 5, 96)], ids=str)
def test_same_bits_for_any_number_of_threads(isa, shape, dtype):
    """Results and gradients have the same bits for one thread and for several."""
    T, B, I, H = shape
    rnn = charrnn_fast.RNN(I, H, bidirectional=True, dtype=dtype)
    x = torch.randn(T, B, I).to(dtype)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        with assert_fused():
            results.append(run(rnn, x))
    assert_same(results[1], results[0], rtol=0, atol=0)
    assert_same(results[2], results[0], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_same_bits_in_any_batch(isa, dtype):
    """A sequence's forward result does not depend on what else is in the batch."""
    rnn = charrnn_fast.RNN(9, 51, 2, dtype=dtype)
    x = torch.randn(11, 20, 9).to(dtype)
    with torch.no_grad():
        whole = rnn(x)[0]
        for b in (0, 7, 19):
            assert torch.equal(rnn(x[:, b : b + 1])[0], whole[:, b : b + 1])
        assert torch.equal(rnn(x[:, 3:9])[0], whole[:, 3:9])


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
        y, h_n = torch.ops.charrnn_fast.rnn_layer(
            input.bfloat16(), None, [w.bfloat16() for w in weights], None, None, "RNN_RELU", True
        )
        want = (x.float() + torch.tensor(bias).bfloat16().float()).bfloat16()
        torch.testing.assert_close(y[0, :, 0], want, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(h_n[0, :, 0], want, rtol=0, atol=0, equal_nan=True)


def test_overflow_to_infinity_in_float16(isa):
    """Beyond 65504 results are inf in float16, as conversion has it; NaN stays."""
    weights = [torch.ones(1, 1), torch.zeros(1, 1), torch.zeros(1), torch.zeros(1)]
    input = torch.tensor([60000.0, 65504.0, torch.inf, torch.nan, 6e-8]).half().reshape(1, 5, 1)
    weights[2].fill_(40.0)
    y, _ = torch.ops.charrnn_fast.rnn_layer(
        input, None, [w.half() for w in weights], None, None, "RNN_RELU", True
    )
    want = (input.float() + 40).half()
    assert want[0, 1, 0].isinf()
    torch.testing.assert_close(y, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_nan_and_infinity_stay_in_their_sequence(isa, nonlinearity, dtype):
    """A NaN or infinity in one sequence shows there, and changes no bit of the others."""
    rnn = charrnn_fast.RNN(9, 35, nonlinearity=nonlinearity, dtype=dtype)
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
    if nonlinearity == "tanh":
        reached = rnn.weight_ih_l0[:, 8] != 0  # the others have 0 times infinity
        assert y[2, 5][reached].abs().eq(1).all()


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_denormals(isa, dtype):
    """Values below the normal range give results within that range of the exact ones."""
    tiny = torch.finfo(dtype).tiny
    stock, ours = pair(4, 6, bias=False, dtype=dtype)
    x = (torch.randn(3, 2, 4) * tiny).to(dtype)
    got, want = ours(x)[0], copy.deepcopy(stock).double()(x.double())[0]
    assert worst(got, want) <= 8 * tiny


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_opcheck(mode, dtype):
    """torch.library.opcheck passes for both ops in low precision."""

    def tensor(*shape):
        return torch.randn(*shape).to(dtype)

    weights = [tensor(5, 2), tensor(5, 5), tensor(5), tensor(5)]
    x, hx = tensor(4, 3, 2), tensor(1, 3, 5)
    args = (x, hx, weights, None, None, mode, True)
    layer = torch.ops.charrnn_fast.rnn_layer.default
    # Not the comparison of gradients with and without AOTAutograd: it has no tolerance to give.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(layer, args, test_utils=checks)
    leaves = (leaf(x), leaf(hx), [leaf(w) for w in weights], *args[3:])
    torch.library.opcheck(layer, leaves, test_utils=checks)
    y, h_n = layer(*args)
    backward = torch.ops.charrnn_fast.rnn_layer_backward.default
    torch.library.opcheck(
        backward,
        (tensor(*y.shape), tensor(*h_n.shape), x, hx, weights, y, *args[3:], [True] * 6),
        test_utils=checks,
    )


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_each_gradient_alone(isa, dtype):
    """Each gradient asked for alone has the bits that it has among all, and the dtype."""
    x, hx = torch.randn(7, 5, 6).to(dtype), torch.randn(1, 5, 19).to(dtype)
    rnn = charrnn_fast.RNN(6, 19, dtype=dtype)
    leaves = [leaf(x), leaf(hx), *rnn.parameters()]

    def loss():
        output, h_n = rnn(leaves[0], leaves[1])
        return output.cos().sum() + h_n.sin().sum()

    together = torch.autograd.grad(loss(), leaves)
    for leaf_, want in zip(leaves, together, strict=True):
        assert want.dtype == dtype
        assert torch.equal(torch.autograd.grad(loss(), leaf_)[0], want)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_double_backward_goes_composite(dtype):
    """Second derivatives run the composite formula, and are close to float64's."""
    rnn = charrnn_fast.RNN(3, 4, dtype=dtype)
    data = torch.randn(5, 2, 3).to(dtype)
    results = []
    for module, x in ((rnn, leaf(data)), (copy.deepcopy(rnn).double(), leaf(data.double()))):
        grad = torch.autograd.grad(module(x)[0].sum(), x, create_graph=True)[0]
        results.append(torch.autograd.grad(grad.square().sum(), module.weight_hh_l0)[0])
    assert results[0].dtype == dtype
    torch.testing.assert_close(results[0].double(), results[1], rtol=0.1, atol=0.1)


def test_explain_says_what_is_multiplied(isa):
    """explain() names the dtype of the products, for .bfloat16(), .half() and autocast."""
    rnn, x = charrnn_fast.RNN(3, 4), torch.zeros(2, 1, 3)
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
