"""What a training depends on: its options, and the learning rate that follows from them."""

# ruff: noqa: RUF009 (option() is dataclasses.field with less to write)
from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import torch

from . import checkpoint
from .errors import UsageError
from .model import Backend, Nonlinearity, RecurrentInit

MAX_THREADS = 1024  # with more than the system allows, OpenMP ends the process


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
        for name in (*whole, "grad_clip", "weight_decay", "min_lr", "sample_length"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"--{name.replace('_', '-')} must not be negative or infinite")
        check_seed(self.seed)
        if not 0 < self.learning_rate < math.inf:
            raise UsageError("--learning-rate must be positive")
        if not 0 <= self.val_fraction < 1:
            raise UsageError("--val-fraction must be in [0, 1)")


def check_seed(seed: int) -> None:
    """UsageError for a number that one of the random generators refuses."""
    if not 0 <= seed < 2**63:
        raise UsageError(f"the seed must be in [0, 2^63), not {seed}")


def use_threads(count: int) -> None:
    """Computes with so many threads from now on; 0: with as many as before."""
    if not 0 <= count <= MAX_THREADS:
        raise UsageError(f"--threads must be in [0, {MAX_THREADS}], not {count}")
    if count:
        torch.set_num_threads(count)


def learning_rate(options: TrainOptions, step: int, total: int) -> float:
    """The rate of step 0 <= step < total: a linear rise, then a half cosine or a constant."""
    if step < options.warmup_iters:
        return options.learning_rate * (step + 1) / (options.warmup_iters + 1)
    if options.schedule == "constant":
        return options.learning_rate
    done = (step - options.warmup_iters) / max(1, total - options.warmup_iters)
    fall = 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    return options.min_lr + fall * (options.learning_rate - options.min_lr)


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


def read_config(path: str) -> dict[str, Any]:
    """Options from a TOML file, checked against those that there are."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:  # the same module, before it joined Python
        import tomli as tomllib

    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"no such file: {path}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is no TOML: {error}") from None
    known = {f.name: f for f in fields(TrainOptions)}
    names = {a: n for n, f in known.items() for a in (n, *f.metadata["aliases"])}
    hints = get_type_hints(TrainOptions)
    options = {}
    for key, value in values.items():
        name = names.get(key.replace("-", "_"))
        if name is None:
            raise UsageError(f"{path}: no such option: {key}")
        wanted = str if name == "text" else type(known[name].default)
        if wanted is float and type(value) is int:
            value = float(value)
        choices = get_args(hints[name]) if name != "text" else ()
        if type(value) is not wanted or (choices and value not in choices):
            expected = f"one of {', '.join(choices)}" if choices else wanted.__name__
            raise UsageError(f"{path}: {key} must be {expected}, not {value!r}")
        options[name] = value
    return options
