"""The character model as docs/charlm.md and the README show it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from charrnn_fast.charlm import from_pretrained, train
from charrnn_fast.cli import parser

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "charlm.md"

pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="runs apart from the sources")


def blocks(page: Path, kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def commands(page: Path) -> set[str]:
    """Of the shell blocks; every line must be one that the parser takes."""
    found = set()
    for line in "".join(blocks(page, "sh")).splitlines():
        program, *arguments = shlex.split(line, comments=True)
        if program == "charrnn-fast":
            parser().parse_args(arguments)
            found.add(arguments[0])
    return found


def test_commands_are_those_that_there_are():
    every = {"train", "sample", "eval", "report", "export", "bench", "demo", "info"}
    assert commands(PAGE) == every
    assert commands(ROOT / "README.md") == {"train", "sample", "report"}


def test_python_block_runs(text, tmp_path, monkeypatch, capsys):
    """As it stands."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.txt").write_text("The end. " + text.read_text())
    block = blocks(PAGE, "python")[0]
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
    block = blocks(PAGE, "python")[1]
    assert "charrnn_fast" not in block
    values: dict = {}
    exec(block, values)
    plain, ours = values["model"], from_pretrained("runs/mine").model
    V = ours.config.vocab_size
    tokens = torch.randint(V, (20, 2))
    x = plain.embedding(tokens) if embedding else torch.nn.functional.one_hot(tokens, V).float()
    scores = plain.head(plain.rnn(x)[0])
    torch.testing.assert_close(scores, ours(tokens)[0], rtol=1e-4, atol=1e-5)
