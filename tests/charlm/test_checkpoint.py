from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from charrnn_fast.charlm import (
    ByteVocabulary,
    ModelConfig,
    UsageError,
    Vocabulary,
    build_model,
    from_pretrained,
    sample,
    save_pretrained,
)
from charrnn_fast.charlm.checkpoint import write_atomic

VOCABULARY = Vocabulary("abc\n")
CONFIG = ModelConfig(4, 6, 2)


@pytest.fixture
def folder(tmp_path, backend):
    save_pretrained(tmp_path / "model", build_model(CONFIG, backend, seed=1), VOCABULARY)
    return tmp_path / "model"


def test_backends_swap(tmp_path):
    """What one backend saves the other one loads: same scores, same text."""
    tokens = torch.randint(4, (5, 2))
    for saver, loader in (("fast", "torch"), ("torch", "fast")):
        model = build_model(CONFIG, saver, seed=1)
        folder = tmp_path / saver
        save_pretrained(folder, model, VOCABULARY)
        loaded = from_pretrained(folder, loader)
        assert loaded.vocabulary == VOCABULARY
        torch.testing.assert_close(loaded.model(tokens)[0], model(tokens)[0])
        texts = [sample(m, VOCABULARY, "a", 500, seed=1) for m in (model, loaded.model)]
        assert texts[0] == texts[1]


def test_every_setting_comes_back(tmp_path):
    config = ModelConfig(256, 5, 3, "relu", 0.25)
    save_pretrained(tmp_path, build_model(config, "torch"), ByteVocabulary())
    model, vocabulary, _ = from_pretrained(tmp_path, "torch")
    assert vocabulary == ByteVocabulary()
    assert (model.rnn.nonlinearity, model.rnn.num_layers) == ("relu", 3)
    assert (model.rnn.dropout, model.dropout.p) == (0.25, 0.25)
    assert not model.training


def test_weights_load_into_plain_modules(folder):
    """No part of this package is needed to use the weights."""
    plain = nn.Module()
    plain.rnn, plain.head = nn.RNN(4, 6, 2), nn.Linear(6, 4)
    plain.load_state_dict(load_file(folder / "model.safetensors"))


def test_files_hold_no_pickle(trained):
    files = sorted(p.name for p in trained.folder.iterdir())
    assert files == [
        "config.json",
        "last.safetensors",
        "metrics.jsonl",
        "model.safetensors",
        "vocab.json",
    ]
    for path in trained.folder.glob("*.json"):
        json.loads(path.read_text())
    for path in trained.folder.glob("*.safetensors"):
        load_file(path)


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    """A full disk: the old content stays, and no temporary file does."""
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_files_appear_whole(tmp_path, monkeypatch):
    """The content is on the disk before the name points to it."""
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append("fsync"), fsync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda *a, **k: (order.append("rename"), replace(*a, **k)))
    write_atomic(tmp_path / "file", b"content")
    assert order in (["fsync", "rename", "fsync"], ["fsync", "fsync"])  # 3.10 renames elsewhere


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "vocab.json"])
@pytest.mark.parametrize("damage", ["cut", "empty", "garbage", "missing"])
def test_damaged_files_are_named(folder, name, damage):
    path = folder / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"cut": content[:-9], "empty": b"", "garbage": b"\xff" * 99}[damage])
    with pytest.raises(UsageError, match=f"{name}"):
        from_pretrained(folder, "torch")


def edit(path, **changes):
    value = json.loads(path.read_text())
    for key, change in changes.items():
        value[key] = value[key] | change if isinstance(change, dict) else change
    path.write_text(json.dumps(value))


def test_newer_format(folder):
    edit(folder / "config.json", format_version=99)
    with pytest.raises(UsageError, match=r"format 99.*upgrade"):
        from_pretrained(folder, "torch")


def test_weights_of_another_shape(folder):
    edit(folder / "config.json", model={"hidden_size": 7})
    with pytest.raises(UsageError, match=r"does not fit .*\(4, 6\), expected \(4, 7\)"):
        from_pretrained(folder, "torch")


def test_weights_of_fewer_layers(folder):
    edit(folder / "config.json", model={"num_layers": 3})
    with pytest.raises(UsageError, match=r"rnn.bias_hh_l2 is missing"):
        from_pretrained(folder, "torch")


def test_vocabulary_of_another_size(folder):
    edit(folder / "vocab.json", characters="ab")
    with pytest.raises(UsageError, match="2 characters, but the model has 4"):
        from_pretrained(folder, "torch")


def test_settings_of_another_program(folder):
    edit(folder / "config.json", model={"heads": 4})
    with pytest.raises(UsageError, match="heads"):
        from_pretrained(folder, "torch")


def test_no_run(tmp_path):
    with pytest.raises(UsageError, match="no such run"):
        from_pretrained(tmp_path / "nothing")
    with pytest.raises(UsageError, match=r"no such file: .*config.json"):
        from_pretrained(tmp_path)


def test_best_and_last(trained):
    best, last = (from_pretrained(trained.folder, "torch", last=x).model for x in (False, True))
    assert trained.progress.best_step == trained.progress.step
    for a, b in zip(best.parameters(), last.parameters(), strict=True):
        assert torch.equal(a, b)
