"""Training: truncated backpropagation through time, for either backend, alone or in a group.

A run is a pure function of its options: batches, schedule and dropout depend on the step alone, and
every sum has a fixed order. So it can stop anywhere and go on from its last checkpoint to the same
weights, bit for bit, with any number of threads.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from . import checkpoint
from .data import PAD, LineBatches, load_corpus, prepare, text_hash
from .errors import TrainingDiverged, UsageError
from .evaluate import evaluate, evaluate_lines
from .group import Group
from .metrics import WriteRow, metrics_writer, trim_metrics
from .model import ModelConfig, bits, build_model
from .optimizer import AdamW
from .options import TrainOptions, learning_rate, resumed_options, use_threads
from .sample import sample
from .state import Progress, restore_state, save_state


class Trainer:
    """One run: ``Trainer(options).run()``, or step by step.

    With ``resume`` the run in ``options.out_dir`` goes on where its last checkpoint was written.
    ``say`` receives one line for each evaluation, or None for silence; ``on_loss`` receives
    the loss of each step, still on its device.
    """

    def __init__(
        self,
        options: TrainOptions,
        *,
        resume: bool = False,
        overwrite: bool = False,
        say: Callable[[str], None] | None = print,
        on_loss: Callable[[Tensor], None] | None = None,
    ) -> None:
        self.folder = Path(options.out_dir)
        self._check_folder(resume, overwrite)
        self.options, self.on_loss = options, on_loss
        self.group = Group(options.device)
        self.device = self.group.device
        self.say = say if say and self.group.rank == 0 else (lambda line: None)
        use_threads(options.threads)

        corpus = load_corpus(options.text, options.bytes)
        self.vocabulary = corpus.vocabulary
        self.text_hash = text_hash(corpus.ids)
        self.batches, self.held_out = prepare(options, self.vocabulary, corpus.ids)
        size = self.batches.batch_size
        if size < self.group.size or (not options.lines and size % self.group.size):
            raise UsageError(f"a batch of {size} does not divide by {self.group.size} processes")
        if size < options.batch_size:
            self.say(f"note: the text is short; the batch size is {size}")
        self.chars_per_step = 0 if options.lines else options.seq_length * self.batches.batch_size
        epoch = len(self.batches)
        self.total_steps = options.max_iters or options.max_epochs * epoch
        self.eval_interval = options.eval_interval or epoch

        self.config = ModelConfig(
            len(self.vocabulary),
            options.hidden_size,
            options.num_layers,
            options.nonlinearity,
            options.dropout,
        )
        self.model = build_model(
            self.config, options.backend, options.recurrent_init, options.seed
        ).to(self.device)
        torch.manual_seed(options.seed + self.group.rank)  # the dropout of each process
        self.optimizer = AdamW(self.model, options.weight_decay)
        self.call = self.group.parallel(self.model)
        self.state: Tensor | None = None  # [layers, B, H], carried from step to step
        self.window = torch.zeros((), device=self.device)  # sum of losses since the last log
        self.norm = torch.zeros((), device=self.device)  # of the last step's gradients
        self.rate = math.nan  # of the last step
        self.progress = Progress()
        with self._lock():
            if self.group.rank == 0:
                self._check_folder(resume, overwrite)  # another one may have begun meanwhile
            if resume:
                restore_state(self)
            if self.group.rank == 0:
                if resume:
                    trim_metrics(self.folder, self.progress.step)
                else:
                    for name in (checkpoint.CONFIG, checkpoint.LAST, checkpoint.MODEL):
                        (self.folder / name).unlink(missing_ok=True)  # of one that is overwritten
                    checkpoint.write_atomic(self.folder / checkpoint.METRICS, b"")
                # Of a resumed run as well: the next resumption goes on with what has changed now.
                settings = {**asdict(options), "text_sha256": self.text_hash}
                if options.text is not None:  # wherever one stands when the run goes on
                    settings["text"] = os.path.abspath(options.text)
                checkpoint.save_settings(self.folder, self.config, self.vocabulary, settings)

    def _lock(self) -> AbstractContextManager[None]:
        """One process writes a run: the first one of a group, and no other training."""
        return checkpoint.lock(self.folder) if self.group.rank == 0 else nullcontext()

    def _check_folder(self, resume: bool, overwrite: bool) -> None:
        exists = (self.folder / checkpoint.CONFIG).exists()
        if resume and not exists:
            raise UsageError(f"no run to resume in {self.folder}")
        if exists and not (resume or overwrite):
            raise UsageError(
                f"{self.folder} already holds a run; choose another --out-dir, or --resume it, "
                "or --overwrite it"
            )

    def train_step(self) -> Tensor:
        """One step; returns its mean loss in nats a character (this process's share of it)."""
        epoch, index = divmod(self.progress.step, len(self.batches))
        batch = self.batches.batch(epoch, index)
        tokens, targets = self.group.share(batch.tokens), self.group.share(batch.targets)
        if batch.fresh:
            self.state = None
        logits, state = self.call(tokens, self.state)
        self.state = state.detach()
        loss = F.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=PAD, reduction="sum"
        )
        self.optimizer.zero_grad()
        # The gradient of the mean; DistributedDataParallel averages what is a sum over processes.
        torch.autograd.backward(loss, loss.new_full((), self.group.size / batch.count))
        self.rate = learning_rate(self.options, self.progress.step, self.total_steps)
        self.norm = self.optimizer.step(self.rate, self.options.grad_clip)
        loss = loss.detach() / batch.count
        self.window += loss
        self.progress.window_steps += 1
        self.progress.step += 1
        return loss

    def evaluate(self) -> float:
        """Held-out loss in nats a character, or NaN where nothing is held out."""
        if self.held_out is None:
            return math.nan
        if isinstance(self.held_out, LineBatches):
            return evaluate_lines(self.model, self.held_out)[0]
        return evaluate(self.model, self.held_out, self.options.batch_size)

    def run(self) -> Progress:
        """Trains to the end, or until Ctrl-C or early stopping, and leaves a checkpoint.

        Raises TrainingDiverged when the loss is NaN, infinite, or ten times that of guessing.
        """
        with self._lock():
            return self._run()

    def _run(self) -> Progress:
        options, progress = self.options, self.progress
        chars = self.chars_per_step
        bar = tqdm(
            total=self.total_steps * (chars or 1),
            initial=progress.step * (chars or 1),
            unit="char" if chars else "step",
            unit_scale=True,
            disable=self.group.rank != 0 or not sys.stderr.isatty(),
            dynamic_ncols=True,
        )
        say = self.say
        if not bar.disable:
            self.say = bar.write
        self.model.train()
        with bar, interrupts() as interrupted, self._metrics() as write:
            mark = time.perf_counter()
            while progress.step < self.total_steps:
                loss = self.train_step()
                if self.on_loss:
                    self.on_loss(loss)
                bar.update(chars or 1)
                last = progress.step == self.total_steps
                log = progress.step % options.log_interval == 0
                due = progress.step % self.eval_interval == 0
                save = options.save_interval and progress.step % options.save_interval == 0
                stop = bool(interrupted) and self.group.size == 1
                if not (log or due or save or last or stop):
                    continue
                stop = self.group.agree(bool(interrupted))
                now = time.perf_counter()
                progress.seconds += now - mark
                progress.window_seconds += now - mark
                self._check(write, log, bar)
                if due or last:
                    self._keep_best(write)
                    stop = stop or bool(options.patience and progress.stale >= options.patience)
                    progress.finished = last or (stop and not interrupted)
                if due or last or save or stop:
                    self._check_weights()
                    self.save()
                mark = time.perf_counter()
                if stop:
                    break
        self.say = say
        if self.group.agree(bool(interrupted)) and not progress.finished:
            raise KeyboardInterrupt(
                f"stopped at step {progress.step}; "
                f"go on with: charrnn-fast train --resume {self.folder}"
            )
        return progress

    def _check(self, write: WriteRow, log: bool, bar: Any) -> None:
        """Looks at the losses since the last log line, and writes one when it is time to."""
        progress = self.progress
        steps = progress.window_steps
        if not steps:
            return
        mean, norm = self.group.sum(self.window).item() / steps, self.norm.item()
        if not (self._is_sane(mean) and norm < math.inf):
            self._diverged(f"the loss became {mean:.3g} nats, with a gradient of norm {norm:.3g},")
        progress.train_loss = mean
        if not log:
            return
        row: dict[str, Any] = {"train_loss": mean, "grad_norm": norm, "lr": self.rate}
        row["chars_per_second"] = round(self.chars_per_step * steps / progress.window_seconds)
        write(self._row(row))
        bar.set_postfix(loss=f"{mean:.3f}", bpc=f"{bits(progress.val_loss):.3f}", refresh=False)
        self.window.zero_()
        progress.window_steps, progress.window_seconds = 0, 0.0

    @torch.no_grad()
    def _check_weights(self) -> None:
        """Weights that the last step has ruined are not saved: they must predict one more batch.

        The losses so far are those of the weights before it.
        """
        batch = self.batches.batch(*divmod(self.progress.step, len(self.batches)))
        self.model.eval()
        logits, _ = self.model(batch.tokens.to(self.device))
        self.model.train()
        targets = batch.targets.to(self.device).flatten()
        loss = F.cross_entropy(logits.flatten(0, 1), targets, ignore_index=PAD).item()
        if not self._is_sane(loss):
            self._diverged(f"the loss became {loss:.3g} nats")

    def _is_sane(self, loss: float) -> bool:
        """Whether a loss is a number, and at most ten times that of guessing."""
        return loss <= 10 * max(1.0, math.log(len(self.vocabulary)))

    def _diverged(self, what: str) -> NoReturn:
        kept = (self.folder / checkpoint.LAST).exists()
        raise TrainingDiverged(
            f"{what} near step {self.progress.step}; "
            + (f"the last good checkpoint is in {self.folder}; " if kept else "")
            + "try a smaller --learning-rate or --grad-clip"
        )

    def _keep_best(self, write: WriteRow) -> None:
        """Evaluates, tells, and keeps the weights if they are the best so far."""
        progress = self.progress
        progress.val_loss = loss = self.evaluate()
        if self.held_out is None:  # the last weights are the best ones
            loss = progress.best_loss = math.inf
        elif not math.isfinite(loss):
            self._diverged(f"the held-out loss became {loss}")
        else:
            write(self._row({"val_loss": loss, "val_bpc": bits(loss)}))
        epoch = progress.step / len(self.batches)
        self.say(
            f"epoch {epoch:.4g}  step {progress.step}  train {progress.train_loss:.4f} nats  "
            f"held out {progress.val_loss:.4f} nats, {bits(progress.val_loss):.4f} bits/character"
        )
        if loss < progress.best_loss or self.held_out is None:
            progress.best_loss, progress.best_step, progress.stale = loss, progress.step, 0
            if self.group.rank == 0:
                about = {"step": progress.step, "val_loss": progress.val_loss}
                checkpoint.write_tensors(
                    self.folder / checkpoint.MODEL, self.model.state_dict(), about
                )
        else:
            progress.stale += 1
        if self.options.sample_length and self.group.rank == 0:
            text = sample(
                self.model, self.vocabulary, "", self.options.sample_length, seed=self.options.seed
            )
            write(self._row({"sample": text[0]}))
            self.say(text[0])

    def _metrics(self) -> AbstractContextManager[WriteRow]:
        if self.group.rank:
            return nullcontext(lambda row: None)
        return metrics_writer(self.folder, self.progress.step, self.options.tensorboard)

    def _row(self, values: dict[str, Any]) -> dict[str, Any]:
        step, seconds = self.progress.step, round(self.progress.seconds, 3)
        return {
            "step": step,
            "epoch": round(step / len(self.batches), 4),
            **values,
            "seconds": seconds,
        }

    def save(self) -> None:
        """Writes the training state; every process of a group calls it."""
        save_state(self)

    def leave_group(self) -> None:
        """The end of a process under torchrun, after which it cannot train; otherwise nothing."""
        self.call = self.model
        self.group.leave()


def train(
    options: TrainOptions | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None] | None = print,
    **changes: Any,
) -> Trainer:
    """Trains a model and returns the finished Trainer: ``.model``, ``.vocabulary``, ``.progress``.

    Options come as TrainOptions or by name: ``train(text="my.txt", out_dir="runs/a")``.
    """
    options = replace(options or TrainOptions(), **changes)
    if resume:
        options = resumed_options(options.out_dir, changes)
    trainer = Trainer(options, resume=resume, overwrite=overwrite, say=say)
    trainer.run()
    return trainer


@contextmanager
def interrupts() -> Iterator[list[int]]:
    """Collects Ctrl-C and SIGTERM instead of stopping there; a second Ctrl-C stops at once."""
    seen: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    previous: dict[int, Any] = {}
    try:
        for number in (int(signal.SIGINT), int(signal.SIGTERM)):
            previous[number] = signal.signal(number, note)
    except ValueError:  # not the main thread: whoever owns the signals keeps them
        pass
    try:
        yield seen
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
