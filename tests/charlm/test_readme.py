"""The character model as the README shows it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from charrnn_fast.charlm import from_pretrained
from charrnn_fast.cli import parser

README = Path(__file__).parents[2] / "README.md"
SECTION = README.read_text(encoding="utf-8").split("## The character model", 1)[1].split("## ")[0]
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", SECTION, re.DOTALL)


def test_commands_are_those_that_there_are():
    """Every line of the shell blocks is one that the parser takes, and every command is shown."""
    lines = [line for kind, block in BLOCKS if kind == "sh" for line in block.splitlines()]
    commands = set()
    for line in lines:
        program, *arguments = shlex.split(line, comments=True)
        assert program == "charrnn-fast"
        parser().parse_args(arguments)
        commands.add(arguments[0])
    assert commands == {"train", "sample", "eval", "report", "export", "bench", "info"}


def test_python_blocks_run(text, tmp_path, monkeypatch, capsys):
    """As they stand; the second one gives the model of the first without this package."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.txt").write_text("The end. " + text.read_text())
    first, second = (block for kind, block in BLOCKS if kind == "python")
    assert len([line for line in first.splitlines() if line]) <= 10
    values: dict = {}
    exec(first, values)
    assert values["characters"] == len((tmp_path / "my.txt").read_text()) - 1
    assert values["nats"] == pytest.approx(values["trainer"].progress.best_loss, rel=0.2)

    assert "charrnn_fast" not in second
    exec(second, values)
    plain, ours = values["model"], from_pretrained("runs/mine").model
    tokens = torch.randint(ours.rnn.input_size, (20, 2))
    y, _ = plain.rnn(torch.nn.functional.one_hot(tokens, ours.rnn.input_size).float())
    torch.testing.assert_close(plain.head(y), ours(tokens)[0], rtol=1e-4, atol=1e-5)
