"""Modes and dtypes: inference, determinism, autocast, half precision, meta."""

import pytest
import torch
from helpers import (
    assert_as_accurate,
    assert_same,
    assert_same_bits,
    exact_run,
    leaf,
    loss_of,
    named,
    run,
)
from kinds import flat
from torch.nn.utils.rnn import pack_sequence


def test_inference_mode(kind):
    """Works in inference_mode, and on weights that were made in it."""
    rnn = kind.ours(3, 5, 2)
    x = torch.randn(4, 2, 3)
    with torch.inference_mode():
        made_inside = kind.ours(3, 5, 2)
        made_inside.load_state_dict(rnn.state_dict())
        results = flat(rnn(x))
        assert all(tensor.is_inference() for tensor in results)
        assert all(map(torch.equal, flat(made_inside(x)), results))
    assert all(map(torch.equal, flat(rnn(x)), results))


def test_deterministic_algorithms(kind):
    """Nothing here is refused by use_deterministic_algorithms; results have the same bits."""
    rnn = kind.ours(3, 70, 2, bidirectional=True)
    x = torch.randn(40, 30, 3)
    want = run(rnn, x)
    torch.use_deterministic_algorithms(True)
    try:
        got = run(rnn, x)
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_bits(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(kind, dtype):
    """bfloat16 and float16 give results of that dtype, about as close to float64 as torch.nn's."""
    stock, ours = kind.pair(8, 16, 2, bidirectional=True, dtype=dtype)
    x, hx = torch.randn(6, 3, 8, dtype=dtype), kind.state(4, 3, 16, dtype=dtype)
    got = run(ours, x, hx)
    assert all(tensor.dtype == dtype for tensor in got.values())
    exact = exact_run(stock, x, hx)
    # Sums are float32's: what is rounded to the dtype are results, once a layer and direction.
    assert_as_accurate(got, run(stock, x, hx), exact, terms=rounding_of_layers(ours))


def rounding_of_layers(module):
    return module.num_layers * (2 if module.bidirectional else 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(kind, dtype):
    """Under CPU autocast the dtypes of results and gradients are torch.nn's, the values close."""
    data = torch.randn(6, 3, 8)
    results = []
    for module in reversed(kind.pair(8, 16, 2)):
        x = leaf(data)
        try:
            with torch.autocast("cpu", dtype=dtype):
                found = module(x)
        except RuntimeError:  # oneDNN's LSTM of float16 has no gradients
            assert kind.has_cell_state
            found = module(x)
        loss_of(found).backward()
        grads = {n: p.grad for n, p in module.named_parameters()}
        results.append({**named(found), "d input": x.grad, **grads})
    assert_same(*results, rtol=0.05, atol=0.05, check_dtype=False)
    ours, theirs = results
    for name, tensor in ours.items():
        # nn.GRU's results are float32, to which a state of zeros promotes them.
        is_low = name in ("output", "h_n", "c_n") and kind.name != "GRU"
        assert tensor.dtype == (dtype if is_low else theirs[name].dtype), name


def test_autocast_with_half_input(kind):
    """An input already in the lower precision is accepted under autocast, as by torch.nn."""
    stock, ours = kind.pair(8, 16)
    x = torch.randn(6, 3, 8).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want, got = flat(stock(x)), flat(ours(x))
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("double", ["input", "weights"])
def test_autocast_leaves_double(kind, double):
    """Autocast converts no float64, and torch.nn then complains that dtypes differ."""
    for module in kind.pair(3, 5):
        x = torch.ones(4, 2, 3)
        if double == "input":
            x = x.double()
        else:
            module.double()
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="dtype"):
            module(x)


def test_meta_device(kind):
    """On the meta device shapes and dtypes come out as torch.nn's."""
    stock = kind.stock(3, 5, 2, bidirectional=True, device="meta")
    ours = kind.ours(3, 5, 2, bidirectional=True, device="meta")
    x = torch.empty(4, 2, 3, device="meta")
    for a, b in zip(flat(ours(x)), flat(stock(x)), strict=True):
        assert a.shape == b.shape
        assert a.device.type == "meta"
    ours(x)[0].sum().backward()
    assert ours.weight_hh_l0.grad.shape == (5 * kind.gates, 5)
    ours.to_empty(device="cpu").reset_parameters()
    assert ours(torch.randn(4, 2, 3))[0].isfinite().all()


def test_packed_on_the_meta_device(kind):
    """A packed sequence has its batch sizes on the CPU, wherever its data are."""
    packed = pack_sequence([torch.ones(4, 3), torch.ones(2, 3)]).to("meta")
    shapes = []
    for cls in (kind.stock, kind.ours):
        module = cls(3, 5, 2, device="meta")
        found = module(packed)
        found[0].data.sum().backward()
        grads = [p.grad for p in module.parameters()]
        shapes.append([(t.shape, t.device.type) for t in (*flat(found), *grads)])
    assert shapes[0] == shapes[1]


def test_to_moves_the_weights_in_use(kind):
    """After .double() and .to(...) the new weights are the ones in use."""
    rnn = kind.ours(3, 5)
    rnn(torch.randn(4, 2, 3))
    rnn.double()
    assert rnn(torch.randn(4, 2, 3, dtype=torch.float64))[0].dtype == torch.float64


@pytest.mark.parametrize("T", [2, 500], ids=["small", "large"])
def test_memory_of_results(kind, T):
    """Results can be resized and shared as other tensors can, and the profiler counts them."""
    rnn, x = kind.ours(3, 8), torch.randn(T, 2, 3)
    with torch.no_grad():
        expected = rnn(x)[0].clone()
        with torch.profiler.profile(profile_memory=True) as profile:
            results = flat(rnn(x))
        y = results[0]
        counted = sum(event.self_cpu_memory_usage for event in profile.events())
        assert counted >= sum(tensor.numel() for tensor in results) * y.element_size()
        y.resize_(2 * T, 2, 8)
        assert torch.equal(y[:T], expected)
        assert torch.equal(rnn(x)[0].share_memory_(), expected)
        lazy = torch._lazy_clone(rnn(x)[0])
        assert torch.equal(lazy.neg_(), -expected)
