from __future__ import annotations

from dataclasses import replace
from importlib import import_module

import pytest

from charrnn_fast.charlm import UsageError, build_model
from charrnn_fast.charlm.bench import bench


def test_sides_are_timed_at_each_task(options):
    rows = bench(options, seconds=0.05, rounds=2)
    assert [row.task for row in rows] == ["training", "sampling, 1 stream", "sampling, 64 streams"]
    assert all(row.fast > 0 and row.torch > 0 for row in rows)


def test_sides_must_agree_before_they_are_timed(options, monkeypatch):
    """Another seed for one side is another model: nothing is timed."""
    monkeypatch.setattr(
        import_module("charrnn_fast.charlm.train"),
        "build_model",
        lambda config, backend, init, seed, *more: build_model(
            config, backend, init, seed + (backend == "fast"), *more
        ),
    )
    with pytest.raises(RuntimeError, match="do not agree"):
        bench(options, seconds=0.05, rounds=2)


def test_lines_are_not_for_timing(options):
    with pytest.raises(UsageError, match="lines"):
        bench(replace(options, lines=True))
