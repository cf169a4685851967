"""The kernels' tanh, sigmoid and relu: error in ulp over dense grids, special values, every ISA."""

import math

import pytest
import torch
from helpers import call_op

import charrnn_fast

# Stated in csrc/kernels/activations-inl.h.
BOUND_ULP = 2.5
# Of float32's tanh where it has a table, stated in csrc/kernels/avx512-inl.h.
TABLE_BOUND_ULP = 1.5

EXACT = {"RNN_TANH": torch.tanh, "RNN_SIGMOID": torch.sigmoid, "RNN_RELU": torch.relu}


@pytest.fixture(params=charrnn_fast.available_isas())
def isa(request):
    before = charrnn_fast.current_isa()
    charrnn_fast.use_isa(request.param)
    assert charrnn_fast.current_isa() == request.param
    yield request.param
    charrnn_fast.use_isa(before)


def activation(x, mode):
    """act(x) by the kernels: one step of one unit with W_ih = 1 and W_hh = 0."""
    one = torch.ones(1, 1, dtype=x.dtype)
    weights = [one, torch.zeros_like(one)]
    y = call_op("rnn_layer", input=x.view(1, -1, 1), weights=weights, mode=mode, has_biases=False)[
        0
    ]
    return y.view(-1)


def grid(dtype):
    """A million values: every binary exponent alike, then the range where the functions bend."""
    magnitudes = torch.logspace(
        -45 if dtype == torch.float32 else -300, 2.5, 300_000, dtype=torch.float64
    )
    linear = torch.linspace(-25, 25, 400_000, dtype=torch.float64)
    return torch.cat([magnitudes, -magnitudes, linear]).to(dtype)


def ulp(exact, dtype):
    """The distance between neighbours of dtype at the exact values, denormals included."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(exact.abs().clamp(min=info.tiny)).exponent - 1
    return torch.ldexp(torch.full_like(exact, info.eps), exponent)


def exact_values(x, mode):
    """The function in float64; a sigmoid below the smallest normal number / sqrt(2) is zero."""
    exact = EXACT[mode](x.double())
    if mode == "RNN_SIGMOID":
        exact[exact < torch.finfo(x.dtype).tiny / math.sqrt(2)] = 0
    return exact


@pytest.mark.parametrize("mode", ["RNN_TANH", "RNN_SIGMOID"])
def test_float32_error_in_ulp(isa, mode):
    """Within the stated bound of the float64 function, over all magnitudes."""
    x = grid(torch.float32)
    exact = exact_values(x, mode)
    y = activation(x, mode)
    error = (y.double() - exact).abs() / ulp(exact, torch.float32)
    by_table = mode == "RNN_TANH" and isa.startswith("avx512")
    bound = TABLE_BOUND_ULP if by_table else BOUND_ULP
    assert error.max() <= bound, (error.max(), x[error.argmax()])
    assert y.abs().max() == 1  # reached, never exceeded: 1 - y^2 has no sign


@pytest.mark.parametrize("mode", ["RNN_TANH", "RNN_SIGMOID"])
def test_float64_error_in_ulp(isa, mode):
    """Within the bound of PyTorch's own float64 function, which is itself within one ulp."""
    x = grid(torch.float64)
    reference = exact_values(x, mode)
    error = (activation(x, mode) - reference).abs() / ulp(reference, torch.float64)
    assert error.max() <= BOUND_ULP + 1, (error.max(), x[error.argmax()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", list(EXACT))
def test_special_values(isa, mode, dtype):
    """Infinities, NaN, zeros and denormals give what PyTorch's function gives."""
    tiny = torch.finfo(dtype).tiny
    x = torch.tensor([math.inf, -math.inf, math.nan, 0.0, -0.0, tiny / 4, -tiny / 4], dtype=dtype)
    torch.testing.assert_close(activation(x, mode), EXACT[mode](x), rtol=0, atol=0, equal_nan=True)


def test_relu_is_exact(isa):
    """relu rounds nothing."""
    x = grid(torch.float32)
    assert torch.equal(activation(x, "RNN_RELU"), torch.relu(x))
