"""Runs by the command, and what they left in their folders."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from charrnn_fast.charlm import Trainer, train
from charrnn_fast.charlm.checkpoint import read_tensors
from charrnn_fast.cli import main

TIMES = ("seconds", "chars_per_second")
# A run of a second.
SMALL = ["--hidden-size", "8", "--batch-size", "4", "--seq-length", "8", "--max-iters", "20"]


def fails(capsys, *arguments: str) -> str:
    """Runs a wrong command: exit code 2, and one line on stderr, which is returned."""
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("charrnn-fast: ")
    assert shown.err.count("\n") == 1
    return shown.err


def metrics(folder) -> list[dict]:
    """The rows of metrics.jsonl without what a clock wrote."""
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def weights(folder, name="model.safetensors") -> bytes:
    return (Path(folder) / name).read_bytes()


def tensors_of(content: bytes) -> bytes:
    """A safetensors file without its header, where the time spent is written."""
    return content[8 + int.from_bytes(content[:8], "little") :]


def step_of(folder: Path) -> int:
    """The step of the last checkpoint, 0 without one."""
    path = folder / "last.safetensors"
    return read_tensors(path, "none")[1]["progress"]["step"] if path.exists() else 0


class PowerCut(Exception):
    """What ends a run at some step."""


def assert_resumes_as_if_never_stopped(options, stop: int) -> None:
    """A run that ends at step `stop`, and is resumed, leaves the bits of one that was not."""
    train(options, out_dir=options.out_dir + "-whole", say=None)

    def cut(loss, left=[stop]):  # noqa: B006
        left[0] -= 1
        if not left[0]:
            raise PowerCut

    with pytest.raises(PowerCut):
        Trainer(options, say=None, on_loss=cut).run()
    train(out_dir=options.out_dir, resume=True, say=None)
    for name in ("model.safetensors", "last.safetensors"):
        a, b = (weights(folder, name) for folder in (options.out_dir, options.out_dir + "-whole"))
        assert tensors_of(a) == tensors_of(b)
    assert metrics(options.out_dir) == metrics(options.out_dir + "-whole")
