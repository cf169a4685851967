"""Runs that go on: to the same bits after any end, and only from a folder that is sound."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs import assert_resumes_as_if_never_stopped, metrics, step_of, tensors_of, weights

from charrnn_fast.charlm import Trainer, UsageError, from_pretrained, train
from charrnn_fast.charlm.checkpoint import read_tensors, write_tensors
from charrnn_fast.charlm.options import resumed_options
from charrnn_fast.charlm.train import interrupts


@pytest.mark.parametrize("changes", [{"dropout": 0.3, "save_interval": 3}, {"lines": True}])
@pytest.mark.parametrize("stop", [1, 7, 16, 20])
def test_resumed_run_is_as_if_never_stopped(options, changes, stop):
    """A run that an exception ends at some step goes on to the same bits."""
    options = replace(options, **changes)
    assert_resumes_as_if_never_stopped(options, stop)


def start(options, *arguments) -> subprocess.Popen:
    flags = [
        f"--{k.replace('_', '-')}={v}"
        for k, v in vars(options).items()
        if k != "text" and not isinstance(v, bool) and v is not None
    ]
    run = [sys.executable, "-m", "charrnn_fast", "train"]
    command = [*run, *arguments] if arguments else [*run, options.text, *flags]
    return subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_killed_run_resumes_bit_for_bit(options):
    """SIGKILL at random moments, again and again; what remains goes on to the same bits.

    The moments are random with each test run; a failure shows them.
    """
    options = replace(options, max_epochs=15, save_interval=2, dropout=0.1)
    whole, folder = Path(options.out_dir + "-whole"), Path(options.out_dir)
    start_of_run = time.perf_counter()
    train(options, out_dir=str(whole), say=None)
    length = time.perf_counter() - start_of_run
    delays = [random.uniform(0, 0.4 * length) for _ in range(3)]

    def killed(process, delay) -> bool:
        """Kills it, after a while; False when it had finished before."""
        time.sleep(delay)
        process.kill()
        process.communicate()
        return process.returncode == -signal.SIGKILL

    process = start(options)
    while True:
        while not (folder / "config.json").exists() and process.poll() is None:
            time.sleep(0.002)
        if killed(process, delays[0]):
            break
        shutil.rmtree(folder)
        delays[0] /= 4  # the machine is faster now than it was
        process = start(options)
    steps = [step_of(folder)]
    process = start(options, "--resume", str(folder))
    for delay in delays[1:]:
        while step_of(folder) == steps[-1] and process.poll() is None:
            time.sleep(0.002)  # it has begun to train
        if not killed(process, delay):
            break
        steps.append(step_of(folder))
        process = start(options, "--resume", str(folder))
    process.communicate()
    for name in ("model.safetensors", "last.safetensors"):
        same = tensors_of(weights(folder, name)) == tensors_of(weights(whole, name))
        assert same, (name, delays, steps)
    assert metrics(folder) == metrics(whole), (delays, steps)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_saves_and_resumes(options, number):
    options = replace(options, max_epochs=500, eval_interval=100_000)
    process = start(options)
    path = Path(options.out_dir) / "metrics.jsonl"
    while not (path.exists() and path.stat().st_size) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 130
    assert errors.startswith("charrnn-fast: stopped at step ")
    assert f"train --resume {options.out_dir}" in errors
    step = int(errors.split()[4].rstrip(";"))
    trainer = Trainer(replace(options), resume=True, say=None)
    assert trainer.progress.step == step > 0


def test_a_second_interrupt_stops_at_once():
    """The first one is noted; afterwards the signals are whose they were."""
    before = signal.getsignal(signal.SIGINT)
    with interrupts() as seen:
        signal.raise_signal(signal.SIGINT)
        assert seen == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_run_that_goes_on_is_not_finished(options, trained):
    """A Ctrl-C in it is told as one, although the run had come to its end before."""
    assert trained.progress.finished
    longer = resumed_options(options.out_dir, {"max_epochs": 9})
    trainer = Trainer(longer, resume=True, say=None)
    trainer.on_loss = lambda loss: signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="go on with: charrnn-fast train --resume"):
        trainer.run()


def test_run_goes_on_from_anywhere(options, text, tmp_path, monkeypatch):
    """A text that was named from one folder is found from another one."""
    monkeypatch.chdir(text.parent)
    train(options, text=text.name, max_epochs=1, say=None)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert train(out_dir=options.out_dir, resume=True, max_epochs=2, say=None).progress.finished


def test_only_some_options_change_on_resume(options, trained):
    folder = str(trained.folder)
    with pytest.raises(UsageError, match="finished.* give more --max-epochs"):
        train(out_dir=folder, resume=True, say=None)
    with pytest.raises(UsageError, match="finished.* give more --max-iters"):
        train(out_dir=folder, resume=True, max_iters=3, say=None)
    with pytest.raises(UsageError, match="--hidden-size cannot change"):
        train(out_dir=folder, resume=True, hidden_size=8, say=None)
    longer = train(out_dir=folder, resume=True, max_epochs=3, backend="torch", say=None)
    assert longer.progress.step == longer.total_steps == 3 * len(longer.batches)


def test_what_changes_on_resume_is_saved(options, trained, text, tmp_path):
    """A later resumption has the schedule of the one before, not that of the beginning."""
    moved = text.rename(tmp_path / "moved.txt")
    changes = {"max_epochs": 5, "text": str(moved), "save_interval": 1}

    class PowerCut(Exception):
        pass

    def cut(loss):
        raise PowerCut

    options = resumed_options(options.out_dir, changes)
    with pytest.raises(PowerCut):
        Trainer(options, resume=True, say=None, on_loss=cut).run()
    saved = json.loads((Path(options.out_dir) / "config.json").read_text())["training"]
    assert saved.items() >= changes.items()
    assert train(out_dir=options.out_dir, resume=True, say=None).progress.step == 5 * len(
        trained.batches
    )


def test_resume_needs_the_same_text(options, trained, text):
    text.write_text(text.read_text() + "more of it")
    with pytest.raises(UsageError, match="the text is not the one"):
        train(out_dir=str(trained.folder), resume=True, max_epochs=3, say=None)


def test_folder_that_holds_a_run(options, trained):
    with pytest.raises(UsageError, match=r"already holds a run.*--resume"):
        train(options, say=None)
    assert train(options, overwrite=True, say=None).progress.finished
    with pytest.raises(UsageError, match="no such run"):
        train(out_dir=options.out_dir + "none", resume=True)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("optimizer.head.bias.exp_avg", torch.zeros(3), "state of head.bias"),
        ("model.head.bias", torch.zeros(3), "head.bias"),
        ("random", torch.zeros(1, 5, dtype=torch.uint8), "damaged"),
        ("state", torch.zeros(2, 8, 3), "carried state"),
        ("window", torch.zeros(1, 2), "damaged"),
    ],
)
def test_damaged_training_state(options, trained, name, value, message):
    """One line that names the file, whatever is wrong in it."""
    path = Path(options.out_dir) / "last.safetensors"
    tensors, about = read_tensors(path)
    tensors.pop(name)
    if value is not None:
        tensors[name] = value
    write_tensors(path, tensors, about)
    with pytest.raises(UsageError, match=rf"last.safetensors .*{message}"):
        train(out_dir=options.out_dir, resume=True, max_epochs=3, say=None)


@pytest.mark.parametrize("progress", [None, {"step": -1}, {"step": 1.5}])
def test_damaged_counters(options, trained, progress):
    path = Path(options.out_dir) / "last.safetensors"
    tensors, about = read_tensors(path)
    progress = progress and about["progress"] | progress
    write_tensors(path, tensors, about | {"progress": progress})
    with pytest.raises(UsageError, match=r"last.safetensors is damaged"):
        train(out_dir=options.out_dir, resume=True, max_epochs=3, say=None)


def one_count_a_weight(tensors, about):
    """As it was when the optimizer was torch.optim.AdamW."""
    steps = tensors.pop("optimizer.step")
    for name in [n for n in tensors if n.endswith(".exp_avg")]:
        tensors[name.replace("exp_avg", "step")] = steps.clone()


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (one_count_a_weight, "optimizer.step"),
        (lambda tensors, about: tensors.pop("window"), "window"),
        (lambda tensors, about: tensors.pop("state"), "state"),
        (lambda tensors, about: about["progress"].pop("stale"), "stale"),
        (lambda tensors, about: about["progress"].update(pace=1), "pace"),
    ],
)
def test_training_state_of_another_version(options, trained, change, name):
    """One sentence that says so, not that the file is damaged; its weights can be used."""
    path = Path(options.out_dir) / "last.safetensors"
    tensors, about = read_tensors(path)
    change(tensors, about)
    write_tensors(path, tensors, about)
    expected = rf"last.safetensors was written by another version .*\(see {name}\).*cannot resume"
    with pytest.raises(UsageError, match=expected):
        train(out_dir=options.out_dir, resume=True, max_epochs=3, say=None)
    from_pretrained(options.out_dir, last=True)
