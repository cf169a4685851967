"""Training: truncated backpropagation through time, for either backend, alone or in a group.

A run is a pure function of its options: batches, schedule and dropout depend on the step alone, and
every sum has a fixed order. So it can stop anywhere and go on from its last checkpoint to the same
weights, bit for bit, with any number of threads.
"""

# ruff: noqa: RUF009 (option() is dataclasses.field with less to write)
from __future__ import annotations

import gc
import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NoReturn

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from . import checkpoint
from .data import PAD, Batches, LineBatches, StreamBatches, load_corpus, split, text_hash
from .errors import TrainingDiverged, UsageError
from .evaluate import evaluate, evaluate_lines
from .model import Backend, ModelConfig, Nonlinearity, RecurrentInit, bits, build_model
from .sample import sample
from .vocabulary import Ids, Vocabulary


def option(default: Any, help: str, *aliases: str, live: bool = False) -> Any:
    """A field of TrainOptions. Live ones may change when a run is resumed."""
    return field(default=default, metadata={"help": help, "aliases": aliases, "live": live})


@dataclass(frozen=True)
class TrainOptions:
    """Everything a training depends on. The command line and ``--config`` have the same names."""

    text: str | None = option(
        None, "UTF-8 file to learn from (without: the built-in text)", live=True
    )
    out_dir: str = option("out", "folder for the run", "checkpoint_dir")
    backend: Backend = option("fast", "charrnn_fast.RNN or torch.nn.RNN", live=True)
    bytes: bool = option(False, "learn bytes instead of characters: any file will do")
    lines: bool = option(False, "every line is an example of its own")
    hidden_size: int = option(128, "hidden units of a layer", "rnn_size", "n_embd")
    num_layers: int = option(2, "recurrent layers", "n_layer")
    nonlinearity: Nonlinearity = option("tanh", "activation of the recurrent layers")
    dropout: float = option(0.0, "dropout after each layer")
    recurrent_init: RecurrentInit = option("orthogonal", "how recurrent weights begin")
    batch_size: int = option(50, "sequences side by side")
    seq_length: int = option(50, "characters that gradients flow through", "block_size")
    max_epochs: int = option(15, "passes over the text", "epochs", live=True)
    max_iters: int = option(0, "steps, in place of epochs (0: by epochs)", live=True)
    learning_rate: float = option(4e-3, "peak learning rate", "lr")
    schedule: Literal["cosine", "constant"] = option("cosine", "learning rate after warm-up")
    min_lr: float = option(0.0, "learning rate at the end of the cosine")
    warmup_iters: int = option(100, "steps in which the learning rate rises from 0")
    weight_decay: float = option(0.0, "decoupled weight decay")
    grad_clip: float = option(5.0, "greatest norm of the gradient (0: no limit)")
    val_fraction: float = option(0.1, "part of the text held out, at its end")
    patience: int = option(0, "stop after so many evaluations without gain (0: never)", live=True)
    eval_interval: int = option(0, "steps between evaluations (0: each epoch)")
    save_interval: int = option(0, "steps between further checkpoints (0: none)", live=True)
    log_interval: int = option(50, "steps between lines of metrics.jsonl")
    sample_length: int = option(0, "characters to print at each evaluation (0: none)", live=True)
    seed: int = option(1337, "of weights, dropout and order")
    threads: int = option(0, "threads to compute with (0: PyTorch's choice)", live=True)
    device: str = option("cpu", "device to train on", live=True)
    tensorboard: bool = option(False, "also write TensorBoard events", live=True)

    def __post_init__(self) -> None:
        positive = ("batch_size", "seq_length", "max_epochs", "log_interval")
        whole = ("max_iters", "warmup_iters", "patience", "eval_interval", "save_interval")
        for name in positive:
            if getattr(self, name) < 1:
                raise UsageError(f"--{name.replace('_', '-')} must be at least 1")
        for name in (*whole, "threads", "grad_clip", "weight_decay", "min_lr", "sample_length"):
            if not getattr(self, name) >= 0:
                raise UsageError(f"--{name.replace('_', '-')} must not be negative")
        if not 0 < self.learning_rate < math.inf:
            raise UsageError("--learning-rate must be positive")
        if not 0 <= self.val_fraction < 1:
            raise UsageError("--val-fraction must be in [0, 1)")


@dataclass
class Progress:
    """The counters of a run: with the tensors of the training state, all that resuming needs."""

    step: int = 0
    best_loss: float = math.inf  # nats, held out (of the last training window without held-out)
    best_step: int = 0
    stale: int = 0  # evaluations since the best one
    val_loss: float = math.nan
    train_loss: float = math.nan  # mean since the last line of metrics
    window_steps: int = 0
    window_seconds: float = 0.0
    seconds: float = 0.0  # spent in training steps
    finished: bool = False


def learning_rate(options: TrainOptions, step: int, total: int) -> float:
    """The rate of step 0 <= step < total: a linear rise, then a half cosine or a constant."""
    if step < options.warmup_iters:
        return options.learning_rate * (step + 1) / (options.warmup_iters + 1)
    if options.schedule == "constant":
        return options.learning_rate
    done = (step - options.warmup_iters) / max(1, total - options.warmup_iters)
    fall = 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    return options.min_lr + fall * (options.learning_rate - options.min_lr)


def clip_gradients(parameters: list[nn.Parameter], limit: float) -> Tensor:
    """Scales all gradients so that their norm is at most ``limit`` (0: none); returns the norm.

    Norms are taken row by row: a reduction of a whole matrix would add in an order that depends on
    the number of threads.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    rows = [torch.linalg.vector_norm(g, dim=-1).flatten() for g in gradients]
    norm: Tensor = torch.linalg.vector_norm(torch.cat(rows))
    if limit:
        torch._foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp(max=1.0))
    return norm


def prepare(
    options: TrainOptions, vocabulary: Vocabulary, ids: Ids
) -> tuple[Batches, Ids | LineBatches | None]:
    """Batches to train on, and what is held out; None where that is too short to predict."""
    train, held_out = split(ids, options.val_fraction)
    if not options.lines:
        batches = StreamBatches(train, options.batch_size, options.seq_length)
        return batches, held_out if len(held_out) > 1 else None
    end = vocabulary.characters.find("\n")
    if end < 0:
        raise UsageError("--lines needs a text with line breaks")
    cut = len(train) - int((train[::-1] == end).argmax()) if end in train else len(train)
    lines = LineBatches(ids[:cut], options.batch_size, end, options.seed)
    rest = ids[cut:]
    return lines, LineBatches(rest, options.batch_size, end, 0) if (rest != end).any() else None


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
        self.rank, self.world = join_group(options.device)
        self.say = say if say and self.rank == 0 else (lambda line: None)
        if options.threads:
            torch.set_num_threads(options.threads)
        self.device = torch.device(options.device)
        if self.device.type == "cuda":
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))

        corpus = load_corpus(options.text, options.bytes)
        self.vocabulary = corpus.vocabulary
        self.text_hash = text_hash(corpus.ids)
        self.batches, self.held_out = prepare(options, self.vocabulary, corpus.ids)
        size = self.batches.batch_size
        if size < self.world or (not options.lines and size % self.world):
            raise UsageError(f"a batch of {size} does not divide by {self.world} processes")
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
        torch.manual_seed(options.seed + self.rank)  # the dropout of each process
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=options.learning_rate,
            weight_decay=options.weight_decay,
            fused=True,
        )
        self.call: nn.Module = self.model
        if self.world > 1:
            self.call = nn.parallel.DistributedDataParallel(self.model)
        self.state: Tensor | None = None  # [layers, B, H], carried from step to step
        self.window = torch.zeros((), device=self.device)  # sum of losses since the last log
        self.norm = torch.zeros((), device=self.device)
        self.progress = Progress()
        with self._lock():
            if self.rank == 0:
                self._check_folder(resume, overwrite)  # another one may have begun meanwhile
            if resume:
                self._restore()
            if self.rank == 0:
                if not resume:
                    for name in (checkpoint.CONFIG, checkpoint.LAST, checkpoint.MODEL):
                        (self.folder / name).unlink(missing_ok=True)  # of one that is overwritten
                    checkpoint.write_atomic(self.folder / checkpoint.METRICS, b"")
                # Of a resumed run as well: the next resumption goes on with what has changed now.
                settings = {**asdict(options), "text_sha256": self.text_hash}
                checkpoint.save_settings(self.folder, self.config, self.vocabulary, settings)

    def _lock(self) -> AbstractContextManager[None]:
        """One process writes a run: the first one of a group, and no other training."""
        return checkpoint.lock(self.folder) if self.rank == 0 else nullcontext()

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
        mine = slice(self.rank, None, self.world)  # this process's sequences
        tokens = batch.tokens[:, mine].to(self.device)
        targets = batch.targets[:, mine].to(self.device)
        if batch.fresh:
            self.state = None
        logits, state = self.call(tokens, self.state)
        self.state = state.detach()
        loss = F.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=PAD, reduction="sum"
        )
        loss = loss * (1 / batch.count)
        self.optimizer.zero_grad()
        # DistributedDataParallel averages over processes; the loss is a sum over them.
        torch.autograd.backward(loss * self.world if self.world > 1 else loss)
        self.norm = clip_gradients(self.parameters, self.options.grad_clip)
        rate = learning_rate(self.options, self.progress.step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        loss = loss.detach()
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
            disable=self.rank != 0 or not sys.stderr.isatty(),
            dynamic_ncols=True,
        )
        say = self.say
        if not bar.disable:
            self.say = bar.write
        self.model.train()
        with bar, interrupts() as interrupted, self._writer() as write:
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
                stop = bool(interrupted) if self.world == 1 else False
                if not (log or due or save or last or stop):
                    continue
                stop = self._agree(bool(interrupted))
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
                    self._save()
                mark = time.perf_counter()
                if stop:
                    break
        self.say = say
        if self._agree(bool(interrupted)) and not progress.finished:
            raise KeyboardInterrupt(
                f"stopped at step {progress.step}; "
                f"go on with: charrnn-fast train --resume {self.folder}"
            )
        return progress

    def _check(self, write: Callable[..., None], log: bool, bar: Any) -> None:
        """Looks at the losses since the last log line, and writes one when it is time to."""
        progress = self.progress
        steps = progress.window_steps
        if not steps:
            return
        window = self.window.clone()
        if self.world > 1:
            dist.all_reduce(window)
        mean, norm = window.item() / steps, self.norm.item()
        if not (self._is_sane(mean) and norm < math.inf):
            self._diverged(f"the loss became {mean:.3g} nats, with a gradient of norm {norm:.3g},")
        progress.train_loss = mean
        if not log:
            return
        row: dict[str, Any] = {"train_loss": mean, "grad_norm": norm}
        row["lr"] = self.optimizer.param_groups[0]["lr"]
        row["chars_per_second"] = round(self.chars_per_step * steps / progress.window_seconds)
        write(**row)
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

    def _keep_best(self, write: Callable[..., None]) -> None:
        """Evaluates, tells, and keeps the weights if they are the best so far."""
        progress = self.progress
        progress.val_loss = loss = self.evaluate()
        if self.held_out is None:  # the last weights are the best ones
            loss = progress.best_loss = math.inf
        elif not math.isfinite(loss):
            self._diverged(f"the held-out loss became {loss}")
        else:
            write(val_loss=loss, val_bpc=bits(loss))
        epoch = progress.step / len(self.batches)
        self.say(
            f"epoch {epoch:.4g}  step {progress.step}  train {progress.train_loss:.4f} nats  "
            f"held out {progress.val_loss:.4f} nats, {bits(progress.val_loss):.4f} bits/character"
        )
        if loss < progress.best_loss or self.held_out is None:
            progress.best_loss, progress.best_step, progress.stale = loss, progress.step, 0
            if self.rank == 0:
                about = {"step": progress.step, "val_loss": progress.val_loss}
                checkpoint.write_tensors(
                    self.folder / checkpoint.MODEL, self.model.state_dict(), about
                )
        else:
            progress.stale += 1
        if self.options.sample_length and self.rank == 0:
            text = sample(
                self.model, self.vocabulary, "", self.options.sample_length, seed=self.options.seed
            )
            write(sample=text[0])
            self.say(text[0])

    @contextmanager
    def _writer(self) -> Iterator[Callable[..., None]]:
        """Gives a function that appends one row to metrics.jsonl (and to TensorBoard)."""
        board: Any = None
        if self.options.tensorboard and self.rank == 0:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise UsageError("--tensorboard needs: pip install tensorboard") from None
            board = SummaryWriter(
                str(self.folder / "tensorboard"), purge_step=self.progress.step + 1
            )

        def write(**values: Any) -> None:
            if self.rank:
                return
            step = self.progress.step
            row = {"step": step, "epoch": round(step / len(self.batches), 4), **values}
            row["seconds"] = round(self.progress.seconds, 3)
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            if board:
                for name, value in values.items():
                    (board.add_text if isinstance(value, str) else board.add_scalar)(
                        name, value, step
                    )

        path = self.folder / checkpoint.METRICS if self.rank == 0 else Path(os.devnull)
        with path.open("a", encoding="utf-8") as file:
            try:
                yield write
            finally:
                if board:
                    board.close()

    def _agree(self, flag: bool) -> bool:
        """Whether any process of the group raises the flag."""
        if self.world == 1:
            return flag
        raised = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(raised)
        return bool(raised.item())

    def leave_group(self) -> None:
        """The end of a process under torchrun; without torchrun, nothing. It can no longer train.

        With the last reference to the group its threads end. One that lived on could drop, while
        the interpreter shuts down, what it holds of a collective, and so abort the process.
        """
        if self.world > 1:
            self.call = self.model
            gc.collect()  # DistributedDataParallel refers to itself
            dist.destroy_process_group()

    def _gather(self, mine: Tensor) -> list[Tensor]:
        """The same-shaped tensors of all processes, by rank."""
        if self.world == 1:
            return [mine]
        mine = mine.contiguous().to(self.device)
        parts = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(parts, mine)
        return [part.cpu() for part in parts]

    def _save(self) -> None:
        """Writes the training state. Every process calls it, the first one writes."""
        window = torch.stack(self._gather(self.window)).sum()
        tensors = {
            "window": window,
            "random": torch.stack(self._gather(torch.get_rng_state())).cpu(),
        }
        if self.device.type == "cuda":
            tensors["random_cuda"] = torch.stack(
                self._gather(torch.cuda.get_rng_state(self.device))
            ).cpu()
        if self.state is not None and not self.options.lines:
            # Process r has the sequences r, r + world, ...: interleave them again.
            tensors["state"] = torch.stack(self._gather(self.state), dim=2).flatten(1, 2)
        if self.rank:
            return
        tensors |= {f"model.{k}": v for k, v in self.model.state_dict().items()}
        for (name, _), parameter in zip(
            self.model.named_parameters(), self.parameters, strict=True
        ):
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"optimizer.{name}.{key}"] = value
        about = {"progress": asdict(self.progress), "text_sha256": self.text_hash}
        checkpoint.write_tensors(self.folder / checkpoint.LAST, tensors, about)

    def _restore(self) -> None:
        path = self.folder / checkpoint.LAST
        if not path.exists():  # stopped before the first checkpoint: the beginning is the same
            self._trim_metrics(0)
            return
        tensors, about = checkpoint.read_tensors(path)
        if about.get("text_sha256") != self.text_hash:
            raise UsageError(
                f"the text is not the one {self.folder} was trained on; resume with that one"
            )
        weights = {k[6:]: v for k, v in tensors.items() if k.startswith("model.")}
        checkpoint.check_weights(self.config, weights, path)
        self.model.load_state_dict(weights)
        try:
            progress = Progress(**about["progress"])
            for name, parameter in self.model.named_parameters():
                prefix = f"optimizer.{name}."
                moments = {k: tensors[prefix + k] for k in ("exp_avg", "exp_avg_sq")}
                if any(moment.shape != parameter.shape for moment in moments.values()):
                    raise ValueError(f"the optimizer's state of {name} has another shape")
                self.optimizer.state[parameter] = {
                    "step": tensors[prefix + "step"].to(self.device),
                    **{k: moment.to(self.device) for k, moment in moments.items()},
                }
            if self.world == len(tensors["random"]):
                torch.set_rng_state(tensors["random"][self.rank].clone())
            if "random_cuda" in tensors and self.device.type == "cuda":
                torch.cuda.set_rng_state(tensors["random_cuda"][self.rank], self.device)
            if self.rank == 0:
                self.window.copy_(tensors["window"])
            if "state" in tensors:
                shape = (self.config.num_layers, self.batches.batch_size, self.config.hidden_size)
                if tensors["state"].shape != shape:
                    raise ValueError(f"the carried state is {tuple(tensors['state'].shape)}")
                mine = tensors["state"][:, self.rank :: self.world]
                self.state = mine.contiguous().to(self.device)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UsageError(f"{path} is damaged: {error}") from None
        if type(progress.step) is not int or progress.step < 0:
            raise UsageError(f"{path} is damaged: step {progress.step!r}")
        if progress.step >= self.total_steps:
            raise UsageError(
                f"{self.folder} is finished at step {progress.step}; "
                "give more --max-epochs to go on"
            )
        progress.finished = False  # it had stopped early, perhaps
        self.progress = progress
        self._trim_metrics(progress.step)

    def _trim_metrics(self, step: int) -> None:
        """Drops the rows that were written after the checkpoint: they will be written again."""
        if self.rank:
            return
        path = self.folder / checkpoint.METRICS
        kept = []
        for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
            try:
                if line.endswith(b"\n") and json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError):
                break  # a line that was being written when the process died
        checkpoint.write_atomic(path, b"".join(kept))


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


def join_group(device: str) -> tuple[int, int]:
    """Rank and size of the group that torchrun started, or (0, 1) without it."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return 0, 1
    if not dist.is_initialized():
        # Functions of this module have the group of the whole world as a default argument, and
        # DistributedDataParallel imports it: after the group is made they would keep it for ever.
        import torch.distributed.nn.functional  # noqa: F401

        dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return dist.get_rank(), world


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


def resumed_options(folder: str | Path, changes: dict[str, Any]) -> TrainOptions:
    """The options of an existing run, with those changes that leave its meaning alone.

    Raises UsageError for an option that cannot change in the middle of a run.
    """
    _, _, saved = checkpoint.read_settings(Path(folder))
    options = saved_options(saved)
    known = {f.name: f for f in fields(TrainOptions)}
    changes = {k: v for k, v in changes.items() if k != "out_dir" and v != getattr(options, k)}
    for name in changes:
        if not known[name].metadata.get("live"):
            raise UsageError(f"--{name.replace('_', '-')} cannot change when a run is resumed")
    return replace(options, out_dir=str(folder), **changes)


def saved_options(saved: dict[str, Any]) -> TrainOptions:
    """The options that a run's config.json holds; UsageError for values of the wrong kind."""
    try:
        return TrainOptions(
            **{f.name: saved[f.name] for f in fields(TrainOptions) if f.name in saved}
        )
    except TypeError as error:
        raise UsageError(f"{checkpoint.CONFIG} is damaged: {error}") from None


def held_out_part(saved: dict[str, Any]) -> Ids | LineBatches:
    """What a run held out of its text, by the options in its config.json.

    UsageError where that is not to be had: the text has moved or changed, or nothing was held out.
    """
    if not saved:
        raise UsageError("this folder holds a model without its training: name a text")
    options = saved_options(saved)
    corpus = load_corpus(options.text, options.bytes)
    if text_hash(corpus.ids) != saved.get("text_sha256"):
        raise UsageError(f"{options.text or 'the built-in text'} has changed since the training")
    _, part = prepare(options, corpus.vocabulary, corpus.ids)
    if part is None:
        raise UsageError("nothing was held out in this training: name a text")
    return part
