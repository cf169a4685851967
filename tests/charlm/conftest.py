"""What the tests of the character model share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs import SMALL

from charrnn_fast.charlm import TrainOptions
from charrnn_fast.charlm.model import Backend, Cell
from charrnn_fast.cli import main

TEXT = "the quick brown fox jumps over the lazy dog\nand runs away from all of it\n" * 40


@pytest.fixture(params=["fast", "torch"])
def backend(request: pytest.FixtureRequest) -> Backend:
    return request.param


@pytest.fixture(params=["rnn", "lstm", "gru"])
def cell(request: pytest.FixtureRequest) -> Cell:
    return request.param


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture
def options(text: Path, tmp_path: Path) -> TrainOptions:
    """A training of a second: about 2900 characters, 16 hidden units of the simplest cell."""
    return TrainOptions(
        text=str(text),
        out_dir=str(tmp_path / "run"),
        cell="rnn",
        hidden_size=16,
        batch_size=8,
        seq_length=16,
        max_epochs=3,
        log_interval=5,
        warmup_iters=5,
        learning_rate=1e-2,
    )


@pytest.fixture
def trained(options: TrainOptions):
    """A run of two epochs and its trainer."""
    from charrnn_fast.charlm import train

    return train(replace(options, max_epochs=2), say=None)


@pytest.fixture
def folder(text, tmp_path, capsys) -> str:
    """A run by the command."""
    assert main(["train", str(text), "--out-dir", str(tmp_path / "run"), *SMALL]) == 0
    capsys.readouterr()
    return str(tmp_path / "run")


@pytest.fixture(autouse=True)
def _threads():
    """One thread: these trainings are too small for two. Each test may set another number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
