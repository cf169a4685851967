from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runs import SMALL, fails

from charrnn_fast.charlm.options import DEFAULT_CELL
from charrnn_fast.cli import main


def run(*arguments, **kwargs):
    return subprocess.run(
        [sys.executable, "-m", "charrnn_fast", *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **kwargs,
    )


def test_train_and_sample_in_a_shell(text, tmp_path, backend):
    """The whole way of a user, without a terminal: no progress bar, no warning."""
    folder = tmp_path / "run"
    done = run("train", str(text), "--out_dir", str(folder), "--backend", backend, *SMALL)
    assert (done.returncode, done.stderr) == (0, "")
    assert "bits/character" in done.stdout
    assert f"charrnn-fast sample {folder}" in done.stdout
    sample = ["sample", str(folder), "--start", "the ", "--length", "100", "--seed", "1"]
    texts = [run(*sample, "--backend", b) for b in ("fast", "torch")]
    assert all((t.returncode, t.stderr) == (0, "") for t in texts)
    assert texts[0].stdout == texts[1].stdout
    assert texts[0].stdout.startswith("the ")
    assert len(texts[0].stdout) == 4 + 100 + 1


def test_progress_bar_on_a_terminal(text, tmp_path):
    """With a terminal on stderr there is a bar with speed and loss."""
    import fcntl
    import pty
    import struct
    import termios

    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    command = ["train", str(text), "--out-dir", str(tmp_path / "run"), *SMALL, "--log-interval=5"]
    process = subprocess.Popen(
        [sys.executable, "-m", "charrnn_fast", *command],
        stderr=writer,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    os.close(writer)
    shown = b""
    while True:
        try:
            piece = os.read(reader, 4096)
        except OSError:
            break
        if not piece:
            break
        shown += piece
    os.close(reader)
    assert process.wait() == 0
    assert b"char/s" in shown
    assert b"loss=" in shown


def test_wrong_texts(capsys, tmp_path):
    out = ["--out-dir", str(tmp_path / "run")]
    assert "no such file: nowhere.txt" in fails(capsys, "train", "nowhere.txt", *out)
    path = tmp_path / "text"
    for content, message in [
        ("", "is empty"),
        ("a", "single character"),
        ("ab" * 10, "too few for one sequence of 50"),
    ]:
        path.write_text(content)
        assert message in fails(capsys, "train", str(path), *out)
    path.write_bytes(b"\xff\xfe" * 100)
    assert "--bytes" in fails(capsys, "train", str(path), *out)
    assert not (tmp_path / "run").exists()


def test_full_disk(text, tmp_path):
    """One line that says which file, and why; code 1, as nothing was wrong with the request."""
    command = [sys.executable, "-m", "charrnn_fast", "train", str(text), *SMALL, "--out-dir", "run"]
    limited = ["sh", "-c", 'ulimit -f 4; exec "$@"', "sh", *command]
    done = subprocess.run(limited, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    message = "charrnn-fast: cannot write run/model.safetensors: File too large\n"
    assert done.stderr == message


def test_folder_that_cannot_be_written(capsys, text, tmp_path):
    out = str(text / "run")  # below a file
    message = fails(capsys, "train", str(text), "--out-dir", out, *SMALL)
    assert f"cannot write into {out}: Not a directory" in message


def test_folder_that_is_in_use(capsys, folder, text):
    from charrnn_fast.charlm.checkpoint import lock

    with lock(Path(folder)):
        message = fails(capsys, "train", "--resume", folder, "--max-iters", "30")
    assert "another training is writing into" in message


def test_folder_that_holds_a_run(capsys, folder, text):
    message = fails(capsys, "train", str(text), "--out-dir", folder, *SMALL)
    assert "already holds a run" in message
    assert "--resume" in message
    assert main(["train", str(text), "--out-dir", folder, "--overwrite", *SMALL]) == 0


def test_resume(capsys, folder):
    assert "finished" in fails(capsys, "train", "--resume", folder)
    assert "--hidden-size" in fails(capsys, "train", "--resume", folder, "--hidden-size", "9")
    assert main(["train", "--resume", folder, "--max-iters", "30"]) == 0
    capsys.readouterr()
    assert "no such run" in fails(capsys, "train", "--resume", folder + "x")


def test_unknown_character_of_a_prompt(capsys, folder):
    message = fails(capsys, "sample", folder, "--start", "thé")
    assert "'é' (U+00E9)" in message
    assert "--on-unknown skip" in message
    for policy in ("skip", "replace"):
        assert main(["sample", folder, "--start", "thé", "--on-unknown", policy]) == 0
        read = {"skip": "th", "replace": "th "}[policy]
        assert capsys.readouterr().out.startswith(read), "the prompt as the model reads it"


@pytest.mark.parametrize(
    "arguments",
    [
        ["sample", "nowhere"],
        ["sample"],
        ["sample", "{}", "--temperature", "-1"],
        ["sample", "{}", "--temperature", "warm"],
        ["sample", "{}", "--top-p", "2"],
        ["sample", "{}", "--length", "0"],
        ["sample", "{}", "--start", "FILE:nowhere"],
        ["sample", "{}", "--threads", "-1"],
        ["sample", "{}", "--seed", "99999999999999999999"],
        ["sample", "{}", "--device", "gpu"],
        ["train", "--backend", "jax"],
        ["train", "--batch-size", "0"],
        ["train", "--config", "nowhere.toml"],
        ["eval", "nowhere"],
        ["eval", "{}", "nowhere.txt"],
        ["report", "nowhere"],
        ["export", "nowhere"],
        ["bench", "--seconds", "0"],
        ["bench", "--out-dir", "out", "--resume", "out"],
        ["train", "--no-such-option"],
        ["fly"],
        [],
    ],
)
def test_wrong_commands(capsys, folder, arguments):
    fails(capsys, *(a.format(folder) for a in arguments))


def test_sampling_options(capsys, folder, tmp_path):
    prompt = tmp_path / "prompt"
    prompt.write_text("the fox")

    def text(*options):
        assert main(["sample", folder, "--length", "60", "--seed", "3", *options]) == 0
        return capsys.readouterr().out

    assert text("--start", "FILE:" + str(prompt)) == text("--primetext=the fox")
    assert text("--greedy") == text("--temperature", "0") == text("--top_k", "1")
    assert text("--num-samples", "3").count("-" * 15) == 2
    whole = text()
    assert text("--stop", whole[20:22]) == whole[: whole.index(whole[20:22])] + "\n"
    output = tmp_path / "output"
    assert text("-o", str(output)) == ""
    assert output.read_text() == whole
    assert text("--last") != ""


def test_config_file(capsys, text, tmp_path):
    """Options come from the file, flags win, and all of them are saved with the run."""
    config = tmp_path / "run.toml"
    config.write_text(
        f'text = "{text}"\nrnn_size = 8\nmax-iters = 5\nlr = 1\nlines = true\nbackend = "torch"\n'
    )
    out = str(tmp_path / "run")
    assert main(["train", "--config", str(config), "--out-dir", out, "--max-iters", "7"]) == 0
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["model"]["hidden_size"] == 8
    training = saved["training"]
    assert (training["max_iters"], training["learning_rate"], training["lines"]) == (7, 1.0, True)
    assert training["seq_length"] == 50
    capsys.readouterr()
    for line, message in [
        ("speed = 1", "no such option: speed"),
        ('batch_size = "many"', "--batch-size must be a whole number, not 'many'"),
        ('backend = "jax"', "--backend must be one of fast, torch, not 'jax'"),
        ("lines = 1", "--lines must be true or false, not 1"),
        ("=", "no TOML"),
    ]:
        config.write_text(line)
        assert message in fails(capsys, "train", "--config", str(config))


def test_help_teaches_by_example(capsys):
    for arguments in (
        ["--help"],
        *([c, "--help"] for c in ("train", "sample", "eval", "report", "export", "bench")),
    ):
        with pytest.raises(SystemExit) as done:
            main(arguments)
        assert done.value.code == 0
        assert "examples:" in capsys.readouterr().out


def test_eval(capsys, folder, text, tmp_path):
    """The held-out part without a text, else the text; unknown characters by policy."""

    def nats(*arguments) -> float:
        assert main(["eval", folder, *arguments]) == 0
        words = capsys.readouterr().out.split(": ", 1)[1].split()
        assert float(words[2]) == pytest.approx(float(words[0]) / math.log(2), rel=1e-3)
        return float(words[0])

    from charrnn_fast.charlm import evaluate, from_pretrained, load_corpus

    model = from_pretrained(folder).model
    ids = load_corpus(text).ids
    assert nats() == pytest.approx(evaluate(model, ids[-len(ids) // 10 :]), rel=0.01)
    assert nats("--backend", "torch", "--last") > 0
    assert nats(str(text)) == pytest.approx(evaluate(model, ids), abs=1e-3)
    other = tmp_path / "other"
    other.write_text("the é fox")
    assert "'é' (U+00E9)" in fails(capsys, "eval", folder, str(other))
    losses = [nats(str(other), "--on-unknown", policy) for policy in ("skip", "replace")]
    for loss, same in zip(losses, ("the  fox", "the   fox"), strict=True):
        other.write_text(same)
        assert nats(str(other)) == loss
    other.write_text("t")
    assert "two characters" in fails(capsys, "eval", folder, str(other))
    text.write_text("changed " * 100)
    assert "has changed since the training" in fails(capsys, "eval", folder)


def test_eval_of_lines(capsys, text, tmp_path):
    out = str(tmp_path / "lines")
    assert main(["train", str(text), "--out-dir", out, "--lines", *SMALL]) == 0
    capsys.readouterr()
    for arguments in ([], [str(text)]):
        assert main(["eval", out, *arguments]) == 0
        assert "bits/character" in capsys.readouterr().out


def test_report_and_export(capsys, folder, tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("onnxruntime")
    assert main(["report", folder]) == main(["export", folder]) == 0
    shown = capsys.readouterr().out
    assert f"wrote {folder}/report.html" in shown
    assert f"wrote {folder}/model.onnx; scores in ONNX Runtime differ by" in shown
    assert main(["report", folder, "-o", str(tmp_path / "page")]) == 0
    assert main(["export", folder, "-o", str(tmp_path / "graph")]) == 0
    assert (tmp_path / "page").stat().st_size > 10_000
    assert (tmp_path / "graph").stat().st_size > 1000


def test_bench(capsys, text):
    assert main(["bench", str(text), "--seconds", "0.05", *SMALL]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[2:]] == [
        "training",
        "sampling, 1 stream",
        "sampling, 64 streams",
    ]


def test_tensorboard(capsys, text, tmp_path):
    """Events beside metrics.jsonl, with the same numbers."""
    pytest.importorskip("tensorboard")
    done = run("train", str(text), "--out-dir", str(tmp_path / "run"), "--tensorboard", *SMALL,
               "--log-interval", "10", "--sample-length", "20")  # fmt: skip
    assert done.returncode == 0, done.stderr
    events = [p.read_bytes() for p in (tmp_path / "run" / "tensorboard").iterdir()]
    for name in (b"train_loss", b"val_bpc", b"lr", b"sample"):
        assert any(name in content for content in events)


def test_info(capsys):
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    for word in ("charrnn_fast", "torch", "threads", "cuda", "CUDA kernels", "instruction sets"):
        assert word in shown
    built = torch._C._dispatch_has_kernel_for_dispatch_key("charrnn_fast::rnn_layer", "CUDA")
    assert re.search(r"CUDA kernels +" + ("" if built else "not ") + r"in this build: \w+", shown)


def test_demo(tmp_path, capsys):
    """A short one: the same report, and a model that can be sampled from."""
    assert main(["demo", "--out-dir", str(tmp_path), "--max-iters", "10"]) == 0
    shown = capsys.readouterr().out
    for word in (
        "bits/character",
        "characters/s",
        f"times torch.nn.{DEFAULT_CELL.upper()}",
        "losses agree",
    ):
        assert word in shown
    assert main(["sample", str(tmp_path / "fast"), "--length", "10"]) == 0


def test_too_little_memory(capsys, text, tmp_path):
    """One line, not a trace of the call that failed."""
    arguments = ["train", str(text), "--out-dir", str(tmp_path / "run")]
    assert main([*arguments, "--hidden-size", "10000000"]) == 1
    assert capsys.readouterr().err.startswith("charrnn-fast: not enough memory; a smaller model")


def test_terminal_that_lacks_a_character(text, tmp_path, monkeypatch):
    """It shows a question mark in its place."""
    text.write_text("é" * 3000)
    folder = str(tmp_path / "run")
    assert main(["train", str(text), "--out-dir", folder, *SMALL]) == 0
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    done = run("sample", folder, "--start", "éé", "--length", "5")
    assert (done.returncode, done.stdout, done.stderr) == (0, "?" * 7 + "\n", "")


def test_bytes_of_any_file(capsys, tmp_path):
    """A prompt of any bytes, and a file of the very bytes that were drawn."""
    binary, prompt, output = (tmp_path / name for name in ("binary", "prompt", "output"))
    binary.write_bytes(bytes(range(256)) * 8)
    prompt.write_bytes(b"\xff\xfe")
    folder = str(tmp_path / "run")
    assert main(["train", str(binary), "--bytes", "--out-dir", folder, *SMALL]) == 0
    sample = ["sample", folder, "--start", f"FILE:{prompt}", "--length", "600", "--seed", "1"]
    assert main([*sample, "-o", str(output)]) == 0
    content = output.read_bytes()
    assert content.startswith(b"\xff\xfe")
    assert len(content) == 2 + 600 + 1
    assert len(set(content)) > 200
    capsys.readouterr()
    assert main(sample) == 0
    assert capsys.readouterr().out[2:] == content.decode(errors="replace")[2:]
