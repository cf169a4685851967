"""What users get wrong, or their machines: one line that says so, before anything is touched."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import SMALL, fails

from charrnn_fast.charlm import (
    ModelConfig,
    SampleOptions,
    Trainer,
    TrainOptions,
    UsageError,
    Vocabulary,
    build_model,
    data,
    evaluate,
    load_corpus,
    sample,
    save_pretrained,
    stream,
    train,
)
from charrnn_fast.charlm.evaluate import evaluate_lines, evaluate_stream
from charrnn_fast.charlm.group import Group, usable_device
from charrnn_fast.charlm.options import resumed_options
from charrnn_fast.cli import main


def files(folder: str | Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in Path(folder).iterdir() if p.is_file()}


def in_a_process(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "charrnn_fast", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
        encoding="utf-8",
        errors="surrogateescape",
        timeout=300,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", "{}", "--top-k", str(2**63)], "--top-k must be below 2^63"),
        (["sample", "{}", "--top-k", "-1"], "--top-k must be at least 0, not -1"),
        (["sample", "{}", "--top-p", "nan"], "--top-p must be in (0, 1], not nan"),
        (["sample", "{}", "--temperature", "inf"], "--temperature must be finite"),
        (["sample", "{}", "--length", "9" * 30], "--length must be below 2^63"),
        (["sample", "{}", "--num-samples", "9" * 30], "--num-samples must be in [1, 1048576]"),
        (["sample", "{}", "--greedy", "--temperature", "1"], "--greedy is --temperature 0"),
        (["sample", "{}", "--device", "meta"], "cannot use the device 'meta'"),
        (["sample", "{}", "--device", ""], "cannot use the device ''"),
        (["eval", "{}", "--device", "vulkan"], "cannot use the device 'vulkan'"),
        (["eval", "{}", "--on-unknown", "skip"], "--on-unknown is for another text"),
        (["eval", "{}/model.safetensors"], "is a file of the run {}: name the folder"),
        (["sample", "{}/config.json"], "is a file of the run {}: name the folder"),
        (["train", "--resume", "{}/vocab.json"], "is a file of the run {}: name the folder"),
        (["report", __file__], "it is a file; a run is a folder"),
        (["bench", "--seconds", "inf"], "--seconds must be positive and finite"),
        (["bench", "--out-dir", "x"], "unrecognized arguments: --out-dir"),
        (["bench", "--backend", "torch"], "unrecognized arguments: --backend"),
        (["train", "--resume", "{}", "--out-dir", "x"], "--out-dir cannot be another folder"),
        (["train", "--resume", "{}", "--overwrite"], "not both"),
        (["train", "--resume", "{}", "--max-epochs", "90"], "--max-epochs has no effect"),
        (["train", "--max-iters", "5", "--max-epochs", "2"], "give one of them"),
        (["train", "--min-lr", "1"], "--min-lr must not be above --learning-rate"),
        (["train", "--min-lr", "1e-3", "--schedule", "constant"], "not with --schedule constant"),
        (["train", "--patience", "2", "--val-fraction", "0"], "--patience needs a held-out part"),
        (["train", "--hidden-size", str(2**63)], "--hidden-size must be below 2^63"),
        (["train", "--learning-rate", "nan"], "--learning-rate must be positive and finite"),
        (["train", "--text", ""], "unrecognized arguments"),
        (["train", ""], "text must be a path"),
    ],
)
def test_one_line(capsys, folder, arguments, message):
    """A request that cannot be met, or part of which would have no effect; the run stays as is."""
    before = files(folder)
    assert message.format(folder) in fails(capsys, *(a.format(folder) for a in arguments))
    assert files(folder) == before


@pytest.mark.parametrize("huge", [["--num-layers", str(10**12)], ["--hidden-size", str(2**60)]])
def test_models_larger_than_the_machine(capsys, text, tmp_path, huge):
    """Told before memory is asked for, layer by layer until the system ends the process."""
    assert main(["train", str(text), "--out-dir", str(tmp_path / "run"), *huge]) == 1
    assert "not enough memory" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", ["", "\n\n\n", "§"])
def test_evaluating_nothing_in_lines(capsys, text, tmp_path, content):
    """Of a run that learnt lines: an empty file, and one that has no line left."""
    out, other = str(tmp_path / "lines"), tmp_path / "other"
    assert main(["train", str(text), "--out-dir", out, "--lines", *SMALL]) == 0
    capsys.readouterr()
    other.write_text(content)
    message = fails(capsys, "eval", out, str(other), "--on-unknown", "skip")
    assert f"{other}: the text has no line that is not empty" in message


def test_seq_length_beside_lines(text, tmp_path, capsys):
    out = ["--out-dir", str(tmp_path / "run")]
    assert main(["train", str(text), "--lines", *SMALL, *out]) == 0
    assert "note: --lines reads whole lines: --seq-length has no effect" in capsys.readouterr().out


def test_input_scale_beside_an_embedding(text, tmp_path, capsys):
    changed = ["--embedding-size", "4", "--input-scale", "1"]
    assert main(["train", str(text), *SMALL, *changed, "--out-dir", str(tmp_path / "run")]) == 0
    note = "note: --embedding-size replaces one-hot vectors: --input-scale has no effect"
    assert note in capsys.readouterr().out


@pytest.mark.parametrize("ids", [[], [1]])
def test_texts_without_a_character_to_predict(ids):
    model = build_model(ModelConfig(3, 4, 1), "torch")
    ids = np.array(ids, dtype=np.uint8)
    with pytest.raises(UsageError, match="two characters are the least"):
        evaluate(model, ids)
    assert evaluate_stream(model, [ids])[1] == 0
    assert evaluate_stream(model, [ids, ids[:0], ids])[1] == max(0, 2 * len(ids) - 1)


def test_counts_that_make_no_sense():
    """Through Python, where they would loop for ever or divide by zero."""
    model, vocabulary = build_model(ModelConfig(3, 4, 1), "torch"), Vocabulary("ab\n")
    ids = np.zeros(9, dtype=np.uint8)
    for call in (
        lambda: evaluate(model, ids, streams=0),
        lambda: evaluate(model, ids, seq_length=0),
        lambda: list(stream(model, vocabulary, length=3, chunk=0)),
        lambda: sample(model, vocabulary, length=-1),
        lambda: sample(model, vocabulary, streams=0),
        lambda: sample(model, vocabulary, length=2.5),  # type: ignore[arg-type]
    ):
        with pytest.raises(UsageError, match="must be"):
            call()


def test_losses_beyond_exp(capsys, folder):
    """A model that is sure of the wrong thing: its perplexity is infinite, not an error."""
    from charrnn_fast.charlm import from_pretrained

    pretrained = from_pretrained(folder, "torch")
    with torch.no_grad():
        pretrained.model.head.bias[0] = 1e4
    save_pretrained(folder, pretrained.model, pretrained.vocabulary)
    other = Path(folder) / "text"
    other.write_text("the fox")
    assert main(["eval", folder, str(other)]) == 0
    assert "perplexity inf" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["train", "sample", "eval", "info", "bench"])
def test_instruction_set_that_there_is_not(tmp_path, command):
    more = {"train": ["--out-dir", str(tmp_path / "run")], "sample": ["x"], "eval": ["x"]}
    done = in_a_process(command, *more.get(command, []), CHARRNN_FAST_ISA="sse9")
    assert (done.returncode, done.stdout) == (2, "")
    expected = "charrnn-fast: CHARRNN_FAST_ISA=sse9 is not a known ISA; choose one of: "
    assert done.stderr.startswith(expected)
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("encoding", [{"PYTHONIOENCODING": "ascii"}, {}])
def test_ascii_locale(text, tmp_path, encoding):
    """It shows a question mark for what it lacks, and what is typed is UTF-8 all the same."""
    text.write_text("é" * 3000, encoding="utf-8")
    folder = str(tmp_path / "run")
    ascii_locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", **encoding}
    done = in_a_process("train", str(text), "--out-dir", folder, "--sample-length", "3", *SMALL,
                        **ascii_locale)  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert "\n???\n" in done.stdout
    done = in_a_process("sample", folder, "--start", "éé", "--length", "5", **ascii_locale)
    assert (done.returncode, done.stdout, done.stderr) == (0, "?" * 7 + "\n", "")
    done = in_a_process("sample", folder, "--start", "ü", **ascii_locale)
    assert done.returncode == 2
    assert "(U+00FC)" in done.stderr


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "2"}, "RANK is not set: start the training with torchrun, or unset WORLD"),
        ({"WORLD_SIZE": "2", "RANK": ""}, "RANK is not set"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK is '2'"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, "MASTER_PORT is not set"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "1"}, "MASTER_ADDR is not set"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE is '-2'"),
    ],
)
def test_remains_of_torchrun(options, monkeypatch, variables, message):
    """In the environment of a shell, without the rest of it."""
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=message):
        Trainer(options, say=None)
    assert not Path(options.out_dir).exists()


@pytest.mark.parametrize("size", ["", "1", "0"])
def test_remains_of_torchrun_that_mean_one_process(monkeypatch, size):
    monkeypatch.setenv("WORLD_SIZE", size)
    monkeypatch.delenv("RANK", raising=False)
    assert (Group("cpu").size, Group("cpu").rank) == (1, 0)


@pytest.mark.parametrize("device", ["meta", torch.device("meta"), "", "vulkan"])
def test_devices_that_cannot_compute(device):
    with pytest.raises(UsageError, match="cannot use the device"):
        usable_device(device)


def test_python_values_become_plain_ones(text, tmp_path):
    """Paths, devices and NumPy's scalars: the run's settings are written, and read again."""
    trainer = train(
        text=text,
        out_dir=tmp_path / "run",
        device=torch.device("cpu"),
        hidden_size=np.int64(8),
        num_layers=np.uint8(1),
        max_iters=np.int32(3),
        learning_rate=np.float32(0.5),
        min_lr=0,
        lines=np.True_,
        say=None,
    )
    assert all(
        type(v) in (str, int, float, bool, type(None)) for v in vars(trainer.options).values()
    )
    assert resumed_options(tmp_path / "run", {}).learning_rate == 0.5
    assert trainer.options.lines is True


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_size", 8.0),
        ("hidden_size", "8"),
        ("hidden_size", True),
        ("learning_rate", "0.1"),
        ("learning_rate", True),
        ("learning_rate", 10**400),
        ("dropout", None),
        ("schedule", "linear"),
        ("backend", "jax"),
        ("nonlinearity", ["tanh"]),
        ("recurrent_init", "zeros"),
        ("lines", 1),
        ("text", 5),
        ("text", b"a\0b"),
        ("out_dir", None),
        ("device", 0),
        ("seed", np.float64(1)),
        ("max_iters", 2**63),
    ],
)
def test_python_values_of_another_kind(options, trained, name, value):
    """Refused by name, with the run that was to be overwritten as it was."""
    before = files(options.out_dir)
    with pytest.raises(UsageError, match=f"^--{name.replace('_', '-')} must be "):
        train(options, overwrite=True, say=None, **{name: value})
    assert files(options.out_dir) == before


@pytest.mark.parametrize(
    "changes",
    [
        {"device": "meta"},
        {"text": "nowhere"},
        {"seq_length": 10**6},
        {"hidden_size": 10**9},
        {"nonlinearity": "sigmoid", "backend": "torch"},
        {"lines": True, "text": "ab" * 50},
    ],
)
def test_an_old_run_is_kept_until_all_is_known(options, trained, tmp_path, changes):
    """Whatever stops the new one before its first step."""
    if "ab" in changes.get("text", ""):
        (tmp_path / "one").write_text(changes["text"])
        changes = {**changes, "text": tmp_path / "one"}
    before = files(options.out_dir)
    with pytest.raises((UsageError, MemoryError)):
        train(options, overwrite=True, say=None, **changes)
    assert files(options.out_dir) == before


def test_tensorboard_that_is_missing(options, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UsageError, match="pip install tensorboard"):
        train(options, tensorboard=True, say=None)
    assert not Path(options.out_dir).exists()


def test_a_trainer_writes_nothing_before_it_runs(options):
    trainer = Trainer(options, say=None)
    trainer.train_step()
    assert not Path(options.out_dir).exists()


def test_options_of_a_resumed_run(options, trained):
    """Those given as TrainOptions count as much as those given by name."""
    with pytest.raises(UsageError, match="--hidden-size cannot change"):
        train(replace(options, hidden_size=9, max_epochs=5), resume=True, say=None)
    with pytest.raises(UsageError, match="--seed cannot change"):
        Trainer(replace(options, seed=9), resume=True, say=None)
    with pytest.raises(UsageError, match="not both"):
        Trainer(options, resume=True, overwrite=True, say=None)


def test_two_trainings_that_resume_at_once(options, trained):
    """The second one is told, as the first has gone on since it looked."""
    late = Trainer(replace(options, max_epochs=4), resume=True, say=None)
    train(out_dir=options.out_dir, resume=True, max_epochs=3, say=None)
    with pytest.raises(UsageError, match="another training has gone on in"):
        late.run()


@pytest.mark.parametrize(
    ("second", "where"),
    [("abc", "shorter"), ("abcdabcdX", "new"), ("abcdabcdabcd", "longer")],
)
def test_text_that_changes_while_it_is_read(monkeypatch, tmp_path, second, where):
    """Between the two readings: it grew, it shrank, or it has other characters."""
    path = tmp_path / "text"
    path.write_text("abcdabcd!")
    pieces = data.text_pieces

    def then_change(path):
        yield from pieces(path)
        Path(path).write_text(second)

    monkeypatch.setattr(data, "text_pieces", then_change)
    with pytest.raises(UsageError, match=r"text changed while it was read"):
        load_corpus(path)


def test_hints_can_be_pasted(text, tmp_path, capsys):
    """A folder with a blank, and what a shell would take for something else."""
    folder = str(tmp_path / "my $run's")
    assert main(["train", str(text), "--out-dir", folder, *SMALL]) == 0
    hint = capsys.readouterr().out.rsplit("try: ", 1)[1].strip()
    assert shlex.split(hint) == ["charrnn-fast", "sample", folder]
    assert main([*shlex.split(hint)[1:], "--length", "5"]) == 0
    trainer = Trainer(resumed_options(folder, {"max_iters": 30}), resume=True, say=None)
    assert shlex.split(trainer.home.command("train --resume"))[3] == folder


@pytest.mark.parametrize("resume", [False, True])
def test_config_file_with_a_byte_order_mark(tmp_path, capsys, resume):
    """As editors of another system write it; also of other encodings, and nested without end."""
    config = tmp_path / "run.toml"
    config.write_bytes(b"\xef\xbb\xbfspeed = 1\n")
    assert "no such option: speed" in fails(capsys, "train", "--config", str(config))
    config.write_text("a = " + "[" * 100_000)
    assert "no TOML" in fails(capsys, "train", "--config", str(config))
    config.write_text("lr = 1\nlearning_rate = 2\n")
    assert "twice, by two names" in fails(capsys, "train", "--config", str(config))
    config.write_text("max_iters = 3\nmax_epochs = 2\n")
    assert "give one of them" in fails(capsys, "train", "--config", str(config))


def test_flags_win_over_the_length_in_a_file(text, tmp_path):
    config = tmp_path / "run.toml"
    config.write_text("max_iters = 3\nhidden_size = 4\nbatch_size = 4\nseq_length = 8\n")
    out = str(tmp_path / "run")
    command = ["train", str(text), "--config", str(config), "--out-dir", out, "--max-epochs", "1"]
    assert main(command) == 0
    assert resumed_options(out, {}).max_iters == 0


def test_nothing_held_out_shows_no_nan(text, tmp_path, capsys):
    out = str(tmp_path / "run")
    assert main(["train", str(text), "--val-fraction", "0", "--out-dir", out, *SMALL]) == 0
    shown = capsys.readouterr()
    assert "nan" not in shown.out + shown.err
    assert "train " in shown.out
    assert "NaN" not in (Path(out) / "metrics.jsonl").read_text()
    header = (Path(out) / "model.safetensors").read_bytes()[:400]
    assert b"NaN" not in header


@pytest.mark.parametrize(
    "wrong", [{"top_k": 2**63}, {"top_k": 1.5}, {"temperature": "hot"}, {"top_p": True}]
)
def test_sampling_options_of_another_kind(wrong):
    with pytest.raises(UsageError, match="must be"):
        SampleOptions(**wrong)
    assert SampleOptions(np.float32(0.5), np.int64(3)) == SampleOptions(0.5, 3)


def test_vocabulary_of_another_size_is_not_saved(tmp_path):
    model = build_model(ModelConfig(3, 4, 1), "torch")
    with pytest.raises(UsageError, match="2 characters, but the model has 3"):
        save_pretrained(tmp_path / "x", model, Vocabulary("ab"))
    assert not (tmp_path / "x").exists()


def test_defaults_are_what_checks_return():
    """Every option is checked, and a default is a plain value of its own kind."""
    assert replace(TrainOptions()) == TrainOptions()


def test_lines_that_are_long(monkeypatch):
    """Evaluated in pieces with the state carried, and in batches of few: the same loss."""
    from charrnn_fast.charlm import evaluate as module  # noqa: F401
    from charrnn_fast.charlm.data import LineBatches

    vocabulary = Vocabulary("ab\n")
    ids = vocabulary.encode("\n".join("ab" * n for n in (1, 50, 3, 7, 200)))
    model = build_model(ModelConfig(3, 8, 1), "torch", seed=1)
    lines = LineBatches(ids, 4, 0, 0)
    whole = evaluate_lines(model, lines)
    monkeypatch.setattr("charrnn_fast.charlm.model.NUMBERS", 3 * 4 * 10)
    monkeypatch.setattr(sys.modules["charrnn_fast.charlm.evaluate"], "LINES", 300)
    assert evaluate_lines(model, lines) == (pytest.approx(whole[0], rel=1e-6), whole[1])
