"""The three sentences of examples/sentences.py."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch

from charrnn_fast.charlm import UsageError, Vocabulary

EXAMPLE = Path(__file__).parents[2] / "examples" / "sentences.py"


@pytest.fixture
def example():
    return runpy.run_path(str(EXAMPLE))


def run(example, monkeypatch, capsys, *flags) -> list[str]:
    monkeypatch.setattr(sys, "argv", ["sentences.py", *flags])
    example["main"]()
    return capsys.readouterr().out.splitlines()


CELLS = ("rnn", "lstm", "gru")


@pytest.mark.parametrize("flags", [[], ["--pad-in-loss"]])
def test_cells_stand_beside_each_other(example, monkeypatch, capsys, flags):
    """A column of losses for each cell and backend, those of one cell the same but for rounding;
    and a completion for each cell, which both backends have written."""
    lines = run(example, monkeypatch, capsys, *flags)
    assert lines[0].split() == ["loss", *CELLS]
    assert lines[1].split() == ["fast", "torch"] * 3
    rows = [list(map(float, line.split()[2:])) for line in lines[2:12]]
    assert [line.split()[1] for line in lines[2:12]] == [str(10 * n) for n in range(1, 11)]
    for row in rows:
        assert row[::2] == pytest.approx(row[1::2], rel=1e-2)
    completions = [line.split(maxsplit=1) for line in [*lines[13:16], *lines[17:20]]]
    assert [cell for cell, _ in completions] == [*CELLS, *CELLS]
    assert [len(eval(text)) for _, text in completions] == [23] * 6
    assert "the same characters" in lines[20]


def test_sentences_are_learnt(example, monkeypatch, capsys):
    lines = run(example, monkeypatch, capsys)
    for column in range(6):
        losses = [float(line.split()[2 + column]) for line in lines[2:12]]
        assert losses == sorted(losses, reverse=True)
        assert losses[-1] < 1.0
    assert lines[13].split(maxsplit=1) == ["rnn", "'hello how are you doing'"]
    assert "'hello i am fine" in lines[17]


def test_padding_counts_only_when_asked_for(example):
    vocabulary = Vocabulary("".join(example["SENTENCES"]))
    tokens, masked = example["make_batch"](vocabulary, False)
    _, padded = example["make_batch"](vocabulary, True)
    assert tokens.shape == masked.shape == (16, 3)
    assert tokens.dtype == masked.dtype == torch.int64
    assert (masked >= 0).sum(0).tolist() == [16, 8, 16]
    assert (padded >= 0).all()
    assert torch.equal(padded[masked >= 0], masked[masked >= 0])


def test_unknown_character_is_named(example):
    vocabulary = Vocabulary("".join(example["SENTENCES"]))
    model = example["train"]("gru", "torch", vocabulary, False)[0]
    with pytest.raises(UsageError, match="'z'"):
        example["complete"](model, vocabulary, "zebra")
