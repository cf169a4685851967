"""What takes too long to run with every change: see make test-slow."""

from __future__ import annotations

import multiprocessing
import random
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from charrnn_fast.charlm import TrainOptions, from_pretrained, train
from charrnn_fast.charlm.checkpoint import read_tensors


def step_of(folder: Path) -> int:
    """The step of the last checkpoint, 0 without one."""
    path = folder / "last.safetensors"
    return read_tensors(path, "none")[1]["progress"]["step"] if path.exists() else 0


def _train(options: TrainOptions, resume: bool) -> None:
    if resume:
        train(out_dir=options.out_dir, resume=True, say=None)
    else:
        train(options, say=None)


@pytest.mark.slow
def test_no_seed_stays_at_the_entropy_of_single_characters(tmp_path):
    """This one did, with one-hot inputs weighted as PyTorch draws them: 2.5 nats at the end."""
    out = str(tmp_path / "run")
    run = train(out_dir=out, cell="rnn", max_epochs=3, seed=3, say=None)
    assert run.progress.val_loss < 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of fork beside threads
def test_fifty_kills_of_a_training_that_always_writes(options: TrainOptions) -> None:
    """SIGKILL at random moments, a checkpoint at every step: each time both files of weights load,
    no step is lost that was written before, and the training goes on."""
    options = replace(options, max_epochs=10_000, save_interval=1, eval_interval=3)
    folder, reached, draw = Path(options.out_dir), 0, random.Random(0)
    for kill in range(50):
        process = multiprocessing.get_context("fork").Process(
            target=_train, args=(options, step_of(folder) > 0), daemon=True
        )
        process.start()
        deadline = time.monotonic() + 60
        while step_of(folder) <= reached:
            assert process.is_alive(), f"after {kill} kills the training does not go on"
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.05))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert step_of(folder) > reached
        reached = step_of(folder)
        from_pretrained(folder, last=True)
        if (folder / "model.safetensors").exists():
            from_pretrained(folder)
