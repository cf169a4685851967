"""What several test files need: pairs of modules, copies of inputs, comparisons."""

import copy

import pytest
import torch
from torch import nn

import charrnn_fast

# What Dynamo of the oldest torch that is supported cannot trace, and then says so.
beyond_torch_2_9 = pytest.mark.skipif(
    torch.__version__.startswith("2.9."), reason="Dynamo of torch 2.9 cannot trace it"
)


def pair(*args, **kwargs):
    """``(nn.RNN, charrnn_fast.RNN)`` of the same arguments and the same weights."""
    stock = nn.RNN(*args, **kwargs)
    ours = charrnn_fast.RNN(*args, **kwargs)
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def cells(*args, **kwargs):
    """``(nn.RNNCell, charrnn_fast.RNNCell)`` of the same arguments and the same weights."""
    stock = nn.RNNCell(*args, **kwargs)
    ours = charrnn_fast.RNNCell(*args, **kwargs)
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def leaf(tensor, dtype=None):
    """A copy that gradients end at."""
    copied = tensor.detach().clone().to(dtype or tensor.dtype)
    return copied.requires_grad_(copied.is_floating_point())


def run(module, input, hx=None, **kwargs):
    """Forward and backward; returns ``{name: tensor}`` of outputs and of every gradient."""
    module = copy.deepcopy(module)
    input = leaf(input)
    hx = None if hx is None else leaf(hx)
    output, h_n = module(input, hx, **kwargs)
    loss = (output * weight_like(output)).sum() + (h_n * weight_like(h_n)).sum()
    loss.backward()
    results = {"output": output.detach(), "h_n": h_n.detach()}
    if input.is_floating_point():
        results["d input"] = input.grad
    if hx is not None:
        results["d hx"] = hx.grad
    results.update({f"d {name}": p.grad for name, p in module.named_parameters()})
    return results


def weight_like(tensor):
    """Fixed weights of a loss that no symmetry can hide behind."""
    ramp = torch.arange(tensor.numel(), dtype=torch.float64).reshape(tensor.shape)
    return torch.cos(ramp * 0.7 + 0.3).to(tensor.dtype)


def assert_as_accurate(ours, stock, exact):
    """Our error against float64 is at most twice nn.RNN's own, or a few roundings."""
    assert ours.keys() == stock.keys() == exact.keys()
    for name, truth in exact.items():
        assert ours[name].shape == truth.shape, name
        eps = torch.finfo(ours[name].dtype).eps
        floor = 16 * eps * max(1.0, truth.abs().max().item() if truth.numel() else 0.0)
        error = worst(ours[name], truth)
        allowed = max(2 * worst(stock[name], truth), floor)
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def worst(value, truth):
    """Largest absolute difference."""
    return (value.double() - truth).abs().max().item() if truth.numel() else 0.0


def assert_same(ours, stock, **tolerances):
    """Every result of two runs is close."""
    assert ours.keys() == stock.keys()
    for name in stock:
        torch.testing.assert_close(
            ours[name], stock[name], **tolerances, msg=lambda text, name=name: f"{name}: {text}"
        )
