"""Modes and dtypes: inference, determinism, autocast, half precision, meta."""

import copy

import pytest
import torch
from helpers import assert_as_accurate, assert_same, pair, run
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import charrnn_fast


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


@pytest.mark.parametrize("double", ["input", "weights"])
def test_autocast_leaves_double(double):
    """Autocast converts no float64, and nn.RNN then complains that dtypes differ."""
    for module in pair(3, 5):
        x = torch.ones(4, 2, 3)
        if double == "input":
            x = x.double()
        else:
            module.double()
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="dtype"):
            module(x)


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


def test_packed_on_the_meta_device():
    """A packed sequence has its batch sizes on the CPU, wherever its data are."""
    packed = pack_sequence([torch.ones(4, 3), torch.ones(2, 3)]).to("meta")
    shapes = []
    for cls in (nn.RNN, charrnn_fast.RNN):
        module = cls(3, 5, 2, device="meta")
        output, h_n = module(packed)
        output.data.sum().backward()
        grads = [p.grad for p in module.parameters()]
        shapes.append([(t.shape, t.device.type) for t in (output.data, h_n, *grads)])
    assert shapes[0] == shapes[1]


def test_to_moves_the_weights_in_use():
    """After .double() and .to(...) the new weights are the ones in use."""
    rnn = charrnn_fast.RNN(3, 5)
    rnn(torch.randn(4, 2, 3))
    rnn.double()
    assert rnn(torch.randn(4, 2, 3, dtype=torch.float64))[0].dtype == torch.float64


@pytest.mark.parametrize("T", [2, 500], ids=["small", "large"])
def test_memory_of_results(T):
    """Results can be resized and shared as other tensors can, and the profiler counts them."""
    rnn, x = charrnn_fast.RNN(3, 8), torch.randn(T, 2, 3)
    with torch.no_grad():
        expected = rnn(x)[0].clone()
        with torch.profiler.profile(profile_memory=True) as profile:
            y, h_n = rnn(x)
        counted = sum(event.self_cpu_memory_usage for event in profile.events())
        assert counted >= (y.numel() + h_n.numel()) * y.element_size()
        y.resize_(2 * T, 2, 8)
        assert torch.equal(y[:T], expected)
        assert torch.equal(rnn(x)[0].share_memory_(), expected)
        lazy = torch._lazy_clone(rnn(x)[0])
        assert torch.equal(lazy.neg_(), -expected)
