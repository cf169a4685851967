"""What several test files need: runs of modules, bounds of rounding, comparisons."""

import copy
import math

import pytest
import torch
from kinds import each, flat
from torch import nn
from torch.nn.utils.rnn import PackedSequence

# What Dynamo of the oldest torch that is supported cannot trace, and then says so.
beyond_torch_2_9 = pytest.mark.skipif(
    torch.__version__.startswith("2.9."), reason="Dynamo of torch 2.9 cannot trace it"
)


def leaf(tensor, dtype=None):
    """A copy that gradients end at."""
    copied = tensor.detach().clone().to(dtype or tensor.dtype)
    return copied.requires_grad_(copied.is_floating_point() or copied.is_complex())


def leaves_of(state):
    """A copy of a state that gradients end at, and its tensors by name."""
    copied = each(leaf, state)
    return copied, dict(zip(("hx", "cx"), flat(copied), strict=False))


def loss_of(results):
    """A scalar that depends on every element of every result, each in another way."""
    return sum((tensor * weight_like(tensor)).sum() for tensor in flat(results))


def weight_like(tensor):
    """Fixed weights of a loss that no symmetry can hide behind."""
    ramp = torch.arange(tensor.numel(), dtype=torch.float64).reshape(tensor.shape)
    return torch.cos(ramp * 0.7 + 0.3).to(tensor.dtype)


def named(results):
    """What a module or cell returned, as ``{name: tensor}``."""
    tensors = [tensor.detach() for tensor in flat(results)]
    return dict(zip(("output", "h_n", "c_n", "cells"), tensors, strict=False))


def run(module, input, hx=None, **kwargs):
    """Forward and backward; returns ``{name: tensor}`` of results and of every gradient.

    The input may be a tensor or a PackedSequence, the state h or (h, c), the module a cell.
    """
    module = copy.deepcopy(module)
    if isinstance(input, PackedSequence):
        data = leaf(input.data)
        input = PackedSequence(data, *input[1:])
    else:
        data = input = leaf(input)
    hx, states = leaves_of(hx)
    results = module(input, hx, **kwargs)
    loss_of(results).backward()
    found = named(results)
    if data.is_floating_point():
        found["d input"] = data.grad
    found.update({f"d {name}": tensor.grad for name, tensor in states.items()})
    found.update({f"d {name}": p.grad for name, p in module.named_parameters()})
    return found


def exact_run(module, input, hx=None, **kwargs):
    """:func:`run` in float64, by a module of torch.nn's."""
    if isinstance(input, PackedSequence):
        input = input.to(torch.float64)
    elif input.is_floating_point():
        input = input.double()
    return run(
        copy.deepcopy(module).double(), input, each(lambda tensor: tensor.double(), hx), **kwargs
    )


def run_if_it_can(module, *args, **kwargs):
    """:func:`run`, or None where torch's LSTM has no kernel: of float16 with gradients."""
    try:
        return run(module, *args, **kwargs)
    except RuntimeError as error:
        if "primitive" not in str(error):
            raise
        return None


def rounding(terms, dtype, scale=1.0):
    """What a sum of so many terms may be off by, in any order.

    Each of the additions rounds by at most eps / 2 of a partial sum, which is about as large as
    ``scale``. The roundings are independent, so that they grow as the root of their number: by
    eps / sqrt(12) * sqrt(terms) in root mean square. This is seven times that.
    """
    return 2 * torch.finfo(dtype).eps * math.sqrt(max(1, terms)) * scale


def rounding_of_product(x, W):
    """:func:`rounding` of every element of ``x @ W'``, whose partial sums are of random signs."""
    scale = (x.double().square() @ W.double().square().T).sqrt()
    return rounding(x.shape[-1], x.dtype) * scale


def rounding_of(module, input):
    """The terms that reach a result or gradient of a recurrent module in series or in one sum.

    A state is a sum of I + H terms over those of the step before, and so on for all steps and
    layers; the gradient of a weight is a sum over all rows.
    """
    data = input.data if isinstance(input, PackedSequence) else input
    tokens = data.dtype == torch.int64
    rows = data.numel() if tokens else data.numel() // max(1, data.shape[-1])
    if isinstance(module, nn.RNNCellBase):
        return module.input_size + module.hidden_size + rows
    steps = len(input.batch_sizes) if isinstance(input, PackedSequence) else max(data.shape[:2])
    terms = module.input_size + module.hidden_size * (2 if module.bidirectional else 1)
    return steps * module.num_layers * terms + rows


def assert_as_accurate(ours, stock, exact, terms, factor=2):
    """Our error against float64 is at most twice that of torch's, or what rounding may cost."""
    assert ours.keys() == stock.keys() == exact.keys()
    for name, truth in exact.items():
        assert ours[name].shape == truth.shape, name
        scale = max(1.0, truth.abs().max().item() if truth.numel() else 0.0)
        floor = rounding(terms, ours[name].dtype, scale)
        error = worst(ours[name], truth)
        allowed = max(factor * worst(stock[name], truth), floor)
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


def assert_same_bits(ours, stock):
    """Every result of two runs has the same bits."""
    assert_same(ours, stock, rtol=0, atol=0)


# What a plain call passes for arguments of the ops that a test does not name.
PLAIN = {"cells": False, "keep": True}

# The states before the first step that the ops have arguments for.
STATES = [
    argument.name
    for argument in torch.ops.charrnn_fast.rnn_layer.default._schema.arguments
    if argument.name in ("hx", "cx")
]
NO_STATES = [False for _ in STATES]


def named_arguments(name, **given):
    """Every argument of an op of the extension; those not given are None or plain."""
    arguments = {}
    for argument in getattr(torch.ops.charrnn_fast, name).default._schema.arguments:
        arguments[argument.name] = given.pop(argument.name, PLAIN.get(argument.name))
    assert not given, f"{name} has no {sorted(given)}"
    return arguments


def op_arguments(name, **given):
    """The same in their order."""
    return tuple(named_arguments(name, **given).values())


def layer_results(mode, cells, results):
    """``(y, h_n, c_n, cells, saved)`` of what rnn_layer returns; None for what it lacks."""
    y, h_n, *others = results
    c_n = others.pop(0) if mode == "LSTM" else None
    every_c = others.pop(0) if cells else None
    saved = others.pop(0) if others else None
    assert not others
    return y, h_n, c_n, every_c, saved


def call_op(name, **given):
    """Calls an op by the names of its arguments; those not given are None or plain."""
    return getattr(torch.ops.charrnn_fast, name).default(*op_arguments(name, **given))
