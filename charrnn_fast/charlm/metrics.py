"""Measurements of a run: rows of metrics.jsonl, and TensorBoard events where asked for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from . import checkpoint
from .errors import UsageError

WriteRow = Callable[[dict[str, Any]], None]


def check_tensorboard() -> None:
    """UsageError where its package is missing."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        raise UsageError("--tensorboard needs: pip install tensorboard") from None


@contextmanager
def metrics_writer(folder: Path, step: int, tensorboard: bool) -> Iterator[WriteRow]:
    """Gives a function that appends one row; the run goes on from ``step``."""
    board: Any = None
    if tensorboard:
        check_tensorboard()
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(row: dict[str, Any]) -> None:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()
        if board:
            for name, value in row.items():
                if name not in ("step", "epoch", "seconds"):
                    add = board.add_text if isinstance(value, str) else board.add_scalar
                    add(name, value, row["step"])

    with (folder / checkpoint.METRICS).open("a", encoding="utf-8") as file:
        try:
            yield write
        finally:
            if board:
                board.close()


def trim_metrics(folder: Path, step: int) -> None:
    """Drops the rows that were written after the checkpoint: they will be written again."""
    path = folder / checkpoint.METRICS
    kept = []
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        try:
            if line.endswith(b"\n") and json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError):
            break  # a line that was being written when the process died
    checkpoint.write_atomic(path, b"".join(kept))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; a last one that is still being written is left out."""
    rows = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows
