from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from charrnn_fast.charlm import Trainer, TrainingDiverged, UsageError, evaluate, sample, train
from charrnn_fast.charlm.checkpoint import read_tensors
from charrnn_fast.charlm.evaluate import evaluate_stream
from charrnn_fast.charlm.train import clip_gradients, learning_rate

TIMES = ("seconds", "chars_per_second")


def metrics(folder) -> list[dict]:
    """The rows of metrics.jsonl without what a clock wrote."""
    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def weights(folder, name="model.safetensors") -> bytes:
    return (Path(folder) / name).read_bytes()


def test_it_learns(options, backend):
    trainer = train(replace(options, backend=backend), say=None)
    rows = metrics(trainer.folder)
    losses = [row["train_loss"] for row in rows if "train_loss" in row]
    held_out = [row["val_loss"] for row in rows if "val_loss" in row]
    assert losses[0] > 2.5 > 2.0 > losses[-1]
    assert len(held_out) == 3
    assert trainer.progress.best_loss == min(held_out)
    assert trainer.progress.finished


def test_backends_train_alike(options):
    """Same weights at the start, same data: losses agree step by step, and so does the text."""
    losses: dict[str, list[torch.Tensor]] = {"fast": [], "torch": []}
    changed = [replace(options, backend=b, out_dir=f"{options.out_dir}-{b}") for b in losses]
    models = [
        Trainer(o, say=None, on_loss=v.append)
        for o, v in zip(changed, losses.values(), strict=True)
    ]
    for trainer in models:
        trainer.run()
    a, b = (torch.stack(values) for values in losses.values())
    torch.testing.assert_close(a, b, rtol=1e-4, atol=0)
    texts = [sample(t.model, t.vocabulary, "the ", 200, seed=1) for t in models]
    assert texts[0] == texts[1]


def test_first_step_is_plain_pytorch(options):
    """One step of the trainer is the textbook's: one-hot, nn.RNN, cross-entropy, Adam."""
    trainer = Trainer(replace(options, backend="fast", warmup_iters=0, grad_clip=0.0), say=None)
    state = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    plain = nn.Module()
    vocab = len(trainer.vocabulary)
    plain.rnn, plain.head = nn.RNN(vocab, 16, 2), nn.Linear(16, vocab)
    plain.load_state_dict(state)
    optimizer = torch.optim.Adam(plain.parameters(), lr=options.learning_rate)
    batch = trainer.batches.batch(0, 0)
    y, _ = plain.rnn(nn.functional.one_hot(batch.tokens, vocab).float())
    loss = nn.functional.cross_entropy(plain.head(y).flatten(0, 1), batch.targets.flatten())
    loss.backward()
    optimizer.step()
    torch.testing.assert_close(trainer.train_step(), loss.detach())
    for a, b in zip(trainer.model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"dropout": 0.3}, {"lines": True}, {"bytes": True}])
def test_same_seed_same_run(options, backend, changes):
    """Bit for bit, for one thread and for two."""
    runs = []
    options = replace(options, max_epochs=1)
    for threads in (1, 2):
        folder = f"{options.out_dir}-{len(runs)}"
        train(options, backend=backend, threads=threads, out_dir=folder, say=None, **changes)
        runs.append((weights(folder), metrics(folder)))
    assert runs[0] == runs[1]


def test_another_seed_is_another_run(options):
    runs = [
        train(options, seed=s, max_epochs=1, out_dir=f"{options.out_dir}{s}", say=None)
        for s in (1, 2)
    ]
    assert weights(runs[0].folder) != weights(runs[1].folder)


@pytest.mark.parametrize("changes", [{"dropout": 0.3, "save_interval": 3}, {"lines": True}])
@pytest.mark.parametrize("stop", [1, 7, 16, 20])
def test_resumed_run_is_as_if_never_stopped(options, changes, stop):
    """A run that an exception ends at some step goes on to the same bits."""
    options = replace(options, **changes)
    train(options, out_dir=options.out_dir + "-whole", say=None)

    class PowerCut(Exception):
        pass

    def cut(loss, left=[stop]):  # noqa: B006
        left[0] -= 1
        if not left[0]:
            raise PowerCut

    with pytest.raises(PowerCut):
        Trainer(options, say=None, on_loss=cut).run()
    train(out_dir=options.out_dir, resume=True, say=None)
    for name in ("model.safetensors", "last.safetensors"):
        a, b = (weights(folder, name) for folder in (options.out_dir, options.out_dir + "-whole"))
        assert tensors_of(a) == tensors_of(b)
    assert metrics(options.out_dir) == metrics(options.out_dir + "-whole")


def tensors_of(content: bytes) -> bytes:
    """A safetensors file without its header, where the time spent is written."""
    return content[8 + int.from_bytes(content[:8], "little") :]


def start(options, *arguments) -> subprocess.Popen:
    flags = [
        f"--{k.replace('_', '-')}={v}"
        for k, v in vars(options).items()
        if k != "text" and not isinstance(v, bool)
    ]
    command = [sys.executable, "-m", "charrnn_fast", "train", options.text, *flags, *arguments]
    return subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def resume(folder) -> None:
    train(out_dir=str(folder), resume=True, say=None)


@pytest.mark.parametrize("delay", [0.0, 0.05, 0.21, 0.5])
def test_killed_run_resumes_bit_for_bit(options, delay):
    """SIGKILL some time after the run has begun; what remains continues to the same weights."""
    options = replace(options, max_epochs=40, save_interval=2, dropout=0.1)
    train(options, out_dir=options.out_dir + "-whole", say=None)
    process = start(options)
    while not (Path(options.out_dir) / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.002)
    time.sleep(delay)
    process.kill()
    process.communicate()
    with contextlib.suppress(UsageError):  # it had finished already
        resume(options.out_dir)
    assert weights(options.out_dir) == weights(options.out_dir + "-whole")
    assert metrics(options.out_dir) == metrics(options.out_dir + "-whole")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_saves_and_resumes(options, number):
    options = replace(options, max_epochs=500, eval_interval=100_000)
    process = start(options)
    path = Path(options.out_dir) / "metrics.jsonl"
    while not (path.exists() and path.stat().st_size) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.startswith("charrnn-fast: stopped at step ")
    assert f"train --resume {options.out_dir}" in errors
    step = int(errors.split()[4].rstrip(";"))
    trainer = Trainer(replace(options), resume=True, say=None)
    assert trainer.progress.step == step > 0


def test_only_some_options_change_on_resume(options, trained):
    folder = str(trained.folder)
    with pytest.raises(UsageError, match="finished"):
        train(out_dir=folder, resume=True, say=None)
    with pytest.raises(UsageError, match="--hidden-size cannot change"):
        train(out_dir=folder, resume=True, hidden_size=8, say=None)
    longer = train(out_dir=folder, resume=True, max_epochs=3, backend="torch", say=None)
    assert longer.progress.step == longer.total_steps == 3 * len(longer.batches)


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


@pytest.mark.parametrize("rate", [1e4, 1e38])
def test_divergence_stops_and_keeps_the_last_good_checkpoint(options, rate):
    options = replace(
        options, nonlinearity="relu", max_epochs=50, grad_clip=0.0, warmup_iters=0, save_interval=1
    )
    trainer = Trainer(options, say=None)
    for _ in range(3):
        trainer.train_step()
    trainer._save()
    trainer.options = replace(options, learning_rate=rate)
    with pytest.raises(TrainingDiverged, match=r"loss became .* near step .*last good checkpoint"):
        trainer.run()
    tensors, about = read_tensors(Path(options.out_dir) / "last.safetensors")
    assert all(bool(v.isfinite().all()) for v in tensors.values())
    assert about["progress"]["step"] >= 3
    Trainer(options, resume=True, say=None)


def test_early_stopping(options):
    """A learning rate of almost nothing gains nothing: it stops after `patience` evaluations."""
    options = replace(options, learning_rate=1e-30, patience=2, max_epochs=50, weight_decay=0.0)
    progress = train(options, say=None).progress
    assert progress.finished
    assert progress.stale == 2
    assert progress.step == 3 * progress.best_step


def test_best_weights_are_kept(options):
    """model.safetensors holds the best evaluation, last.safetensors the last one."""
    trainer = Trainer(replace(options, max_epochs=4), say=None)
    losses = iter([2.0, 1.0, 3.0, 4.0])
    trainer.evaluate = lambda: next(losses)  # type: ignore[method-assign]
    progress = trainer.run()
    assert (progress.best_loss, progress.best_step) == (1.0, 2 * len(trainer.batches))
    header = weights(trainer.folder)[8:400].decode(errors="replace")
    assert f'\\"step\\": {progress.best_step}' in header


def test_learning_rate_schedule(options):
    options = replace(options, learning_rate=1.0, warmup_iters=4, min_lr=0.1)
    rates = [learning_rate(options, step, 104) for step in range(104)]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates[4] == 1.0
    assert rates[54] == pytest.approx(0.55)
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)
    assert sorted(rates[4:], reverse=True) == rates[4:]
    constant = replace(options, schedule="constant")
    assert learning_rate(constant, 100, 104) == 1.0


def test_clipping_is_that_of_pytorch():
    torch.manual_seed(0)
    for limit in (0.5, 1e6, 0.0):
        parameters = [nn.Parameter(torch.randn(s)) for s in ((300, 200), (7,), (3, 4))]
        others = [nn.Parameter(p.detach().clone()) for p in parameters]
        for p, q in zip(parameters, others, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        norm = nn.utils.clip_grad_norm_(others, limit or math.inf)
        torch.testing.assert_close(clip_gradients(parameters, limit), norm)
        for p, q in zip(parameters, others, strict=True):
            torch.testing.assert_close(p.grad, q.grad)


def test_nothing_held_out(options):
    trainer = train(options, val_fraction=0.0, max_epochs=1, say=None)
    assert math.isnan(trainer.progress.val_loss)
    assert trainer.progress.best_step == trainer.progress.step
    assert weights(trainer.folder)


def test_samples_while_training(options):
    lines: list[str] = []
    trainer = train(options, sample_length=30, say=lines.append)
    samples = [row["sample"] for row in metrics(trainer.folder) if "sample" in row]
    assert len(samples) == 3
    assert all(len(s) == 30 and s in lines for s in samples)


def test_short_text_is_an_error(options, text):
    text.write_text("too short")
    with pytest.raises(UsageError, match="too few for one sequence of 16"):
        train(options, say=None)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("batch_size", 0),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("val_fraction", 1.0),
        ("patience", -1),
    ],
)
def test_options_that_make_no_sense(options, name, value):
    with pytest.raises(UsageError, match=name.replace("_", "-")):
        replace(options, **{name: value})


def test_streaming_evaluation_is_exact(trained, backend):
    """In pieces or at once, by streams of one: the same loss."""
    ids = trained.held_out
    whole = evaluate(trained.model, ids, streams=1, seq_length=10_000)
    pieces, count = evaluate_stream(trained.model, [ids[:100], ids[100:101], ids[101:]])
    assert count == len(ids) - 1
    assert pieces == pytest.approx(whole, rel=1e-5)
    assert evaluate(trained.model, ids, streams=1, seq_length=13) == pytest.approx(whole, rel=1e-5)
    assert evaluate(trained.model, ids, streams=4, seq_length=16) == pytest.approx(whole, rel=0.2)


def test_two_processes_train_like_one(options):
    """torchrun with gloo: the same gradients, so the same losses; the first process writes."""
    options = replace(options, max_epochs=2, val_fraction=0.2)
    train(options, out_dir=options.out_dir + "-one", say=None)
    flags = [
        f"--{k.replace('_', '-')}={v}"
        for k, v in vars(options).items()
        if k != "text" and not isinstance(v, bool)
    ]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node=2", "-m", "charrnn_fast", "train", options.text, *flags]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=env, capture_output=True, timeout=120)
    one, two = metrics(options.out_dir + "-one"), metrics(options.out_dir)
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-3)
