"""Malformed calls: each raises a Python exception with a message, and of nn.RNN's type where nn.RNN
refuses the same call. None aborts, hangs or touches memory that is not the call's."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import charrnn_fast

T, B, I, H = 4, 3, 5, 6
OPS = torch.ops.charrnn_fast
REFUSALS = (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError)


def layer_arguments(biases: bool = True) -> dict[str, Any]:
    """A sound call of rnn_layer, to be spoilt in one place."""
    weights = [torch.randn(H, I), torch.randn(H, H)]
    weights += [torch.randn(H), torch.randn(H)] if biases else []
    return {
        "input": torch.randn(T, B, I),
        "hx": torch.randn(1, B, H),
        "weights": weights,
        "batch_sizes": None,
        "lengths": None,
        "mode": "RNN_TANH",
        "has_biases": biases,
    }


def backward_arguments() -> dict[str, Any]:
    """A sound call of rnn_layer_backward."""
    forward = layer_arguments()
    return {
        "dy": torch.randn(T, B, H),
        "dh_n": torch.randn(1, B, H),
        "input": forward["input"],
        "hx": forward["hx"],
        "weights": forward["weights"],
        "y": torch.randn(T, B, H),
        "batch_sizes": None,
        "lengths": None,
        "mode": "RNN_TANH",
        "has_biases": True,
        "needs": [True] * 6,
    }


def stack_arguments() -> dict[str, Any]:
    """A sound call of rnn with two layers of two directions."""
    return {
        "input": torch.randn(T, B, I),
        "hx": torch.randn(4, B, H),
        "params": [
            torch.randn(*size)
            for width in (I, 2 * H)
            for _ in range(2)
            for size in ((H, width), (H, H), (H,), (H,))
        ],
        "batch_sizes": None,
        "lengths": None,
        "mode": "RNN_TANH",
        "has_biases": True,
        "num_layers": 2,
        "dropout": 0.0,
        "train": False,
        "bidirectional": True,
    }


V = 7


def generate_arguments() -> dict[str, Any]:
    """A sound call of generate: three characters for two streams, two layers."""
    sizes = [(H, V), (H, H), (H,), (H,), (H, H), (H, H), (H,), (H,)]
    return {
        "tokens": torch.tensor([1, 2]),
        "state": torch.randn(2, 2, H),
        "params": [torch.randn(*size) for size in sizes],
        "head_weight": torch.randn(V, H),
        "head_bias": torch.randn(V),
        "uniforms": torch.rand(3, 2),
        "mode": "RNN_TANH",
        "has_biases": True,
    }


ARGUMENTS: dict[str, Callable[[], dict[str, Any]]] = {
    "rnn": stack_arguments,
    "rnn_layer": layer_arguments,
    "rnn_layer_backward": backward_arguments,
}


def quantized(tensor: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8)


def sparse_csr(tensor: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tensor.to_sparse_csr()


# What can be wrong with one tensor, whatever its part in the call.
SPOILS: dict[str, Callable[[Tensor], Tensor]] = {
    "scalar": lambda t: t.new_zeros(()),
    "a dimension more": lambda t: t.unsqueeze(0),
    "a dimension less": lambda t: t[0],
    "first size + 1": lambda t: torch.cat([t, t[:1]]),
    "last size - 1": lambda t: t[..., :-1],
    "first size 0": lambda t: t[:0],
    "last size 0": lambda t: t[..., :0],
    "transposed": lambda t: t.transpose(0, -1) if t.dim() > 1 else t.unsqueeze(1),
    "flattened": lambda t: t.flatten() if t.dim() > 1 else t.unsqueeze(0),
    "huge by stride 0": lambda t: t.new_zeros(()).expand(*[2**15] * t.dim()),
    "double": lambda t: t.double(),
    "half": lambda t: t.half(),
    "bfloat16": lambda t: t.bfloat16(),
    "complex": lambda t: t.to(torch.complex64),
    "int32": lambda t: t.int(),
    "uint8": lambda t: t.to(torch.uint8),
    "bool": lambda t: t.bool(),
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "quantized": quantized,
}


# These only look spoilt: another number of steps, and square matrices.
SOUND = {
    ("input", "first size + 1"),
    ("weights[1]", "transposed"),
    ("params[13]", "transposed"),
}


def spoilt_tensors() -> list[Any]:
    """Each spoil in each tensor argument of each op."""
    cases = []
    for op, make in ARGUMENTS.items():
        for name, value in make().items():
            if isinstance(value, Tensor):
                places: list[int | None] = [None]
            elif isinstance(value, list) and isinstance(value[0], Tensor):
                places = [0, 1, 2, 3] if op != "rnn" else [0, 4, 8, 13]
            else:
                continue
            for place in places:
                for spoil in SPOILS:
                    label = name if place is None else f"{name}[{place}]"
                    if (label, spoil) in SOUND:
                        continue
                    cases.append(pytest.param(op, name, place, spoil, id=f"{op}-{label}-{spoil}"))
    return cases


@pytest.mark.parametrize(("op", "name", "place", "spoil"), spoilt_tensors())
def test_spoilt_tensor(op: str, name: str, place: int | None, spoil: str) -> None:
    """A tensor that does not fit the others is refused by every op."""
    arguments = ARGUMENTS[op]()
    if place is None:
        arguments[name] = SPOILS[spoil](arguments[name])
    else:
        arguments[name] = list(arguments[name])
        arguments[name][place] = SPOILS[spoil](arguments[name][place])
    with pytest.raises(REFUSALS) as caught:
        getattr(OPS, op)(**arguments)
    assert str(caught.value).strip()


def longs(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


ODD_LISTS: dict[str, Any] = {
    "rising": longs(2, 3, 4, 3),
    "zero": longs(4, 4, 4, 0),
    "negative": longs(8, 4, 4, -4),
    "too few": longs(3, 3, 3),
    "too many": longs(3, 3, 3, 3, 3),
    "wrong sum": longs(3, 3, 3, 2),
    "overflowing": longs(2**62, 2**62, 2**62, 2**62 + 12),
    "falling and overflowing to the right sum": longs(2**62 + 12, 2**62, 2**62, 2**62),
    "smallest": longs(-(2**63), 3, 3, 3),
    "empty": longs(),
    "scalar": torch.tensor(12),
    "2-D": torch.ones(4, 3, dtype=torch.int64),
    "int32": torch.tensor([3, 3, 3, 3], dtype=torch.int32),
    "float": torch.tensor([3.0, 3.0, 3.0, 3.0]),
    "bool": torch.ones(4, dtype=torch.bool),
    "meta": torch.ones(4, dtype=torch.int64, device="meta"),
    "sparse": longs(3, 3, 3, 3).to_sparse(),
}
ODD_LENGTHS: dict[str, Any] = {
    "zero": longs(4, 0, 2),
    "negative": longs(4, -1, 2),
    "past the end": longs(4, 5, 2),
    "largest": longs(4, 2**63 - 1, 2),
    "smallest": longs(4, -(2**63), 2),
    "too few": longs(4, 2),
    "too many": longs(4, 2, 2, 2),
    "empty": longs(),
    "scalar": torch.tensor(4),
    "2-D": torch.ones(3, 1, dtype=torch.int64),
    "int32": torch.tensor([4, 2, 2], dtype=torch.int32),
    "float": torch.tensor([4.0, 2.0, 2.0]),
    "meta": torch.ones(3, dtype=torch.int64, device="meta"),
    "sparse": longs(4, 2, 2).to_sparse(),
}


def packed(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same call with packed rows: 12 of them in 4 steps of 3."""
    for name in ("input", "dy", "y"):
        if name in arguments:
            arguments[name] = arguments[name].flatten(0, 1)
    return arguments


@pytest.mark.parametrize("op", ARGUMENTS)
@pytest.mark.parametrize("kind", ODD_LISTS)
def test_odd_batch_sizes(op: str, kind: str) -> None:
    """Sizes that do not fall, are not positive, or do not add up are refused."""
    arguments = packed(ARGUMENTS[op]()) | {"batch_sizes": ODD_LISTS[kind]}
    with pytest.raises(REFUSALS) as caught:
        getattr(OPS, op)(**arguments)
    assert str(caught.value).strip()


@pytest.mark.parametrize("op", ARGUMENTS)
@pytest.mark.parametrize("kind", ODD_LENGTHS)
def test_odd_lengths(op: str, kind: str) -> None:
    """Lengths outside 1..T, or not one for each sequence, are refused."""
    with pytest.raises(REFUSALS) as caught:
        getattr(OPS, op)(**(ARGUMENTS[op]() | {"lengths": ODD_LENGTHS[kind]}))
    assert str(caught.value).strip()


@pytest.mark.parametrize("op", ARGUMENTS)
@pytest.mark.parametrize("value", [I, -1, 2**31, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_ids_out_of_range(op: str, value: int, dtype: torch.dtype) -> None:
    """A token id outside [0, I) is an IndexError, in kernels and composite."""
    arguments = ARGUMENTS[op]()
    for name, argument in arguments.items():
        if isinstance(argument, Tensor):
            arguments[name] = argument.to(dtype)
        elif isinstance(argument, list) and isinstance(argument[0], Tensor):
            arguments[name] = [tensor.to(dtype) for tensor in argument]
    arguments["input"] = torch.zeros(T, B, dtype=torch.int64)
    arguments["input"][2, 1] = value
    with pytest.raises(IndexError, match=str(value)):
        getattr(OPS, op)(**arguments)


ODD_OTHERS: list[tuple[str, dict[str, Any]]] = [
    ("rnn_layer", {"mode": "LSTM"}),
    ("rnn_layer", {"mode": ""}),
    ("rnn_layer", {"mode": "RNN_TANH\0"}),
    ("rnn_layer", {"mode": "x" * 100_000}),
    ("rnn_layer", {"mode": None}),
    ("rnn_layer", {"weights": []}),
    ("rnn_layer", {"weights": [torch.randn(H, I)]}),
    ("rnn_layer", {"weights": [torch.randn(H, I), torch.randn(H, H), torch.randn(H)]}),
    ("rnn_layer", {"weights": [torch.randn(H, I)] * 64}),
    ("rnn_layer", {"has_biases": False}),
    ("rnn_layer", {"weights": [None] * 4}),
    ("rnn_layer", {"weights": torch.randn(H, I)}),
    ("rnn_layer", {"input": None}),
    ("rnn_layer", {"input": "text"}),
    ("rnn_layer", {"input": torch.randn(0, B, I)}),
    ("rnn_layer", {"input": torch.randn(12, I), "batch_sizes": longs(3, 3, 3, 3),
                   "lengths": longs(4, 4, 4)}),
    ("rnn_layer_backward", {"mode": "GRU"}),
    ("rnn_layer_backward", {"needs": []}),
    ("rnn_layer_backward", {"needs": [True] * 5}),
    ("rnn_layer_backward", {"needs": [True] * 7}),
    ("rnn_layer_backward", {"needs": [True] * 10}),
    ("rnn_layer_backward", {"weights": []}),
    ("rnn_layer_backward", {"has_biases": False}),
    ("rnn_layer_backward", {"y": None}),
    ("rnn", {"mode": "RNN"}),
    ("rnn", {"num_layers": 0}),
    ("rnn", {"num_layers": -1}),
    ("rnn", {"num_layers": 3}),
    ("rnn", {"num_layers": 2**62}),
    ("rnn", {"bidirectional": False}),
    ("rnn", {"has_biases": False}),
    ("rnn", {"params": []}),
    ("rnn", {"dropout": 1.5, "train": True}),
    ("rnn", {"dropout": -0.5, "train": True}),
    ("rnn", {"dropout": float("nan"), "train": True}),
]  # fmt: skip


@pytest.mark.parametrize(("op", "change"), ODD_OTHERS, ids=lambda value: str(value)[:40])
def test_odd_arguments(op: str, change: dict[str, Any]) -> None:
    """Modes, counts and probabilities that make no sense are refused."""
    with pytest.raises(REFUSALS) as caught:
        getattr(OPS, op)(**(ARGUMENTS[op]() | change))
    assert str(caught.value).strip()


def module_calls() -> dict[str, Callable[[type[nn.RNN]], Any]]:
    """Calls that nn.RNN refuses, as functions of the class."""
    x = torch.randn(T, B, I)
    h = torch.randn(1, B, H)
    two = pack_padded_sequence(x, longs(4, 3, 1))

    def call(*args: Any, **kwargs: Any) -> Callable[[type[nn.RNN]], Any]:
        return lambda cls: cls(I, H, **kwargs)(*args)

    def build(*args: Any, **kwargs: Any) -> Callable[[type[nn.RNN]], Any]:
        def run(cls: type[nn.RNN]) -> Any:
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
        "double hx": call(x, h.double()),
        "int hx": call(x, h.long()),
        "meta hx": call(x, h.to("meta")),
        "hx 2-D": call(x, h[0]),
        "hx 1-D": call(x, h[0, 0]),
        "hx 4-D": call(x, h[None]),
        "hx layers + 1": call(x, h.repeat(2, 1, 1)),
        "hx layers 0": call(x, h[:0]),
        "hx batch + 1": call(x, torch.randn(1, B + 1, H)),
        "hx batch 1": call(x, h[:, :1]),
        "hx hidden + 1": call(x, torch.randn(1, B, H + 1)),
        "hx a tuple": call(x, (h, h)),
        "hx a string": call(x, "h"),
        "hx 3-D, unbatched": call(x[:, 0], h),
        "hx of one direction": call(x, h, bidirectional=True),
        "hx of one layer": call(x, h, num_layers=2),
        "hx batch, batch_first": call(x, h, batch_first=True),
        "packed, other width": call(PackedSequence(two.data[:, 1:], two.batch_sizes)),
        "packed, 3-D": call(PackedSequence(two.data[None], two.batch_sizes)),
        "packed, hx batch": call(two, h[:, :2]),
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


@pytest.mark.parametrize("case", module_calls())
def test_module_refuses_as_nn_rnn_does(case: str) -> None:
    """The same type of exception for every call that nn.RNN refuses."""
    call = module_calls()[case]
    with pytest.raises(Exception) as expected:  # noqa: PT011
        call(nn.RNN)
    with pytest.raises(type(expected.value)):
        call(charrnn_fast.RNN)


def spoil(change: Callable[[nn.RNN], Any]) -> Callable[[type[nn.RNN]], Any]:
    def run(cls: type[nn.RNN]) -> Any:
        module = cls(I, H)
        change(module)
        return module(torch.randn(T, B, I))

    return run


SPOILT_MODULES: dict[str, Callable[[nn.RNN], Any]] = {
    "weight_ih of another width": lambda m: setattr(
        m, "weight_ih_l0", nn.Parameter(torch.randn(H, I + 1))
    ),
    "weight_hh not square": lambda m: setattr(
        m, "weight_hh_l0", nn.Parameter(torch.randn(H, H + 1))
    ),
    "weight_hh 1-D": lambda m: setattr(m, "weight_hh_l0", nn.Parameter(torch.randn(H))),
    "weight_hh double": lambda m: setattr(
        m, "weight_hh_l0", nn.Parameter(torch.randn(H, H).double())
    ),
    "weight_hh on meta": lambda m: setattr(
        m, "weight_hh_l0", nn.Parameter(torch.empty(H, H, device="meta"))
    ),
    "bias too long": lambda m: setattr(m, "bias_ih_l0", nn.Parameter(torch.randn(H + 1))),
    "data resized": lambda m: setattr(m.weight_hh_l0, "data", torch.randn(H - 1, H - 1)),
    "storage gone": lambda m: m.weight_hh_l0.data.untyped_storage().resize_(0),
}


@pytest.mark.parametrize("case", SPOILT_MODULES)
def test_spoilt_modules(case: str) -> None:
    """Weights that were replaced by ones that do not fit are refused, not read past their end."""
    with pytest.raises(REFUSALS) as caught:
        spoil(SPOILT_MODULES[case])(charrnn_fast.RNN)
    assert str(caught.value).strip()


@pytest.mark.parametrize("lengths", [[4, 2], [4, 2, 0], [5, 2, 1], ["a", "b", "c"], 3, {"a": 1}])
def test_odd_lengths_of_modules(lengths: Any) -> None:
    """The module refuses what the ops do, lists and all."""
    with pytest.raises(REFUSALS):
        charrnn_fast.RNN(I, H)(torch.randn(T, B, I), None, lengths)


# As above: other square matrices, and another number of characters.
SOUND_GENERATE = {("params[1]", "transposed"), ("uniforms", "first size + 1")}
SOUND_GENERATE |= {("uniforms", spoil) for spoil in ("first size 0", "double", "half", "bfloat16")}


def spoilt_generate() -> list[Any]:
    """Each spoil in each tensor of a call of generate."""
    places = [("params", place) for place in (0, 1, 2, 3)]
    places += [(name, None) for name in ("tokens", "state", "head_weight", "head_bias", "uniforms")]
    return [
        pytest.param(name, place, spoil, id=f"{label}-{spoil}")
        for name, place in places
        for spoil in SPOILS
        for label in [name if place is None else f"{name}[{place}]"]
        if (label, spoil) not in SOUND_GENERATE
    ]


@pytest.mark.parametrize(("name", "place", "spoil"), spoilt_generate())
def test_spoilt_tensor_of_generate(name: str, place: int | None, spoil: str) -> None:
    """A tensor that does not fit the others is refused by generate, too."""
    arguments = generate_arguments()
    if place is None:
        arguments[name] = SPOILS[spoil](arguments[name])
    else:
        arguments[name][place] = SPOILS[spoil](arguments[name][place])
    with pytest.raises(REFUSALS) as caught:
        OPS.generate(**arguments)
    assert str(caught.value).strip()


@pytest.mark.parametrize(
    "change",
    [
        {"mode": "LSTM"},
        {"has_biases": False},
        {"params": []},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"top_p": float("nan")},
        {"tokens": longs(1, V)},
        {"tokens": longs(-1, 0)},
        {"tokens": longs(0, 2**63 - 1)},
        {"uniforms": torch.tensor([[0.5, 1.0]])},
        {"uniforms": torch.tensor([[-0.1, 0.5]])},
        {"uniforms": torch.tensor([[float("nan"), 0.5]])},
    ],
    ids=lambda value: str(value)[:40],
)
def test_odd_arguments_of_generate(change: dict[str, Any]) -> None:
    """Options, ids and uniform numbers out of range are refused."""
    with pytest.raises(REFUSALS) as caught:
        OPS.generate(**(generate_arguments() | change))
    assert str(caught.value).strip()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"top_p": 0.5}, {"temperature": 1e-320}])
def test_generate_from_ruined_weights_stays_in_the_vocabulary(
    value: float, options: dict[str, Any], isa: str
) -> None:
    """Whatever the scores are, what is drawn is a character, or the call is refused."""
    for name in ("params", "head_weight", "head_bias", "state"):
        arguments = generate_arguments()
        spoilt = arguments[name][1] if name == "params" else arguments[name]
        spoilt.view(-1)[::2] = value
        try:
            drawn, _ = OPS.generate(**arguments, **options)
        except REFUSALS:
            continue
        assert ((drawn >= 0) & (drawn < V)).all()


def test_huge_sizes_are_refused_or_too_much() -> None:
    """Sizes beyond 2^63 bytes, and beyond the memory there is, raise; no size wraps around."""
    rnn = charrnn_fast.RNN(I, H)
    with pytest.raises(REFUSALS):
        rnn(torch.zeros(()).expand(2**40, 2**10, I))
    with pytest.raises(REFUSALS):
        rnn(torch.zeros((), dtype=torch.int64).expand(2**31, 2**20))


def test_backward_twice_and_changed_inputs() -> None:
    """Autograd's own protections hold: freed buffers, and tensors changed in place since."""
    rnn = charrnn_fast.RNN(I, H)
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


def test_the_table_is_long_enough() -> None:
    """At least 150 malformed calls; this counts those above."""
    calls = len(spoilt_tensors()) + 3 * len(ODD_LISTS) + 3 * len(ODD_LENGTHS) + len(ODD_OTHERS)
    assert calls + len(module_calls()) + len(SPOILT_MODULES) > 400
