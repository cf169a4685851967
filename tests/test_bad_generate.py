"""Malformed calls of the op `generate`: each is refused, or draws characters of the vocabulary."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from malformed import OPS, REFUSALS, SPOILS, H, longs

V = 7


def generate_arguments() -> dict[str, Any]:
    """A sound call of generate: three characters for two streams, two layers."""
    sizes = [(H, V), (H, H), (H,), (H,), (H, H), (H, H), (H,), (H,)]
    return {
        "tokens": torch.tensor([1, 2]),
        "state": torch.randn(2, 2, H),
        "cell_state": None,
        "params": [torch.randn(*size) for size in sizes],
        "head_weight": torch.randn(V, H),
        "head_bias": torch.randn(V),
        "uniforms": torch.rand(3, 2),
        "mode": "RNN_TANH",
        "has_biases": True,
    }


# These only look spoilt: square matrices, another number of characters, and other floats.
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
            drawn, *_ = OPS.generate(**arguments, **options)
        except REFUSALS:
            continue
        assert ((drawn >= 0) & (drawn < V)).all()
