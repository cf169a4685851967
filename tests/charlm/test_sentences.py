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


@pytest.mark.parametrize("flags", [[], ["--pad-in-loss"]])
def test_backends_write_the_same(example, monkeypatch, capsys, flags):
    lines = run(example, monkeypatch, capsys, *flags)
    fast, reference = lines[:13], lines[13:26]
    assert (fast[0], reference[0]) == ("backend fast", "backend torch")
    assert fast[11:] == reference[11:]  # the texts
    for a, b in zip(fast[1:11], reference[1:11], strict=True):
        assert float(a.split()[-1]) == pytest.approx(float(b.split()[-1]), rel=1e-3)
    assert [len(eval(text)) for text in fast[11:]] == [23, 23]
    assert "the same characters" in lines[26]


def test_sentences_are_learnt(example, monkeypatch, capsys):
    lines = run(example, monkeypatch, capsys)
    losses = [float(line.split()[-1]) for line in lines[1:11]]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.2
    assert lines[11] == "'hello how are you doing'"
    assert lines[12].startswith("'hello i am fine")


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
    model = example["train"]("torch", vocabulary, False)
    with pytest.raises(UsageError, match="'z'"):
        example["complete"](model, vocabulary, "zebra")
