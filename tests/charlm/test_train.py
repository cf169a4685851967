from __future__ import annotations

import json
import math
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
from runs import metrics, step_of, tensors_of, weights
from torch import nn

from charrnn_fast.charlm import (
    Trainer,
    TrainingDiverged,
    UsageError,
    evaluate,
    from_pretrained,
    sample,
    train,
)
from charrnn_fast.charlm.checkpoint import read_tensors, write_tensors
from charrnn_fast.charlm.evaluate import evaluate_stream
from charrnn_fast.charlm.group import Group
from charrnn_fast.charlm.options import learning_rate, resumed_options
from charrnn_fast.charlm.train import interrupts


def test_it_learns(options, backend):
    trainer = train(replace(options, backend=backend), say=None)
    rows = metrics(trainer.folder)
    losses = [row["train_loss"] for row in rows if "train_loss" in row]
    held_out = [row["val_loss"] for row in rows if "val_loss" in row]
    assert losses[0] > 2.5 > 2.0 > losses[-1]
    assert len(held_out) == 3
    assert trainer.progress.best_loss == min(held_out)
    assert trainer.progress.finished


def test_a_run_trains(options):
    """With dropout, whatever the mode in which it finds its model."""
    models = []
    for training in (True, False):
        changes = {"dropout": 0.5, "max_epochs": 1, "out_dir": f"{options.out_dir}-{training}"}
        trainer = Trainer(replace(options, **changes), say=None)
        trainer.model.train(training)
        trainer.run()
        models.append(weights(trainer.folder))
    assert tensors_of(models[0]) == tensors_of(models[1])


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


def test_same_run_for_any_number_of_threads(options):
    """At the size of the defaults, where matrix products are split: bit for bit, 1 to 7 threads.

    For our module only: nn.RNN multiplies as its library pleases.
    """
    options = replace(options, hidden_size=128, batch_size=50, seq_length=50, max_iters=4)
    Path(options.text).write_text("".join(map(chr, range(40, 110))) * 150)
    runs = []
    for threads in (1, 2, 3, 4, 7):
        folder = f"{options.out_dir}-{threads}"
        train(options, threads=threads, out_dir=folder, say=None)
        runs.append((weights(folder), metrics(folder)))
    assert all(run == runs[0] for run in runs)


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


def start(options, *arguments) -> subprocess.Popen:
    flags = [
        f"--{k.replace('_', '-')}={v}"
        for k, v in vars(options).items()
        if k != "text" and not isinstance(v, bool)
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


@pytest.mark.parametrize("rate", [1e4, 1e38])
def test_divergence_stops_and_keeps_the_last_good_checkpoint(options, rate):
    options = replace(
        options, nonlinearity="relu", max_epochs=50, grad_clip=0.0, warmup_iters=0, save_interval=1
    )
    trainer = Trainer(options, say=None)
    for _ in range(3):
        trainer.train_step()
    trainer.save()
    trainer.options = replace(options, learning_rate=rate)
    with pytest.raises(TrainingDiverged, match=r"loss became .* near step .*last good checkpoint"):
        trainer.run()
    tensors, about = read_tensors(Path(options.out_dir) / "last.safetensors")
    assert all(bool(v.isfinite().all()) for v in tensors.values())
    assert about["progress"]["step"] >= 3
    Trainer(options, resume=True, say=None)


@pytest.mark.parametrize("rate", [1e4, 1e38, math.inf])
def test_a_step_that_ruins_the_weights_is_not_saved(options, rate):
    """The loss of a step is that of the weights before it: the weights after it are tried, too."""
    options = replace(options, nonlinearity="relu", warmup_iters=0, save_interval=1, max_iters=9)
    trainer = Trainer(options, say=None)
    losses = []

    def ruin(loss):
        losses.append(loss)
        if len(losses) == 3:
            with torch.no_grad():
                trainer.model.head.weight.mul_(rate)

    trainer.on_loss = ruin
    with pytest.raises(TrainingDiverged, match=r"near step 3; the last good checkpoint is in"):
        trainer.run()
    assert step_of(trainer.folder) == 2
    assert train(out_dir=options.out_dir, resume=True, say=None).progress.step == 9


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


def test_early_stopping(options):
    """A learning rate of almost nothing gains nothing: it stops after `patience` evaluations."""
    options = replace(options, learning_rate=1e-30, patience=2, max_epochs=50, weight_decay=0.0)
    progress = train(options, say=None).progress
    assert progress.finished
    assert progress.stale == 2
    assert progress.step == 3 * progress.best_step


def test_a_gain_begins_the_patience_anew(options):
    trainer = Trainer(replace(options, max_epochs=9, patience=2), say=None)
    losses = iter([3.0, 4.0, 2.0, 3.0, 2.5, 1.0])
    trainer.evaluate = lambda: next(losses)  # type: ignore[method-assign]
    progress = trainer.run()
    assert (progress.step, progress.best_step) == tuple(n * len(trainer.batches) for n in (5, 3))


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
    again = train(options, sample_length=30, out_dir=options.out_dir + "-again", say=None)
    assert metrics(again.folder) == metrics(trainer.folder)


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
        ("min_lr", math.inf),
        ("weight_decay", math.nan),
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


@pytest.mark.parametrize("lines", [False, True])
def test_evaluation_knows_no_dropout(options, lines):
    """Also of a model that is being trained, which goes on in its mode."""
    trainer = Trainer(replace(options, dropout=0.9, lines=lines), say=None)
    trainer.model.train()
    while_training = trainer.evaluate()
    assert trainer.model.training
    trainer.model.eval()
    assert while_training == trainer.evaluate()
    assert not trainer.model.training


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_seeds_that_no_generator_takes(options, seed):
    with pytest.raises(UsageError, match=rf"seed must be in .*, not {seed}"):
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


def test_run_goes_on_from_anywhere(options, text, tmp_path, monkeypatch):
    """A text that was named from one folder is found from another one."""
    monkeypatch.chdir(text.parent)
    train(options, text=text.name, max_epochs=1, say=None)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert train(out_dir=options.out_dir, resume=True, max_epochs=2, say=None).progress.finished


def test_steps_are_those_of_a_plain_loop(options):
    """With the schedule, clipping, weight decay and the carried state, each where it belongs."""
    changes = {"warmup_iters": 3, "grad_clip": 0.05, "weight_decay": 3.0, "min_lr": 1e-3}
    trainer = Trainer(replace(options, max_iters=8, **changes), say=None)
    V = len(trainer.vocabulary)
    rnn, head = nn.RNN(V, 16, 2), nn.Linear(16, V)
    parameters = [*rnn.parameters(), *head.parameters()]
    for p, q in zip(parameters, trainer.model.parameters(), strict=True):
        p.data.copy_(q)
    optimizer = torch.optim.AdamW(parameters, weight_decay=3.0)
    state = None
    for step, rate in enumerate([0.0025, 0.005, 0.0075, 0.01, 0.01 - 0.009 * 0.0954915]):
        batch = trainer.batches.batch(0, step)
        y, state = rnn(nn.functional.one_hot(batch.tokens, V).float(), state)
        loss = nn.functional.cross_entropy(head(y).flatten(0, 1), batch.targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        assert nn.utils.clip_grad_norm_(parameters, 0.05) > 0.1
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        state = state.detach()
        torch.testing.assert_close(trainer.train_step(), loss.detach(), rtol=1e-5, atol=0)
        assert trainer.rate == pytest.approx(rate, rel=1e-6)
    for p, q in zip(parameters, trainer.model.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-3, atol=1e-5)


def test_a_second_interrupt_stops_at_once():
    """The first one is noted; afterwards the signals are whose they were."""
    before = signal.getsignal(signal.SIGINT)
    with interrupts() as seen:
        signal.raise_signal(signal.SIGINT)
        assert seen == [signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


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


def test_run_that_goes_on_is_not_finished(options, trained):
    """A Ctrl-C in it is told as one, although the run had come to its end before."""
    assert trained.progress.finished
    longer = resumed_options(options.out_dir, {"max_epochs": 9})
    trainer = Trainer(longer, resume=True, say=None)
    trainer.on_loss = lambda loss: signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="go on with: charrnn-fast train --resume"):
        trainer.run()
