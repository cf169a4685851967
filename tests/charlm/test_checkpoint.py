from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
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
    train,
)
from charrnn_fast.charlm.checkpoint import (
    check_weights,
    lock,
    weight_shapes,
    write_atomic,
    write_tensors,
)

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
        ".lock",
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


def test_newer_format_of_the_weights(folder):
    path = folder / "model.safetensors"
    write_tensors(path, load_file(path), {"format_version": 99})
    with pytest.raises(UsageError, match=r"model.safetensors has format 99.*upgrade"):
        from_pretrained(folder, "torch")


def test_weights_of_another_shape(folder):
    edit(folder / "config.json", model={"hidden_size": 7})
    with pytest.raises(UsageError, match=r"does not fit .*\(6, 4\).*, expected \(7, 4\)"):
        from_pretrained(folder, "torch")


def test_weights_of_fewer_layers(folder):
    edit(folder / "config.json", model={"num_layers": 3})
    with pytest.raises(UsageError, match=r"rnn.weight_ih_l2 is missing"):
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


def test_shapes_are_those_of_the_module():
    """What ``weight_shapes`` says without a model is what a model has."""
    for config in (CONFIG, ModelConfig(3, 5, 1)):
        model = build_model(config, "torch")
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        assert dict(weight_shapes(config)) == expected


@pytest.mark.parametrize("huge", [{"hidden_size": 10**7}, {"num_layers": 10**12}])
def test_huge_sizes_are_refused_before_anything_is_allocated(folder, huge, monkeypatch):
    """A stranger's config.json asks for terabytes: the file's bytes are compared first."""
    edit(folder / "config.json", model=huge)
    monkeypatch.setattr("charrnn_fast.charlm.checkpoint.build_model", None)  # never called
    with pytest.raises(UsageError, match="does not fit"):
        from_pretrained(folder, "torch")


@pytest.mark.parametrize(
    "wrong",
    [
        {"hidden_size": "6"},
        {"hidden_size": 6.0},
        {"num_layers": True},
        {"hidden_size": -1},
        {"dropout": "a"},
        {"dropout": float("nan")},
        {"nonlinearity": ["tanh"]},
        {"nonlinearity": "gelu"},
    ],
)
def test_settings_of_the_wrong_kind(folder, wrong):
    edit(folder / "config.json", model=wrong)
    with pytest.raises(UsageError, match=rf"config.json is damaged: .*{next(iter(wrong))}"):
        from_pretrained(folder, "torch")


def header(text: bytes, length: int | None = None) -> bytes:
    """A safetensors file of a header and four bytes."""
    return struct.pack("<Q", len(text) if length is None else length) + text + b"1234"


def tensor(shape: str, end: int = 4) -> bytes:
    return header(b'{"a":{"dtype":"F32","shape":%b,"data_offsets":[0,%d]}}' % (shape.encode(), end))


@pytest.mark.parametrize(
    "content",
    [
        header(b"{}", 2**63),  # a header longer than any file
        header(b"{}", 2**40),
        tensor("[1000000000,1000000000]"),
        tensor("[9223372036854775807,4]"),
        tensor("[1]", end=4_000_000_000_000),
        header(b'{"__metadata__":{"charrnn_fast":"[]"}}'),
        header(b'{"__metadata__":{"charrnn_fast":"' + b"[" * 100_000 + b'"}}'),
        header(b'{"__metadata__":{"charrnn_fast":"{\\"format_version\\":true}"}}'),
        header(b"[" * 100_000),
    ],
)  # fmt: skip
def test_hostile_safetensors(folder, content):
    """Sizes that the file does not have, and nesting without end, are refused at once."""
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(UsageError, match=r"model\.safetensors"):
        from_pretrained(folder, "torch")


@pytest.mark.parametrize("name", ["config.json", "vocab.json"])
def test_hostile_json(folder, name):
    (folder / name).write_bytes(b"[" * 1_000_000)
    with pytest.raises(UsageError, match=f"{name} is damaged"):
        from_pretrained(folder, "torch")
    with (folder / name).open("wb") as file:
        file.truncate(1 << 40)  # a terabyte of nothing: no block of it is on the disk
    with pytest.raises(UsageError, match=f"{name} is damaged: more than 16 MB"):
        from_pretrained(folder, "torch")


def test_weights_that_are_no_numbers_with_fractions(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["head.bias"] = torch.zeros(4, dtype=torch.int64)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UsageError, match=r"head.bias is .*int64"):
        from_pretrained(folder, "torch")


def test_weights_too_many():
    tensors = build_model(CONFIG, "torch").state_dict() | {"other": torch.zeros(1)}
    with pytest.raises(UsageError, match="it has other, which no layer has"):
        check_weights(CONFIG, tensors, Path("model.safetensors"))


def test_pipes_are_not_waited_for(folder):
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    with pytest.raises(UsageError, match="no such file"):
        from_pretrained(folder, "torch")


@pytest.mark.parametrize("name", ["model.safetensors", ".model.safetensors.tmp", "metrics.jsonl"])
def test_symbolic_links_are_replaced_not_followed(options, tmp_path, name):
    """A folder that someone prepared cannot make a training write elsewhere."""
    victim, folder = tmp_path / "victim", Path(options.out_dir)
    victim.write_bytes(b"precious")
    folder.mkdir()
    (folder / name).symlink_to(victim)
    train(options, max_epochs=1, say=None)
    assert victim.read_bytes() == b"precious"
    assert not (folder / name).is_symlink()
    from_pretrained(folder, "torch")


def test_a_lock_that_is_a_symbolic_link(tmp_path):
    (tmp_path / ".lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="cannot write into"), lock(tmp_path):
        pass
    assert not (tmp_path / "elsewhere").exists()


def test_a_linked_model_is_read(folder, tmp_path):
    """Caches keep files elsewhere and link to them: reading follows links."""
    (folder / "model.safetensors").rename(tmp_path / "blob")
    (folder / "model.safetensors").symlink_to(tmp_path / "blob")
    from_pretrained(folder, "torch")


def test_one_training_in_a_folder(options):
    """The second one is told at once, also by another process, and nothing of the first is lost."""
    with lock(Path(options.out_dir)):
        with pytest.raises(UsageError, match="another training is writing into"):
            train(options, say=None)
        done = subprocess.run(
            [sys.executable, "-m", "charrnn_fast", "train", "--out-dir", options.out_dir],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2
        assert "another training is writing into" in done.stderr
    assert train(options, max_epochs=1, say=None).progress.finished


def test_a_run_is_written_under_the_lock(options):
    from charrnn_fast.charlm import Trainer

    seen = []

    def look(loss):
        with pytest.raises(UsageError, match="another training"), lock(Path(options.out_dir)):
            pass
        seen.append(loss)

    Trainer(replace(options, max_iters=2), say=None, on_loss=look).run()
    assert len(seen) == 2
    with lock(Path(options.out_dir)):
        pass


def test_folder_that_cannot_be_made(options, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UsageError, match=r"cannot write into .*file/run: Not a directory"):
        train(options, out_dir=str(tmp_path / "file" / "run"), say=None)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_read_only_folder(options, folder, tmp_path):
    """A model is read from it, and a training is refused."""
    folder.chmod(0o555)
    try:
        from_pretrained(folder, "torch")
        with pytest.raises(UsageError, match="cannot write into .*Permission denied"):
            train(options, out_dir=str(folder), overwrite=True, say=None)
    finally:
        folder.chmod(0o755)


def in_a_process(code: str, options) -> subprocess.CompletedProcess[str]:
    """Runs code with ``options`` in a process of its own."""
    prelude = f"from charrnn_fast.charlm import *\noptions = {options!r}\n"
    return subprocess.run(
        [sys.executable, "-c", prelude + code],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_full_disk(options):
    """Files can grow no further: training ends with the reason, the last checkpoint is whole."""
    options = replace(options, max_iters=20, save_interval=5, eval_interval=100)
    limit = """
import resource
def full(loss, steps=[]):
    steps.append(loss)
    if len(steps) == 12:  # 15 kB: less than a checkpoint
        resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, 15_000))
Trainer(options, say=None, on_loss=full).run()
"""
    done = in_a_process(limit, options)
    assert done.returncode == 1
    last = rf"cannot write {options.out_dir}/last.safetensors: File too large; what was"
    assert last in done.stderr.splitlines()[-1]
    assert not list(Path(options.out_dir).glob(".*.tmp"))
    whole = train(options, out_dir=options.out_dir + "-whole", say=None)
    resumed = train(out_dir=options.out_dir, resume=True, say=None)
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("moment", ["open", "write", "fsync", "replace"])
def test_killed_in_the_middle_of_a_write(options, moment):
    """SIGKILL just before each step of a write: the last checkpoint stays, and goes on the same."""
    options = replace(options, max_iters=20, save_interval=5, eval_interval=100)
    kill = f"""
import io, os, signal
from pathlib import Path
from charrnn_fast.charlm import checkpoint
write, count = checkpoint.write_atomic, []
def die(*arguments, **named):
    os.kill(os.getpid(), signal.SIGKILL)
def watched(path, content):
    count.append(path.name == "last.safetensors")
    if sum(count) == 2:  # the checkpoint of step 10
        if "{moment}" == "write":
            half = content[: len(content) // 2]
            path.with_name(f".{{path.name}}.tmp").write_bytes(half)
            die()
        owner = os if "{moment}" == "fsync" else Path
        setattr(owner, "{moment}", die)
    write(path, content)
checkpoint.write_atomic = watched
train(options, say=None)
"""
    done = in_a_process(kill, options)
    assert done.returncode == -9, done.stderr
    whole = train(options, out_dir=options.out_dir + "-whole", say=None)
    resumed = train(out_dir=options.out_dir, resume=True, say=None)
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not list(Path(options.out_dir).glob(".*.tmp"))
