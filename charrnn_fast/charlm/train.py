"""Training: truncated backpropagation through time, for either backend, alone or in a group.

A run is a pure function of its options: batches, schedule and dropout depend on the step alone, and
every sum has a fixed order. So it can stop anywhere and go on from its last checkpoint to the same
weights, bit for bit, with any number of threads.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from . import checkpoint
from .data import PAD, LineBatches, load_corpus, prepare, text_hash
from .errors import TrainingDiverged, UsageError
from .evaluate import evaluate, evaluate_lines
from .finetune import adapt, known_vocabulary, started_options, what_became
from .group import Group, use_kernels
from .interrupts import interrupts
from .metrics import WriteRow, check_tensorboard, metrics_writer
from .model import ModelConfig, State, bits, build_model
from .optimizer import AdamW
from .options import TrainOptions, learning_rate, resumed_options, unused, use_threads
from .run import Run
from .sample import sample
from .state import Progress, TrainingState
from .vocabulary import Vocabulary

BYTES = 4  # of a weight


class Trainer:
    """One run: ``Trainer(options).run()``, or step by step.

    Args:
        options: everything that the training depends on.
        resume: whether the run in ``options.out_dir`` goes on from its last checkpoint.
        overwrite: whether a run that is there already is replaced.
        say: is given one line for each evaluation; None: silence.
        on_loss: is given the loss of each step, still on its device.

    Attributes:
        model: the :class:`CharRNN` that learns.
        vocabulary: of the text.
        progress: counters and losses, ``progress.best_loss`` among them: nats a character, held
            out.

    Raises:
        UsageError: the options do not go together, with the text or with the run that goes on.
        MemoryError: the machine has not the memory that the weights take.

    Example:
        >>> import pathlib, tempfile
        >>> from charrnn_fast.charlm import TrainOptions, Trainer
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "text")
        ...     _ = path.write_text("all work and no play " * 50, encoding="utf-8")
        ...     options = TrainOptions(
        ...         text=path, out_dir=folder + "/run", hidden_size=16, batch_size=4,
        ...         seq_length=16)
        ...     trainer = Trainer(options, say=None)
        ...     first = trainer.train_step()
        >>> trainer.progress.step, first.shape
        (1, torch.Size([]))
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
        if resume and not overwrite:
            options = resumed_options(options.out_dir, vars(options))
        self.options, self.on_loss = options, on_loss
        if options.tensorboard:
            check_tensorboard()
        use_kernels()
        self.group = Group(options.device)
        first = self.group.rank == 0
        self.home = Run(options.out_dir, resume=resume, overwrite=overwrite, writes=first)
        self.folder, self.device = self.home.folder, self.group.device
        self.say = say if say and first else (lambda line: None)
        use_threads(options.threads)
        for note in unused(options):
            self.say(f"note: {note}")

        known, source = self._known(resume)
        corpus = load_corpus(options.text, options.bytes, known)
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

        self.config = options.model_config(len(self.vocabulary))
        check_memory(self.config)
        self.model = build_model(
            self.config,
            options.backend,
            options.recurrent_init,
            options.seed,
            options.forget_bias,
            options.input_scale,
        )
        if source is not None and known is not None:
            adapt(self.model, self.vocabulary, source, known)
            seen = Vocabulary(map(self.vocabulary.characters.__getitem__, np.unique(corpus.ids)))
            about = what_became(self.vocabulary, known, seen)
            self.say(f"begins with the weights of {options.init_from}: {about}")
        self.model.to(self.device)
        torch.manual_seed(options.seed + self.group.rank)  # the dropout of each process
        self.optimizer = AdamW(
            self.model, options.weight_decay, (options.beta1, options.beta2), options.average
        )
        self.call = self.group.parallel(self.model)
        self.state: State | None = None  # carried from step to step
        self.window = torch.zeros((), device=self.device)  # sum of losses since the last log
        self.norm = torch.zeros((), device=self.device)  # of the last step's gradients
        self.rate = math.nan  # of the last step
        self.progress = Progress()
        if resume:
            self._restore()

    def _known(self, resume: bool) -> tuple[Vocabulary | None, dict[str, Tensor] | None]:
        """The vocabulary and weights that a run begins with, unless it starts from scratch."""
        options = self.options
        if resume and (self.folder / checkpoint.LAST).exists():
            return checkpoint.read_settings(self.folder)[1], None
        if options.init_from is None:
            return None, None
        if os.path.realpath(options.init_from) == os.path.realpath(self.folder):
            raise UsageError(f"--init-from and --out-dir are both {self.folder}: choose another")
        source = checkpoint.read_weights(Path(options.init_from))
        return known_vocabulary(options, source.config, source.vocabulary), source.tensors

    def train_step(self) -> Tensor:
        """One step; returns its mean loss in nats a character (this process's share of it)."""
        epoch, index = divmod(self.progress.step, len(self.batches))
        batch = self.batches.batch(epoch, index)
        tokens, targets = self.group.share(batch.tokens), self.group.share(batch.targets)
        if batch.fresh:
            self.state = None
        logits, state = self.call(tokens, self.state)
        self.state = tuple(part.detach() for part in state)
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
        """The held-out loss in nats a character, of the averaged weights where an average is kept;
        NaN where nothing is held out."""
        if self.held_out is None:
            return math.nan
        with self.optimizer.averaged():
            if isinstance(self.held_out, LineBatches):
                return evaluate_lines(self.model, self.held_out)[0]
            return evaluate(self.model, self.held_out, self.options.batch_size)

    def run(self) -> Progress:
        """Trains to the end, or until Ctrl-C or early stopping, and leaves a checkpoint.

        Raises:
            TrainingDiverged: the loss became NaN, infinite, or ten times that of guessing.
            KeyboardInterrupt: after Ctrl-C, once a checkpoint is written.
        """
        with self._begun():
            self.say(
                f"{self.config.describe()}: {self.config.weights:,} weights, "
                f"{len(self.vocabulary)} characters, "
                f"{self.total_steps} step{'s' if self.total_steps > 1 else ''}"
            )
            rise = self.options.warmup_iters
            if self.total_steps <= 2 * rise:
                self.say(
                    f"a short run: for {min(rise, self.total_steps)} of its steps the learning "
                    "rate still rises; a smaller --batch-size or more --max-epochs make more "
                    "steps, fewer --warmup-iters a faster rise"
                )
            return self._run()

    def _begun(self) -> AbstractContextManager[None]:
        """The lock on the run's folder, which holds its settings from here on."""
        settings = {**asdict(self.options), "text_sha256": self.text_hash}
        return self.home.begun(self.config, self.vocabulary, settings, self.progress.step)

    def _run(self) -> Progress:
        options, progress = self.options, self.progress
        chars = self.chars_per_step
        bar = tqdm(
            total=self.total_steps * (chars or 1),
            initial=progress.step * (chars or 1),
            unit="char" if chars else "step",
            unit_scale=True,
            desc=self.config.cell,
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
                f"go on with: {self.home.command('train --resume')}"
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
        shown = {"loss": f"{mean:.3f}"}
        if math.isfinite(progress.val_loss):
            shown["bpc"] = f"{bits(progress.val_loss):.3f}"
        bar.set_postfix(shown, refresh=False)
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
        with self.optimizer.averaged():
            loss = self.evaluate()
            best = self._tell(loss, write)
            if best and self.group.rank == 0:
                about: dict[str, Any] = {"step": self.progress.step}
                about |= {} if self.held_out is None else {"val_loss": loss}
                path = self.folder / checkpoint.MODEL
                checkpoint.write_tensors(path, self.model.state_dict(), about)
            if self.options.sample_length and self.group.rank == 0:
                length, seed = self.options.sample_length, self.options.seed
                text = sample(self.model, self.vocabulary, "", length, seed=seed)
                write(self._row({"sample": text[0]}))
                self.say(text[0])

    def _tell(self, loss: float, write: WriteRow) -> bool:
        """Says how a step did, and whether it is the best so far; without a held-out part that is
        always the last one."""
        progress = self.progress
        progress.val_loss = loss
        line = (
            f"epoch {progress.step / len(self.batches):.4g}  step {progress.step}  "
            f"train {progress.train_loss:.4f} nats"
        )
        if self.held_out is None:
            best = True
        elif not math.isfinite(loss):
            self._diverged(f"the held-out loss became {loss}")
        else:
            best = loss < progress.best_loss
            write(self._row({"val_loss": loss, "val_bpc": bits(loss)}))
            line += f"  held out {loss:.4f} nats, {bits(loss):.4f} bits/character"
        self.say(line)
        if best:
            if self.held_out is not None:
                progress.best_loss = loss
            progress.best_step, progress.stale = progress.step, 0
        else:
            progress.stale += 1
        return best

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
        with self._begun():
            state = self._capture()
            if self.group.rank == 0:
                state.write(self.folder / checkpoint.LAST)

    def _capture(self) -> TrainingState:
        gather = self.group.gather
        state = TrainingState(
            self.progress,
            self.text_hash,
            dict(self.model.state_dict()),
            self.optimizer.state(),
            average=self.optimizer.averages(),
            window=torch.stack(gather(self.window)),
            random=torch.stack(gather(torch.get_rng_state())).cpu(),
        )
        if self.device.type == "cuda":
            mine = torch.cuda.get_rng_state(self.device)
            state.random_cuda = torch.stack(gather(mine)).cpu()
        if self.state is not None and not self.options.lines:
            # Process r has the sequences r, r + size, ...: interleave them again.
            state.carried = tuple(
                torch.stack(gather(part), dim=2).flatten(1, 2) for part in self.state
            )
        return state

    def _restore(self) -> None:
        """Goes on from the last checkpoint, if any was written."""
        path, group, options = self.folder / checkpoint.LAST, self.group, self.options
        if not path.exists():  # stopped before the first checkpoint: the beginning is the same
            return
        like = self._capture()
        if not options.lines:
            shape = (self.config.num_layers, self.batches.batch_size, self.config.hidden_size)
            like.carried = tuple(torch.empty(shape) for _ in range(self.config.states))
        saved = TrainingState.read(path, self.config, like)
        progress = saved.progress
        if progress.step >= self.total_steps:
            raise UsageError(
                f"{self.folder} is finished at step {progress.step}; to go on, give more "
                + ("--max-iters" if options.max_iters else "--max-epochs")
            )
        self.model.load_state_dict(saved.model)
        self.optimizer.load_state(saved.optimizer)
        self.optimizer.load_averages(saved.average)
        if group.size == len(saved.random):
            torch.set_rng_state(saved.random[group.rank].clone())
            if saved.random_cuda is not None and self.device.type == "cuda":
                torch.cuda.set_rng_state(saved.random_cuda[group.rank], self.device)
            self.window.copy_(saved.window[group.rank])
        elif group.rank == 0:
            self.window.copy_(saved.window.sum())
        if saved.carried:
            self.state = tuple(
                part[:, group.rank :: group.size].contiguous().to(self.device)
                for part in saved.carried
            )
        progress.finished = False  # it had stopped early, perhaps
        self.progress = progress

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
    """Trains a model and returns the finished :class:`Trainer`.

    Args:
        options: everything that the training depends on; None: the defaults.
        resume: whether the run in ``out_dir`` goes on from its last checkpoint.
        overwrite: whether a run that is there already is replaced.
        say: is given one line for each evaluation; None: silence.
        **changes: options by name: ``train(text="my.txt", out_dir="runs/a")``.

    Raises:
        UsageError: an option makes no sense, or there is a run in ``out_dir``.
        TypeError: an option is unknown.
        TrainingDiverged: the loss became NaN, infinite, or ten times that of guessing.
        KeyboardInterrupt: after Ctrl-C, once a checkpoint is written.

    Example:
        >>> import pathlib, tempfile
        >>> from charrnn_fast.charlm import train
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "text")
        ...     _ = path.write_text("all work and no play " * 50, encoding="utf-8")
        ...     trainer = train(
        ...         text=path, out_dir=folder + "/run", hidden_size=16, batch_size=4,
        ...         seq_length=16, max_iters=5, say=None)
        >>> trainer.progress.step, trainer.progress.finished
        (5, True)
    """
    if resume:
        given = {**(vars(options) if options else {}), **changes}
        options = resumed_options(given.get("out_dir", TrainOptions().out_dir), given)
    else:
        options = replace(options, **changes) if options else started_options(changes)
    trainer = Trainer(options, resume=resume, overwrite=overwrite, say=say)
    trainer.run()
    return trainer


def check_memory(config: ModelConfig) -> None:
    """MemoryError for a model that this machine has not the memory to train."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if 4 * BYTES * config.weights > machine:  # weights, gradients, and Adam's two moments
        raise MemoryError
