"""What a run refuses or adapts at its start: options, threads, devices, texts and batches."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from charrnn_fast.charlm import Trainer, UsageError, train
from charrnn_fast.charlm.group import Group


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", 0),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("val_fraction", 1.0),
        ("patience", -1),
        ("min_lr", math.inf),
        ("weight_decay", math.nan),
    ],
)
def test_options_that_make_no_sense(options, name, value):
    with pytest.raises(UsageError, match=name.replace("_", "-")):
        replace(options, **{name: value})


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_seeds_that_no_generator_takes(options, seed):
    with pytest.raises(UsageError, match=r"--seed must be (at least 0|below 2\^63)"):
        replace(options, seed=seed)


@pytest.mark.parametrize("threads", [-1, 100_000])
def test_threads_that_there_are_not(options, threads):
    with pytest.raises(UsageError, match=rf"--threads must be in .*, not {threads}"):
        train(options, threads=threads, say=None)
    assert not Path(options.out_dir).exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:1", "gpu"])
def test_devices_that_there_are_not(options, device):
    with pytest.raises(UsageError, match=f"cannot use the device '{device}': "):
        train(options, device=device, say=None)
    assert not Path(options.out_dir).exists()


def test_device_of_a_process(monkeypatch):
    """The one that is named; under torchrun each process has its own."""
    monkeypatch.setattr("charrnn_fast.charlm.group.usable_device", torch.device)
    assert Group("cuda:1").device == torch.device("cuda:1")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert Group("cuda").device == torch.device("cuda:3")
    assert Group("cpu").device == torch.device("cpu")


def test_short_text_is_an_error(options, text):
    text.write_text("too short")
    with pytest.raises(UsageError, match="too few for one sequence of 16"):
        train(options, say=None)


def test_short_text_makes_a_smaller_batch_and_says_so(options, text):
    text.write_text(text.read_text()[:100])
    lines: list[str] = []
    trainer = train(options, max_epochs=1, val_fraction=0.0, say=lines.append)
    assert trainer.batches.batch_size == 6
    assert lines[0] == "note: the text is short; the batch size is 6"


def test_batch_that_the_processes_cannot_share(options, monkeypatch):
    """Before anything is written."""
    monkeypatch.setattr(Group, "size", 3, raising=False)
    monkeypatch.setattr(Group, "rank", 0, raising=False)
    monkeypatch.setattr(Group, "__init__", lambda self, device: setattr(self, "device", device))
    with pytest.raises(UsageError, match="a batch of 8 does not divide by 3 processes"):
        Trainer(options, say=None)
    assert not Path(options.out_dir).exists()
