"""What a run trains: the steps of a plain loop, the same for every seed, and what it keeps."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs import metrics, step_of, tensors_of, weights
from torch import nn

from charrnn_fast.charlm import Trainer, TrainingDiverged, sample, train
from charrnn_fast.charlm.checkpoint import read_tensors
from charrnn_fast.charlm.options import learning_rate


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


def test_learning_rate_schedule(options):
    constant = replace(options, learning_rate=1.0, warmup_iters=4, schedule="constant")
    options = replace(constant, schedule="cosine", min_lr=0.1)
    rates = [learning_rate(options, step, 104) for step in range(104)]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates[4] == 1.0
    assert rates[54] == pytest.approx(0.55)
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)
    assert sorted(rates[4:], reverse=True) == rates[4:]
    assert learning_rate(constant, 100, 104) == 1.0


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


@pytest.mark.parametrize(
    ("steps", "rise", "note"),
    [(1, 100, "for 1 of its steps"), (8, 4, "for 4 of its steps"), (9, 4, None), (2, 0, None)],
)
def test_a_run_whose_learning_rate_hardly_gets_up(options, steps, rise, note):
    """It is told when the run begins, as the samples of such a run are noise."""
    lines: list[str] = []
    train(options, max_iters=steps, warmup_iters=rise, say=lines.append)
    assert lines[0].endswith(f" {steps} step{'s' if steps > 1 else ''}")
    assert [line for line in lines if "short run" in line] == [
        line for line in lines if note is not None and note in line
    ]
    assert (note is None) == ("short run" not in lines[1])


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


def test_what_is_evaluated_and_kept_is_the_average(options):
    """And last.safetensors has both: the last weights to go on with, the average to use."""
    from charrnn_fast.charlm import evaluate, from_pretrained

    trainer = train(options, average=0.99, say=None)
    kept = from_pretrained(trainer.folder).model
    last = from_pretrained(trainer.folder, last=True).model
    averages = trainer.optimizer.averages()
    tensors, _ = read_tensors(trainer.folder / "last.safetensors", "model.")
    for name, parameter in last.named_parameters():
        assert torch.equal(parameter, averages[name])
        assert torch.equal(tensors[name], trainer.model.get_parameter(name))
        assert not torch.equal(tensors[name], averages[name])
    assert trainer.progress.best_step == trainer.progress.step
    assert evaluate(kept, trainer.held_out, options.batch_size) == trainer.progress.best_loss
    assert trainer.evaluate() == trainer.progress.best_loss
