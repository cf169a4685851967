from __future__ import annotations

import pytest

from charrnn_fast.charlm.metrics import metrics_writer


def test_events_of_a_run_that_goes_on(tmp_path):
    """What was written after the checkpoint that a run goes on from is no longer shown."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for step, steps, loss in ((0, range(1, 6), 1.0), (3, range(4, 7), 2.0)):
        with metrics_writer(tmp_path, step, tensorboard=True) as write:
            for n in steps:
                write({"step": n, "train_loss": loss})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    shown = [(event.step, event.value) for event in events.Scalars("train_loss")]
    assert shown == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0), (6, 2.0)]
