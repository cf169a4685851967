"""Malformed calls of the ops: each raises a Python exception with a message. None aborts, hangs or
touches memory that is not the call's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import STATES, layer_results, named_arguments
from kinds import KINDS, Kind
from malformed import OPS, REFUSALS, SPOILS, B, H, I, T, longs
from test_bad_modules import SPOILT_MODULES, module_calls
from torch import Tensor
from torch.utils._pytree import tree_map_only

Arguments = dict[str, Any]


def states_of(kind: Kind, rows: int) -> Arguments:
    return {name: torch.randn(rows, B, H) for name in STATES[: len(kind.states)]}


def layer_weights(kind: Kind, width: int = I) -> list[Tensor]:
    G = kind.gates * H
    return [torch.randn(*size) for size in ((G, width), (G, H), (G,), (G,))]


def layer_arguments(kind: Kind) -> Arguments:
    """A sound call of rnn_layer, to be spoilt in one place."""
    return named_arguments(
        "rnn_layer",
        input=torch.randn(T, B, I),
        weights=layer_weights(kind),
        mode=kind.modes[0],
        has_biases=True,
        **states_of(kind, 1),
    )


def backward_arguments(kind: Kind) -> Arguments:
    """A sound call of rnn_layer_backward."""
    finals = {f"d{name}": torch.randn(1, B, H) for name in kind.states}
    return named_arguments(
        "rnn_layer_backward",
        dy=torch.randn(T, B, H),
        input=torch.randn(T, B, I),
        weights=layer_weights(kind),
        y=torch.randn(T, B, H),
        mode=kind.modes[0],
        has_biases=True,
        needs=[True, *(name in STATES[: len(kind.states)] for name in STATES), *[True] * 4],
        **states_of(kind, 1),
        **finals,
    )


def stack_arguments(kind: Kind) -> Arguments:
    """A sound call of rnn with two layers of two directions."""
    return named_arguments(
        "rnn",
        input=torch.randn(T, B, I),
        params=[w for width in (I, I, 2 * H, 2 * H) for w in layer_weights(kind, width)],
        mode=kind.modes[0],
        has_biases=True,
        num_layers=2,
        dropout=0.0,
        train=False,
        bidirectional=True,
        **states_of(kind, 4),
    )


ARGUMENTS: dict[str, Callable[[Kind], Arguments]] = {
    "rnn": stack_arguments,
    "rnn_layer": layer_arguments,
    "rnn_layer_backward": backward_arguments,
}


@pytest.mark.parametrize("op", ARGUMENTS)
def test_the_calls_are_sound(kind: Kind, op: str) -> None:
    """What is spoilt below is what is spoilt, and nothing else is wrong."""
    getattr(OPS, op)(**ARGUMENTS[op](kind))


# These only look spoilt: another number of steps, and square matrices.
SOUND = {
    ("input", "first size + 1"),
    ("weights[1]", "transposed"),
    ("params[13]", "transposed"),
}


def spoilt_tensors() -> list[Any]:
    """Each spoil in each tensor argument of each op."""
    cases = []
    for kind in KINDS:
        for op, make in ARGUMENTS.items():
            for name, value in make(kind).items():
                if name == "saved":
                    continue  # may be empty; see ODD_SAVED
                if isinstance(value, Tensor):
                    places: list[int | None] = [None]
                elif isinstance(value, list) and isinstance(value[0], Tensor):
                    places = [0, 1, 2, 3] if op != "rnn" else [0, 4, 8, 13]
                else:
                    continue
                for place in places:
                    label = name if place is None else f"{name}[{place}]"
                    for spoil in SPOILS:
                        if (label, spoil) in SOUND and (label == "input" or kind.gates == 1):
                            continue
                        case = f"{kind}-{op}-{label}-{spoil}"
                        cases.append(pytest.param(kind, op, name, place, spoil, id=case))
    return cases


@pytest.mark.parametrize(("kind", "op", "name", "place", "spoil"), spoilt_tensors())
def test_spoilt_tensor(kind: Kind, op: str, name: str, place: int | None, spoil: str) -> None:
    """A tensor that does not fit the others is refused by every op."""
    arguments = ARGUMENTS[op](kind)
    if place is None:
        arguments[name] = SPOILS[spoil](arguments[name])
    else:
        arguments[name] = list(arguments[name])
        arguments[name][place] = SPOILS[spoil](arguments[name][place])
    with pytest.raises(REFUSALS) as caught:
        getattr(OPS, op)(**arguments)
    assert str(caught.value).strip()


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
    "float": torch.tensor([4.0, 2.0, 2.0]),
    "bool": torch.ones(3, dtype=torch.bool),
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
@pytest.mark.parametrize("odd", ODD_LISTS)
def test_odd_batch_sizes(kind: Kind, op: str, odd: str) -> None:
    """Sizes that do not fall, are not positive, or do not add up are refused."""
    arguments = packed(ARGUMENTS[op](kind)) | {"batch_sizes": ODD_LISTS[odd]}
    with pytest.raises(REFUSALS) as caught:
        getattr(OPS, op)(**arguments)
    assert str(caught.value).strip()


@pytest.mark.parametrize("op", ARGUMENTS)
@pytest.mark.parametrize("odd", ODD_LENGTHS)
def test_odd_lengths(kind: Kind, op: str, odd: str) -> None:
    """Lengths outside 1..T, or not one for each sequence, are refused."""
    with pytest.raises(REFUSALS) as caught:
        getattr(OPS, op)(**(ARGUMENTS[op](kind) | {"lengths": ODD_LENGTHS[odd]}))
    assert str(caught.value).strip()


ODD_RESETS: dict[str, Any] = {
    "int64": torch.zeros(T, B, dtype=torch.int64),
    "float": torch.zeros(T, B),
    "uint8": torch.zeros(T, B, dtype=torch.uint8),
    "batch first": torch.zeros(B, T, dtype=torch.bool),
    "1-D": torch.zeros(T, dtype=torch.bool),
    "3-D": torch.zeros(T, B, 1, dtype=torch.bool),
    "scalar": torch.zeros((), dtype=torch.bool),
    "a step more": torch.zeros(T + 1, B, dtype=torch.bool),
    "a step less": torch.zeros(T - 1, B, dtype=torch.bool),
    "a sequence more": torch.zeros(T, B + 1, dtype=torch.bool),
    "empty": torch.zeros(0, B, dtype=torch.bool),
    "huge by stride 0": torch.zeros((), dtype=torch.bool).expand(2**20, 2**20),
    "meta": torch.zeros(T, B, dtype=torch.bool, device="meta"),
    "sparse": torch.zeros(T, B, dtype=torch.bool).to_sparse(),
}


@pytest.mark.parametrize("op", ARGUMENTS)
@pytest.mark.parametrize("odd", ODD_RESETS)
def test_odd_resets(kind: Kind, op: str, odd: str) -> None:
    """Masks of another dtype or shape are refused."""
    with pytest.raises(REFUSALS) as caught:
        getattr(OPS, op)(**(ARGUMENTS[op](kind) | {"resets": ODD_RESETS[odd]}))
    assert str(caught.value).strip()


@pytest.mark.parametrize("op", ARGUMENTS)
def test_resets_of_packed_rows(kind: Kind, op: str) -> None:
    """Packed rows have no place for a mask, and the error names what has."""
    mask = torch.zeros(T, B, dtype=torch.bool)
    arguments = packed(ARGUMENTS[op](kind)) | {"batch_sizes": longs(3, 3, 3, 3), "resets": mask}
    with pytest.raises(ValueError, match="lengths"):
        getattr(OPS, op)(**arguments)


@pytest.mark.parametrize("op", ["rnn", "rnn_layer"])
def test_cell_states_of_kinds_without(kind: Kind, op: str) -> None:
    """cells=True is an LSTM's; a state c is refused that a cell has not, or of another size."""
    arguments = ARGUMENTS[op](kind)
    if kind.has_cell_state:
        with pytest.raises(REFUSALS):
            getattr(OPS, op)(**(arguments | {"hx": None, "cx": torch.zeros(1, B, H + 1)}))
        return
    with pytest.raises(ValueError, match="cells"):
        getattr(OPS, op)(**(arguments | {"cells": True}))
    with pytest.raises(REFUSALS):
        getattr(OPS, op)(**(arguments | {"cx": arguments["hx"]}))


ODD_SAVED: dict[str, Callable[[Tensor], Tensor]] = {
    "one element": lambda t: t.flatten()[:1].clone(),
    "an element less": lambda t: t.flatten()[1:].clone(),
    "double": lambda t: t.double(),
    "half": lambda t: t.half(),
    "int64": lambda t: t.long(),
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
    "every other": lambda t: torch.stack([t, t], -1)[..., 0],
}


@pytest.mark.parametrize("odd", ODD_SAVED)
def test_odd_saved(kind: Kind, odd: str) -> None:
    """What forward kept, in another size, dtype or place: refused, or read as what it holds."""
    arguments = layer_arguments(kind)
    results = getattr(OPS, "rnn_layer")(**(arguments | {"keep": True}))  # noqa: B009
    y, *_, saved = layer_results(kind.modes[0], False, results)
    backward = backward_arguments(kind)
    backward |= {name: arguments[name] for name in arguments.keys() & backward.keys()} | {"y": y}
    if saved is None:
        pytest.skip(f"{kind} keeps nothing")
    want = OPS.rnn_layer_backward(**(backward | {"saved": saved}))
    try:
        got = OPS.rnn_layer_backward(**(backward | {"saved": ODD_SAVED[odd](saved)}))
    except REFUSALS:
        return
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("op", ARGUMENTS)
@pytest.mark.parametrize("value", [I, -1, 2**31, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_ids_out_of_range(kind: Kind, op: str, value: int, dtype: torch.dtype) -> None:
    """A token id outside [0, I) is an IndexError, in kernels and composite."""
    arguments = ARGUMENTS[op](kind)
    for name, argument in arguments.items():
        if isinstance(argument, Tensor):
            arguments[name] = argument.to(dtype)
        elif isinstance(argument, list) and isinstance(argument[0], Tensor):
            arguments[name] = [tensor.to(dtype) for tensor in argument]
    arguments["input"] = torch.zeros(T, B, dtype=torch.int64)
    arguments["input"][2, 1] = value
    if "needs" in arguments:
        arguments["needs"][0] = False
    with pytest.raises(IndexError, match=str(value)):
        getattr(OPS, op)(**arguments)


def test_gradients_that_do_not_exist(kind: Kind) -> None:
    """Of ids, and of a c that a cell has not; the others are listed without gaps, in order."""
    arguments = backward_arguments(kind)
    everything = OPS.rnn_layer_backward(**arguments)
    assert len(everything) == sum(arguments["needs"])
    some = [need and place % 2 == 0 for place, need in enumerate(arguments["needs"])]
    wanted = [place for place, need in enumerate(arguments["needs"]) if need]
    got = OPS.rnn_layer_backward(**(arguments | {"needs": some}))
    want = [grad for place, grad in zip(wanted, everything, strict=True) if some[place]]
    assert len(got) == len(want) > 0
    assert all(map(torch.equal, got, want))
    ids = torch.zeros(T, B, dtype=torch.int64)
    for device in ("cpu", "meta"):  # kernels, and what tracing knows of them
        arguments = tree_map_only(Tensor, lambda t, to=device: t.to(to), arguments)
        with pytest.raises(RuntimeError, match="needs of input must be False: token ids have no"):
            OPS.rnn_layer_backward(**(arguments | {"input": ids.to(device)}))
        if not kind.has_cell_state:
            with_c = [True, True, True, *[True] * 4]
            with pytest.raises(RuntimeError, match="needs of cx must be False"):
                OPS.rnn_layer_backward(**(arguments | {"needs": with_c}))


ODD_OTHERS: list[tuple[str, dict[str, Any]]] = [
    ("rnn_layer", {"mode": "LSTM_TANH"}),
    ("rnn_layer", {"mode": ""}),
    ("rnn_layer", {"mode": "RNN_TANH\0"}),
    ("rnn_layer", {"mode": "x" * 100_000}),
    ("rnn_layer", {"mode": None}),
    ("rnn_layer", {"weights": []}),
    ("rnn_layer", {"weights": [torch.zeros(H, I)]}),
    ("rnn_layer", {"weights": [torch.zeros(H, I), torch.zeros(H, H), torch.zeros(H)]}),
    ("rnn_layer", {"weights": [torch.zeros(H, I)] * 64}),
    ("rnn_layer", {"weights": [None] * 4}),
    ("rnn_layer", {"weights": torch.zeros(H, I)}),
    ("rnn_layer", {"has_biases": False}),
    ("rnn_layer", {"input": None}),
    ("rnn_layer", {"input": "text"}),
    ("rnn_layer", {"input": torch.zeros(0, B, I)}),
    ("rnn_layer", {"input": torch.zeros(12, I), "batch_sizes": longs(3, 3, 3, 3),
                   "lengths": longs(4, 4, 4)}),
    ("rnn_layer_backward", {"mode": "gru"}),
    ("rnn_layer_backward", {"needs": []}),
    ("rnn_layer_backward", {"needs": [True] * 4}),
    ("rnn_layer_backward", {"needs": [True] * 8}),
    ("rnn_layer_backward", {"needs": [True] * 11}),
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
def test_odd_arguments(kind: Kind, op: str, change: dict[str, Any]) -> None:
    """Modes, counts and probabilities that make no sense are refused."""
    with pytest.raises(REFUSALS) as caught:
        getattr(OPS, op)(**(ARGUMENTS[op](kind) | change))
    assert str(caught.value).strip()


@pytest.mark.parametrize("op", ARGUMENTS)
@pytest.mark.parametrize(
    ("kind", "other"), [(k, other) for k in KINDS for other in KINDS if k is not other], ids=str
)
def test_the_mode_of_another_kind(kind: Kind, op: str, other: Kind) -> None:
    """Weights of one network under the mode of another are refused, not read past their end."""
    with pytest.raises(REFUSALS) as caught:
        getattr(OPS, op)(**(ARGUMENTS[op](kind) | {"mode": other.modes[0]}))
    assert str(caught.value).strip()


def test_the_table_is_long_enough() -> None:
    """At least 150 malformed calls a kind; this counts those above and those of modules."""
    lists = len(ARGUMENTS) * (len(ODD_LISTS) + len(ODD_LENGTHS) + len(ODD_RESETS))
    calls = lists + len(ODD_OTHERS) + len(module_calls(KINDS[0])) + len(SPOILT_MODULES)
    assert calls + len(spoilt_tensors()) / len(KINDS) > 400
