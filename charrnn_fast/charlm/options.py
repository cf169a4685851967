"""The options of a training, and the learning rate that follows from them."""

# ruff: noqa: RUF009 (option() is dataclasses.field with less to write)
from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch

from . import checkpoint, checks
from .errors import UsageError
from .model import Backend, Cell, ModelConfig, Nonlinearity, RecurrentInit

MAX_THREADS = 1024  # with more than the system allows, OpenMP ends the process
DEFAULT_CELL: Cell = "gru"
Schedule = Literal["cosine", "constant"]


def option(
    default: Any,
    help: str,
    *aliases: str,
    live: bool = False,
    bench: bool = True,
    kind: type | None = None,
    check: Callable[[str, Any], Any] | None = None,
    **limits: Any,
) -> Any:
    """A field of TrainOptions.

    Live ones may change when a run is resumed; ``bench`` says whether bench has the option, too.
    ``check(flag, value)`` returns the value as a plain one or raises UsageError; without it, the
    kind of the value, that of the default, says which of checks.py does that, within ``limits``.
    """
    about = {"help": help, "aliases": aliases, "live": live, "bench": bench}
    about |= {"kind": kind or type(default), "check": check, "limits": limits}
    return field(default=default, metadata=about)


@dataclass(frozen=True)
class TrainOptions:
    """Everything a training depends on. The command line and ``--config`` have the same names, and
    ``charrnn-fast train --help`` says what each one means.

    Values are checked and become plain ones: paths of any class and devices become strings, NumPy's
    scalars Python's.

    Raises:
        UsageError: a value is of the wrong kind, makes no sense, or does not go with another one.

    Example:
        >>> from charrnn_fast.charlm import TrainOptions
        >>> options = TrainOptions(text="my.txt", hidden_size=256)
        >>> options.cell, options.num_layers, options.learning_rate
        ('gru', 2, 0.004)
    """

    text: str | None = option(
        None, "UTF-8 file to learn from (without: the built-in text)", live=True, check=checks.path
    )
    out_dir: str = option(
        "out", "folder for the run", "checkpoint_dir", bench=False, check=checks.path
    )
    init_from: str | None = option(
        None, "run whose weights to begin with", bench=False, kind=str, check=checks.path
    )
    backend: Backend = option(
        "fast", "modules of charrnn_fast or of torch.nn", live=True, bench=False
    )
    bytes: bool = option(False, "learn bytes instead of characters: any file will do")
    lines: bool = option(False, "every line is an example of its own", bench=False)
    cell: Cell = option(DEFAULT_CELL, "kind of the recurrent layers", "model")
    hidden_size: int = option(128, "hidden units of a layer", "rnn_size", "n_embd", least=1)
    num_layers: int = option(2, "recurrent layers", "n_layer", least=1)
    nonlinearity: Nonlinearity = option("tanh", "nonlinearity of the cell rnn")
    embedding_size: int = option(0, "size of learnt vectors for characters (0: one-hot)", "n_emb")
    dropout: float = option(0.0, "dropout after each layer", below=1.0)
    input_dropout: float = option(0.0, "dropout after the embedding", below=1.0)
    output_dropout: float | None = option(
        None, "dropout after the last layer (as --dropout)", kind=float, below=1.0
    )
    weight_dropout: float = option(0.0, "dropout of recurrent weights", "wdrop", below=1.0)
    locked_dropout: bool = option(False, "the same dropout at every step of a sequence")
    recurrent_init: RecurrentInit = option("orthogonal", "how recurrent weights begin")
    input_scale: float = option(
        8.0, "factor on the first input weights of one-hot characters, as PyTorch draws them",
        open=True,
    )  # fmt: skip
    forget_bias: float = option(1.0, "where an LSTM's forget gates begin", least=-math.inf)
    batch_size: int = option(50, "sequences side by side", least=1)
    seq_length: int = option(50, "characters that gradients flow through", "block_size", least=1)
    max_epochs: int = option(10, "passes over the text", "epochs", live=True, least=1)
    max_iters: int = option(0, "steps, in place of epochs (0: by epochs)", live=True)
    learning_rate: float = option(4e-3, "peak learning rate", "lr", open=True)
    schedule: Schedule = option("cosine", "learning rate after warm-up")
    min_lr: float = option(0.0, "learning rate at the end of the cosine")
    warmup_iters: int = option(100, "steps in which the learning rate rises from 0")
    beta1: float = option(0.9, "Adam's decay of the mean of gradients", below=1.0)
    beta2: float = option(0.999, "Adam's decay of the mean of their squares", below=1.0)
    weight_decay: float = option(0.0, "decoupled weight decay")
    average: float = option(
        0.0, "decay of an average of the weights, which is what is evaluated and kept", "ema",
        below=1.0,
    )  # fmt: skip
    grad_clip: float = option(5.0, "greatest norm of the gradient (0: no limit)")
    val_fraction: float = option(0.1, "part of the text held out, at its end", below=1.0)
    patience: int = option(
        0, "stop after so many evaluations without gain (0: never)", live=True, bench=False
    )
    eval_interval: int = option(0, "steps between evaluations (0: each epoch)", bench=False)
    save_interval: int = option(
        0, "steps between further checkpoints (0: none)", live=True, bench=False
    )
    log_interval: int = option(50, "steps between lines of metrics.jsonl", bench=False, least=1)
    sample_length: int = option(
        0, "characters to print at each evaluation (0: none)", live=True, bench=False
    )
    seed: int = option(1337, "of weights, dropout and order")
    threads: int = option(
        0, "threads to compute with (0: PyTorch's choice)", live=True, most=MAX_THREADS
    )
    device: str = option("cpu", "device to train on", live=True, check=checks.device)
    tensorboard: bool = option(False, "also write TensorBoard events", live=True, bench=False)

    def __post_init__(self) -> None:
        for name in option_names():
            object.__setattr__(self, name, checked(name, getattr(self, name)))
        if self.schedule == "constant" and self.min_lr:
            raise UsageError("--min-lr is the end of the cosine: not with --schedule constant")
        if self.min_lr > self.learning_rate:
            raise UsageError(
                f"--min-lr must not be above --learning-rate: {self.min_lr:g} is above "
                f"{self.learning_rate:g}"
            )
        if self.cell != "lstm" and self.forget_bias != type(self).forget_bias:
            raise UsageError(f"--forget-bias is for --cell lstm: {self.cell} has no such gate")
        self.model_config(1)  # whether the options of the model go together
        if self.patience and not self.val_fraction:
            raise UsageError("--patience needs a held-out part: not with --val-fraction 0")

    def model_config(self, vocab_size: int) -> ModelConfig:
        """The model that these options describe."""
        shared = {f.name for f in fields(ModelConfig)} & option_names().keys()
        return ModelConfig(vocab_size, **{name: getattr(self, name) for name in sorted(shared)})


@cache
def option_names() -> dict[str, Any]:
    """The fields of TrainOptions by name."""
    return {f.name: f for f in fields(TrainOptions)}


@cache
def choices_of(name: str) -> tuple[str, ...]:
    """The values that an option of a Literal type can have; of another type none."""
    hint = get_type_hints(TrainOptions)[name]
    return get_args(hint) if get_origin(hint) is Literal else ()


def checked(name: str, value: Any) -> Any:
    """The value of an option as a plain Python one; a UsageError names the option."""
    field, flag = option_names()[name], "--" + name.replace("_", "-")
    about, kind = field.metadata, field.metadata["kind"]
    if value is None and field.default is None:
        return None
    if about["check"]:
        return about["check"](flag, value)
    if choices := choices_of(name):
        return checks.one_of(flag, value, choices)
    if kind is bool:
        return checks.flag(flag, value)
    if kind is int:
        return checks.whole(flag, value, **about["limits"])
    return checks.real(flag, value, **about["limits"])


def unused(options: TrainOptions) -> list[str]:
    """Options that are set and have no effect beside the rest: a line each."""
    default, notes = TrainOptions(), []
    if options.lines and options.seq_length != default.seq_length:
        notes.append("--lines reads whole lines: --seq-length has no effect")
    if options.embedding_size and options.input_scale != default.input_scale:
        notes.append("--embedding-size replaces one-hot vectors: --input-scale has no effect")
    return notes


def check_seed(seed: Any) -> int:
    """The seed as an int; UsageError for one that the random generators refuse."""
    return checks.whole("the seed", seed)


def use_threads(count: int) -> None:
    """Sets the number of threads; 0 leaves it."""
    if checks.whole("--threads", count, 0, MAX_THREADS):
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


def resumed_options(folder: str | os.PathLike[str], changes: dict[str, Any]) -> TrainOptions:
    """The options of an existing run, with those changes that leave its meaning alone.

    Raises UsageError for an option that cannot change in the middle of a run, or has no effect.
    """
    _, _, saved = checkpoint.read_settings(Path(folder))
    options = saved_options(saved)
    given = {name: checked(name, value) for name, value in changes.items()}
    where = given.pop("out_dir", None)
    if where is not None and os.path.realpath(where) != os.path.realpath(folder):
        raise UsageError(f"--resume goes on in {folder}: --out-dir cannot be another folder")
    given = {k: v for k, v in given.items() if v != getattr(options, k)}
    for name in given:
        if not option_names()[name].metadata["live"]:
            raise UsageError(
                f"--{name.replace('_', '-')} cannot change when a run is resumed; a new run that "
                "begins with its weights: --init-from"
            )
    if "max_epochs" in given and given.get("max_iters", options.max_iters):
        raise UsageError("the length of this run is --max-iters: --max-epochs has no effect")
    return replace(options, out_dir=os.fspath(folder), **given)


def saved_options(saved: dict[str, Any]) -> TrainOptions:
    """The options that a run's config.json holds; UsageError for values of the wrong kind."""
    saved = {"cell": "rnn", "input_scale": 1.0, **saved}  # runs from before there was a choice
    try:
        return TrainOptions(**{name: saved[name] for name in option_names() if name in saved})
    except UsageError as error:
        raise UsageError(f"{checkpoint.CONFIG} is damaged: {error}") from None


def read_config(path: str) -> dict[str, Any]:
    """Options from a TOML file, checked against those that there are."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:  # the same module, before it joined Python
        import tomli as tomllib

    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UsageError(f"no such file: {path}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is no TOML: {error}") from None
    except RecursionError:
        raise UsageError(f"{path} is no TOML: it is nested too deeply") from None
    known = {a: n for n, f in option_names().items() for a in (n, *f.metadata["aliases"])}
    options: dict[str, Any] = {}
    for key, value in values.items():
        name = known.get(key.replace("-", "_"))
        if name is None:
            raise UsageError(f"{path}: no such option: {key}")
        if name in options:
            raise UsageError(f"{path}: {key} is there twice, by two names")
        try:
            options[name] = checked(name, value)
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from None
    return options
