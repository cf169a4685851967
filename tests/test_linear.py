"""The op linear: results and derivatives are those of F.linear."""

import pytest
import torch
from helpers import rounding, rounding_of_product

import charrnn_fast


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
