"""The character model as the README shows it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from charrnn_fast.charlm import from_pretrained, train
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


def python_blocks() -> list[str]:
    return [block for kind, block in BLOCKS if kind == "python"]


def test_python_block_runs(text, tmp_path, monkeypatch, capsys):
    """As it stands."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.txt").write_text("The end. " + text.read_text())
    block = python_blocks()[0]
    assert len([line for line in block.splitlines() if line]) <= 10
    values: dict = {}
    exec(block, values)
    assert values["characters"] == len((tmp_path / "my.txt").read_text()) - 1
    assert values["nats"] == pytest.approx(values["trainer"].progress.best_loss, rel=0.2)


@pytest.mark.parametrize("embedding", [0, 5])
def test_weights_need_no_package_of_ours(options, cell, embedding, tmp_path, monkeypatch):
    """The second block gives the model of a run, of any cell, out of torch's modules."""
    monkeypatch.chdir(tmp_path)
    train(options, cell=cell, embedding_size=embedding, out_dir="runs/mine", max_iters=5, say=None)
    block = python_blocks()[1]
    assert "charrnn_fast" not in block
    values: dict = {}
    exec(block, values)
    plain, ours = values["model"], from_pretrained("runs/mine").model
    V = ours.config.vocab_size
    tokens = torch.randint(V, (20, 2))
    x = plain.embedding(tokens) if embedding else torch.nn.functional.one_hot(tokens, V).float()
    scores = plain.head(plain.rnn(x)[0])
    torch.testing.assert_close(scores, ours(tokens)[0], rtol=1e-4, atol=1e-5)
