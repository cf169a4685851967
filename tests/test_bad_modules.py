"""Malformed calls of modules: what nn.RNN refuses, and weights and sizes that do not fit."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kinds import KINDS, Kind, each
from malformed import REFUSALS, B, H, I, T, longs
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

Call = Callable[[type[nn.RNNBase]], Any]


def module_calls(kind: Kind) -> dict[str, Call]:
    """Calls that torch.nn refuses, as functions of the class."""
    x = torch.randn(T, B, I)
    h = kind.state(1, B, H)
    two = pack_padded_sequence(x, longs(4, 3, 1))

    def of(change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        return each(change, h)

    def call(*args: Any, **kwargs: Any) -> Call:
        return lambda cls: cls(I, H, **kwargs)(*args)

    def build(*args: Any, **kwargs: Any) -> Call:
        def run(cls: type[nn.RNNBase]) -> Any:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return cls(*args, **kwargs)(x)

        return run

    return {
        "no input": call(),
        "input None": call(None),
        "input a list": call([1.0, 2.0]),
        "input a string": call("text"),
        "0-D": call(x[0, 0, 0]),
        "1-D": call(x[0, 0]),
        "4-D": call(x[None]),
        "5-D": call(x[None, None]),
        "input_size + 1": call(torch.randn(T, B, I + 1)),
        "input_size - 1": call(x[..., 1:]),
        "input_size 0": call(x[..., :0]),
        "T 0": call(x[:0]),
        "T 0, unbatched": call(x[:0, 0]),
        "T 0, batch_first": call(x[:, :0], batch_first=True),
        "double input": call(x.double()),
        "half input": call(x.half()),
        "bfloat16 input": call(x.bfloat16()),
        "complex input": call(x.to(torch.complex64)),
        "int32 input": call(x.int()),
        "int64 input of 3 dimensions": call(x.long()),
        "bool input": call(x.bool()),
        "meta input": call(x.to("meta")),
        "sparse input": call(x.to_sparse()),
        "double hx": call(x, of(lambda t: t.double())),
        "int hx": call(x, of(lambda t: t.long())),
        "meta hx": call(x, of(lambda t: t.to("meta"))),
        "hx 2-D": call(x, of(lambda t: t[0])),
        "hx 1-D": call(x, of(lambda t: t[0, 0])),
        "hx 4-D": call(x, of(lambda t: t[None])),
        "hx layers + 1": call(x, of(lambda t: t.repeat(2, 1, 1))),
        "hx layers 0": call(x, of(lambda t: t[:0])),
        "hx batch + 1": call(x, kind.state(1, B + 1, H)),
        "hx batch 1": call(x, of(lambda t: t[:, :1])),
        "hx hidden + 1": call(x, kind.state(1, B, H + 1)),
        "hx a tuple of one": call(x, (torch.randn(1, B, H),)),
        "hx a tuple of three": call(x, (torch.randn(1, B, H),) * 3),
        "hx a tuple of sizes": call(x, (torch.randn(1, B, H), torch.randn(1, B, H + 1))),
        "hx a string": call(x, "h"),
        "hx 3-D, unbatched": call(x[:, 0], h),
        "hx of one direction": call(x, h, bidirectional=True),
        "hx of one layer": call(x, h, num_layers=2),
        "hx batch, batch_first": call(x, h, batch_first=True),
        "packed, other width": call(PackedSequence(two.data[:, 1:], two.batch_sizes)),
        "packed, 3-D": call(PackedSequence(two.data[None], two.batch_sizes)),
        "packed, hx batch": call(two, of(lambda t: t[:, :2])),
        "packed, double": call(PackedSequence(two.data.double(), two.batch_sizes)),
        "nonlinearity": build(I, H, nonlinearity="softmax"),
        "nonlinearity None": build(I, H, nonlinearity=None),
        "hidden_size 0": build(I, 0),
        "hidden_size -1": build(I, -1),
        "hidden_size float": build(I, 2.5),
        "num_layers 0": build(I, H, num_layers=0),
        "num_layers -1": build(I, H, num_layers=-1),
        "dropout 2": build(I, H, dropout=2.0),
        "dropout -1": build(I, H, dropout=-1.0),
        "dropout bool": build(I, H, dropout=True),
        "dropout text": build(I, H, dropout="0.5"),
        "proj_size": build(I, H, proj_size=3),
        "unknown argument": build(I, H, units=3),
        "input_size text": build("5", H),
        "input_size missing": build(),
        "dtype int": build(I, H, dtype=torch.int64),
        "device": build(I, H, device="nowhere"),
    }


@pytest.mark.parametrize("case", module_calls(KINDS[0]))
def test_module_refuses_as_nn_rnn_does(kind: Kind, case: str) -> None:
    """The same type of exception for every call that torch.nn refuses.

    What torch.nn lets pass (nn.LSTM looks at no packed input, and has projections), ours refuses
    or computes; it does not crash.
    """
    call = module_calls(kind)[case]
    try:
        call(kind.stock)
    except Exception as expected:
        with pytest.raises(type(expected)):
            call(kind.ours)
        return
    if case == "proj_size" and kind.name == "LSTM":
        call(kind.ours)
        return
    with pytest.raises(REFUSALS):
        call(kind.ours)


def spoil(change: Callable[[nn.RNNBase], Any]) -> Call:
    def run(cls: type[nn.RNNBase]) -> Any:
        module = cls(I, H)
        change(module)
        return module(torch.randn(T, B, I))

    return run


def put(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., None]:
    """Replaces a parameter by what a function makes of it."""
    return lambda m: setattr(m, name, nn.Parameter(change(m.get_parameter(name).detach())))


SPOILT_MODULES: dict[str, Callable[[nn.RNNBase], Any]] = {
    "weight_ih of another width": put("weight_ih_l0", lambda w: torch.cat([w, w[:, :1]], 1)),
    "weight_ih of fewer rows": put("weight_ih_l0", lambda w: w[1:]),
    "weight_ih of more rows": put("weight_ih_l0", lambda w: torch.cat([w, w])),
    "weight_hh not square": put("weight_hh_l0", lambda w: torch.cat([w, w[:, :1]], 1)),
    "weight_hh of one gate less": put("weight_hh_l0", lambda w: w[:-H]),
    "weight_hh of one gate more": put("weight_hh_l0", lambda w: torch.cat([w, w[:H]])),
    "weight_hh of one row less": put("weight_hh_l0", lambda w: w[:-1]),
    "weight_hh 1-D": put("weight_hh_l0", lambda w: w[:, 0]),
    "weight_hh 3-D": put("weight_hh_l0", lambda w: w[None]),
    "weight_hh double": put("weight_hh_l0", lambda w: w.double()),
    "weight_hh on meta": put("weight_hh_l0", lambda w: w.to("meta")),
    "weight_hh sparse": put("weight_hh_l0", lambda w: w.to_sparse()),
    "bias too long": put("bias_ih_l0", lambda b: torch.cat([b, b[:1]])),
    "bias of one gate less": put("bias_hh_l0", lambda b: b[:-H]),
    "bias double": put("bias_hh_l0", lambda b: b.double()),
    "data resized": lambda m: setattr(m.weight_hh_l0, "data", m.weight_hh_l0.data[1:, 1:].clone()),
    "storage gone": lambda m: m.weight_hh_l0.data.untyped_storage().resize_(0),
    "input_size changed": lambda m: setattr(m, "input_size", I + 1),
    "num_layers changed": lambda m: setattr(m, "num_layers", 2),
    "bidirectional changed": lambda m: setattr(m, "bidirectional", True),
    "bias changed": lambda m: setattr(m, "bias", False),
}


@pytest.mark.parametrize("case", SPOILT_MODULES)
def test_spoilt_modules(kind: Kind, case: str) -> None:
    """Weights that were replaced by ones that do not fit are refused, not read past their end."""
    if case in ("weight_hh of one gate less", "bias of one gate less") and kind.gates == 1:
        pytest.skip("nothing would be left, which is another case")
    with pytest.raises(REFUSALS) as caught:
        spoil(SPOILT_MODULES[case])(kind.ours)
    assert str(caught.value).strip()


@pytest.mark.parametrize("lengths", [[4, 2], [4, 2, 0], [5, 2, 1], ["a", "b", "c"], 3, {"a": 1}])
def test_odd_lengths_of_modules(kind: Kind, lengths: Any) -> None:
    """The module refuses what the ops do, lists and all."""
    with pytest.raises(REFUSALS):
        kind.ours(I, H)(torch.randn(T, B, I), None, lengths)


@pytest.mark.parametrize(
    "third",
    [
        torch.zeros(T, B, dtype=torch.bool),  # resets
        torch.zeros(B, dtype=torch.bool),
        torch.randn(1, B, H),  # a state
        (torch.randn(1, B, H), torch.randn(1, B, H)),
        True,
        1.5,
        "yes",
    ],
    ids=lambda value: f"{type(value).__name__} {getattr(value, 'shape', '')}",
)
def test_third_argument_is_lengths(kind: Kind, third: Any) -> None:
    """torch.nn has no third argument: what it may be meant for is not taken for lengths."""
    with pytest.raises(REFUSALS, match="lengths"):
        kind.ours(I, H)(torch.randn(T, B, I), None, third)


@pytest.mark.parametrize("argument", ["lengths", "resets"])
@pytest.mark.parametrize("value", ["abc", object, [None], {}, [[1], [1, 2]]], ids=str)
def test_what_is_no_tensor_is_named(kind: Kind, argument: str, value: Any) -> None:
    """The message tells which argument it was, and of what type."""
    expected = f"{argument} must be a tensor.*, got {type(value).__name__}"
    with pytest.raises(REFUSALS, match=expected):
        kind.ours(I, H)(torch.randn(T, B, I), **{argument: value})


def test_huge_sizes_are_refused_or_too_much(kind: Kind) -> None:
    """Sizes beyond 2^63 bytes, and beyond the memory there is, raise; no size wraps around."""
    rnn = kind.ours(I, H)
    with pytest.raises(REFUSALS):
        rnn(torch.zeros(()).expand(2**40, 2**10, I))
    with pytest.raises(REFUSALS):
        rnn(torch.zeros((), dtype=torch.int64).expand(2**31, 2**20))


def test_backward_twice_and_changed_inputs(kind: Kind) -> None:
    """Autograd's own protections hold: freed buffers, and tensors changed in place since."""
    rnn = kind.ours(I, H)
    x = torch.randn(T, B, I, requires_grad=True)
    output, _ = rnn(x)
    output.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        output.sum().backward()
    output, _ = rnn(x)
    with torch.no_grad():
        rnn.weight_hh_l0.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()
