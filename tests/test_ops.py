"""The registered ops: schema, fake and autograd registration, and derivatives in double."""

import pytest
import torch
from helpers import rounding, rounding_of_product

import charrnn_fast

MODES = ["RNN_TANH", "RNN_RELU", "RNN_SIGMOID"]
T, B, I, H = 4, 3, 2, 5


def make(directions=1, biases=True, dtype=torch.float64, requires_grad=True):
    """Arguments of rnn_layer: input, hx and the weights of each direction."""
    torch.manual_seed(7)

    def tensor(*shape):
        # Sums well away from 0, where relu has a kink.
        return torch.randn(*shape, dtype=dtype).requires_grad_(requires_grad)

    weights = []
    for _ in range(directions):
        weights += [tensor(H, I), tensor(H, H)] + ([tensor(H), tensor(H)] if biases else [])
    return tensor(T, B, I), tensor(directions, B, H), weights


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("directions", [1, 2])
def test_opcheck_of_the_layer(mode, directions):
    """torch.library.opcheck passes for rnn_layer with and without gradients."""
    for requires_grad in (False, True):
        x, hx, weights = make(directions, requires_grad=requires_grad)
        args = (x, hx, weights, None, None, mode, True)
        torch.library.opcheck(torch.ops.charrnn_fast.rnn_layer.default, args)


@pytest.mark.parametrize("mode", MODES)
def test_opcheck_of_the_layer_backward(mode):
    """torch.library.opcheck passes for rnn_layer_backward."""
    x, hx, weights = make(requires_grad=False)
    y, h_n = torch.ops.charrnn_fast.rnn_layer(x, hx, weights, None, None, mode, True)
    dy, dh_n = torch.randn_like(y), torch.randn_like(h_n)
    args = (dy, dh_n, x, hx, weights, y, None, None, mode, True, [True] * 6)
    torch.library.opcheck(torch.ops.charrnn_fast.rnn_layer_backward.default, args)


def test_opcheck_of_the_stack():
    """torch.library.opcheck passes for rnn: two layers, two directions."""
    rnn = charrnn_fast.RNN(I, H, num_layers=2, bidirectional=True, dtype=torch.float64)
    params = [p.detach() for p in rnn.parameters()]
    x, hx = torch.randn(T, B, I).double(), torch.randn(4, B, H).double()
    args = (x, hx, params, None, None, "RNN_TANH", True, 2, 0.0, False, True)
    torch.library.opcheck(torch.ops.charrnn_fast.rnn.default, args)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("directions", [1, 2])
def test_gradcheck(mode, directions):
    """First derivatives of every argument agree with finite differences, by the fused kernels."""
    x, hx, weights = make(directions)

    def call(x, hx, *weights):
        return torch.ops.charrnn_fast.rnn_layer(x, hx, weights, None, None, mode, True)

    before = charrnn_fast._C.counters()
    assert torch.autograd.gradcheck(call, (x, hx, *weights))
    after = charrnn_fast._C.counters()
    assert after["backward_fused"] > before["backward_fused"]
    assert after["backward_composite"] == before["backward_composite"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("lengths", [None, [2, 4, 1]])
def test_gradgradcheck(mode, lengths):
    """Second derivatives agree with finite differences, padded batches included."""
    x, hx, weights = make()
    steps = None if lengths is None else torch.tensor(lengths)

    def call(x, hx, *weights):
        return torch.ops.charrnn_fast.rnn_layer(x, hx, weights, None, steps, mode, True)

    assert torch.autograd.gradgradcheck(call, (x, hx, *weights))


@pytest.mark.parametrize("mode", MODES)
def test_tokens_equal_one_hot(mode):
    """Token ids give the outputs and gradients of their one-hot rows, to rounding."""
    _, hx, weights = make()
    ids = torch.randint(0, I, (T, B))
    results = []
    for x in (ids, torch.nn.functional.one_hot(ids, I).double()):
        y, h_n = torch.ops.charrnn_fast.rnn_layer(x, hx, weights, None, None, mode, True)
        grads = torch.autograd.grad(y.sin().sum() + h_n.cos().sum(), [hx, *weights])
        results.append([y, h_n, *grads])
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("T, B, H", [(12, 32, 64), (60, 1, 256), (9, 7, 33)])
def test_same_bits_for_any_batch_and_threads(T, B, H):
    """Forward bits do not depend on the batch or the threads, gradient bits not on the threads."""
    torch.manual_seed(1)
    x, hx = torch.randn(T, B, 16), torch.randn(1, B, H)
    module = charrnn_fast.RNN(16, H)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            y, h_n = module(x, hx)
            results.append([y, h_n, *torch.autograd.grad(y.sum(), list(module.parameters()))])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
    alone, _ = module(x[:, B // 2 : B // 2 + 1].contiguous(), hx[:, B // 2 : B // 2 + 1])
    assert torch.equal(alone[:, 0], results[0][0][:, B // 2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_linear(isa, dtype):
    """The op is F.linear, by whatever computes it, and as near to float64 in float32."""
    linear, F = torch.ops.charrnn_fast.linear.default, torch.nn.functional
    x, W, b = (torch.randn(*shape, dtype=dtype) for shape in ((700, 150), (70, 150), (70,)))
    # dW and db are sums over 700 rows of products of random signs, in two orders.
    near = {"atol": rounding(700, dtype, 700**0.5), "rtol": rounding(700, dtype)}
    torch.library.opcheck(linear, (x, W, b), **near)
    torch.library.opcheck(linear, [tensor.clone().requires_grad_() for tensor in (x, W, b)], **near)
    torch.library.opcheck(
        torch.ops.charrnn_fast.linear_backward.default,
        (torch.ones(700, 70, dtype=dtype), x, W),
        **near,
    )
    exact = F.linear(x.double(), W.double(), b.double())
    error, theirs = ((y.double() - exact).abs().max() for y in (linear(x, W, b), F.linear(x, W, b)))
    assert error <= max(2 * theirs, rounding_of_product(x, W).max())
    # What other dtypes run is torch's, whose bits may depend on strides.
    allowed = 0.0 if dtype != torch.bfloat16 else rounding(150, dtype, 150**0.5)
    for y in (linear(x.t().contiguous().t(), W, b), linear(x, W.t().contiguous().t(), b)):
        torch.testing.assert_close(y, linear(x, W, b), rtol=0, atol=allowed)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(linear(x, W, b))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=allowed)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # PyTorch's own use
def test_derivatives_of_linear():
    """First and second ones, tangents, those of each sample; an operand changed before them."""
    linear, F = torch.ops.charrnn_fast.linear.default, torch.nn.functional
    x, W, b = (torch.randn(*shape, dtype=torch.double) for shape in ((2, 6, 4), (3, 4), (3,)))
    wanted = [tensor.requires_grad_() for tensor in (x, W, b)]
    before = charrnn_fast.ops.counters()["backward_fused"]
    assert torch.autograd.gradcheck(linear, wanted)
    assert charrnn_fast.ops.counters()["backward_fused"] > before
    assert torch.autograd.gradcheck(linear, wanted, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(linear, wanted)

    def loss(apply):
        return lambda W, x: apply(x, W, b.detach()).sin().sum()

    grads = [
        torch.func.vmap(torch.func.grad(loss(apply)), (None, 0))(W.detach(), x.detach())
        for apply in (linear, F.linear)
    ]
    torch.testing.assert_close(*grads)
    y = linear(x, W, b)
    with torch.no_grad():
        W.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    y = linear(x.detach(), W, b)
    with torch.no_grad():
        W.mul_(2)  # nothing reads it
    y.sum().backward()
    y = linear(x, W, b)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="a second time"):
        y.sum().backward()


@pytest.mark.parametrize("N, I, weight, bias", [(6, 5, 4, 3), (6, 4, 4, 2), (0, 4, 4, 3)])
def test_linear_of_other_shapes(N, I, weight, bias):
    """What the kernel does not serve, and what is wrong, is as in F.linear."""
    x, W, b = torch.ones(N, I), torch.ones(3, weight), torch.ones(bias)
    found = []
    for apply in (torch.ops.charrnn_fast.linear.default, torch.nn.functional.linear):
        try:
            found.append(apply(x, W, b).shape)
        except RuntimeError as error:
            found.append(str(error))
    assert found[0] == found[1]


def test_backward_takes_rows_of_any_distance():
    """One row of y may stand for all, and rows may lie apart: as their copies."""
    x, _, weights = make(biases=False, requires_grad=False)
    dy, needs = torch.ones(T, B, H).double(), [True, False, True, True]
    backward = torch.ops.charrnn_fast.rnn_layer_backward.default
    for y in (torch.rand(H).double().expand(T, B, H), torch.rand(T, B, 2 * H).double()[..., :H]):
        results = [
            backward(dy, None, x, None, weights, rows, None, None, MODES[0], False, needs)
            for rows in (y, y.contiguous())
        ]
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)
