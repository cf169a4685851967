"""Folders that hold a model, and the training state that continues it.

    RUN/config.json          what the weights mean, and every option of the training
    RUN/vocab.json           the characters
    RUN/model.safetensors    the best weights so far; these names load into plain torch.nn modules
    RUN/last.safetensors     the last weights (and their average, where one is kept), optimizer,
                             random state, carried state and counters
    RUN/metrics.jsonl        one line for each measurement

Nothing is pickled, so nothing that is loaded can run code, and nothing is allocated on the word of
a file alone: shapes are compared with the bytes that are there first. Every file is written beside
its place, flushed to the disk and renamed: a crash or a full disk leaves the previous one, and a
symbolic link in the folder is replaced, not followed.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from . import checks
from .errors import UsageError
from .group import usable_device, use_kernels
from .model import GATES, Backend, CharRNN, ModelConfig, build_model
from .vocabulary import Vocabulary

FORMAT = 2  # 1: before there were cells other than rnn
CONFIG, VOCABULARY = "config.json", "vocab.json"
MODEL, LAST, METRICS = "model.safetensors", "last.safetensors", "metrics.jsonl"
LOCK = ".lock"
MAX_JSON = 16 << 20  # bytes; a vocabulary of every character that there is has less than 5 MB


class Pretrained(NamedTuple):
    """A model with what is needed to use it: what :func:`from_pretrained` returns.

    Attributes:
        model: in evaluation mode.
        vocabulary: encodes and decodes its text.
        training: the options it was trained with, by name; empty where it was only saved.

    Example:
        >>> from charrnn_fast.charlm import Pretrained
        >>> Pretrained._fields
        ('model', 'vocabulary', 'training')
    """

    model: CharRNN
    vocabulary: Vocabulary
    training: dict[str, Any]


def write_atomic(path: Path, content: bytes) -> None:
    """Replaces ``path`` by ``content``, or leaves it as it was and raises OSError."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # of a process that was killed
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            kept = "; what was there before is kept" if path.exists() else ""
            raise OSError(error.errno, f"cannot write {path}: {error.strerror}{kept}") from None
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself
    finally:
        os.close(folder)


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Creates ``folder`` and holds its lock within the block.

    The system releases the lock when the process ends, however it ends. Raises UsageError where
    another process holds it, or where the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise UsageError(
            f"cannot write into {folder}: {error.strerror}; choose another --out-dir"
        ) from None
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"another training is writing into {folder}; wait for its end, or choose another "
                "--out-dir"
            ) from None
        yield
    finally:
        os.close(file)


def write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_atomic(path, text.encode("utf-8", "surrogatepass"))  # as json.loads decodes it


def read_json(path: Path) -> Any:
    if not path.is_file():
        raise UsageError(f"no such file: {path}; is {path.parent} a run?")
    if path.stat().st_size > MAX_JSON:
        raise UsageError(f"{path} is damaged: more than {MAX_JSON >> 20} MB")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise UsageError(f"{path} is damaged: not JSON") from None


def write_tensors(path: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # One entry: several would be written in an order that differs from time to time.
    metadata = {"charrnn_fast": json.dumps({"format_version": FORMAT, **about})}
    write_atomic(path, serialize(tensors, metadata))


def read_tensors(path: Path, prefix: str = "") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors whose names begin with ``prefix``, by the rest of the name, on the CPU; and what
    ``write_tensors`` was told about them. They take the memory that the file has bytes, at most."""
    if not path.is_file():
        raise UsageError(f"no such file: {path}; is {path.parent} a run?")
    try:
        # By one open file: safe_open opens twice, and a training may replace the file in between.
        with path.open("rb") as opened, safe_open(f"/dev/fd/{opened.fileno()}", "pt") as file:
            about = json.loads((file.metadata() or {}).get("charrnn_fast", "{}"))
            if not isinstance(about, dict):
                raise ValueError("its metadata is no object")
            check_format(path, about.get("format_version", FORMAT))
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
            return {name[len(prefix) :]: file.get_tensor(name) for name in names}, about
    except UsageError:
        raise
    except (SafetensorError, ValueError, RecursionError, OSError) as error:
        raise UsageError(f"{path} is damaged or cut short: {error}") from None


def check_format(path: Path, version: object) -> None:
    if type(version) is not int or version < 1:
        raise UsageError(f"{path} has no valid format version: {version!r}")
    if version > FORMAT:
        raise UsageError(
            f"{path} has format {version}, and this version of charrnn_fast reads up to {FORMAT}; "
            "upgrade charrnn_fast"
        )


def weight_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a model's weights, one by one: nothing is allocated."""
    V, H, E, G = config.vocab_size, config.hidden_size, config.embedding_size, GATES[config.cell]
    if E:
        yield "embedding.weight", (V, E)
    for layer in range(config.num_layers):
        yield f"rnn.weight_ih_l{layer}", (G * H, H if layer else E or V)
        yield f"rnn.weight_hh_l{layer}", (G * H, H)
        yield f"rnn.bias_ih_l{layer}", (G * H,)
        yield f"rnn.bias_hh_l{layer}", (G * H,)
    yield "head.weight", (V, H)
    yield "head.bias", (V,)


def check_weights(config: ModelConfig, tensors: dict[str, Tensor], path: Path) -> None:
    """Raises UsageError, in one line, for weights that do not fit ``config``."""
    names = set()
    for name, shape in weight_shapes(config):
        tensor = tensors.get(name)
        if tensor is None or tensor.shape != shape or not tensor.is_floating_point():
            found = "missing" if tensor is None else f"{tuple(tensor.shape)} of {tensor.dtype}"
            raise UsageError(f"{path} does not fit {CONFIG}: {name} is {found}, expected {shape}")
        names.add(name)
    if unknown := sorted(tensors.keys() - names):
        raise UsageError(f"{path} does not fit {CONFIG}: it has {unknown[0]}, which no layer has")


def save_settings(
    folder: Path, config: ModelConfig, vocabulary: Vocabulary, training: dict[str, Any]
) -> None:
    from charrnn_fast import __version__

    write_json(folder / VOCABULARY, vocabulary.to_json())
    settings = {
        "format_version": FORMAT,
        "charrnn_fast_version": __version__,
        "model": asdict(config),
        "training": training,
    }
    write_json(folder / CONFIG, settings)


def read_settings(folder: Path) -> tuple[ModelConfig, Vocabulary, dict[str, Any]]:
    path = folder / CONFIG
    if not folder.is_dir():
        hint = ""
        if (folder.parent / CONFIG).is_file():
            hint = f"; it is a file of the run {folder.parent}: name the folder"
        elif folder.exists():
            hint = ": it is a file; a run is a folder"
        raise UsageError(f"no such run: {folder}{hint}")
    settings = read_json(path)
    if not isinstance(settings, dict):
        raise UsageError(f"{path} is damaged: not an object")
    check_format(path, settings.get("format_version"))
    training = settings.get("training", {})
    try:
        config = ModelConfig(**settings["model"])
        if not isinstance(training, dict):
            raise TypeError("the training options are no object")
    except (KeyError, TypeError, UsageError) as error:
        raise UsageError(f"{path} is damaged: {error}") from None
    characters = read_json(folder / VOCABULARY)
    try:
        vocabulary = Vocabulary.from_json(characters)
    except UsageError as error:
        raise UsageError(f"{folder / VOCABULARY} is damaged: {error}") from None
    if len(vocabulary) != config.vocab_size:
        raise UsageError(
            f"{folder / VOCABULARY} has {len(vocabulary)} characters, "
            f"but the model has {config.vocab_size}"
        )
    return config, vocabulary, training


def save_pretrained(folder: str | Path, model: CharRNN, vocabulary: Vocabulary) -> None:
    """Writes a model and its vocabulary as a folder that :func:`from_pretrained` reads.

    Args:
        folder: made where it is not there.
        model: its weights go to ``model.safetensors``, its sizes to ``config.json``.
        vocabulary: goes to ``vocab.json``.

    Raises:
        UsageError: the vocabulary is not of the size of the model's, or the path is none.
        OSError: a file cannot be written; what was there before is kept.

    Example:
        >>> import tempfile, torch
        >>> from charrnn_fast.charlm import (
        ...     ModelConfig, Vocabulary, build_model, from_pretrained, save_pretrained)
        >>> vocabulary = Vocabulary.from_text("a banana")
        >>> model = build_model(ModelConfig(len(vocabulary), hidden_size=16))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_pretrained(folder, model, vocabulary)
        ...     again, _, _ = from_pretrained(folder)
        >>> torch.equal(again.head.weight, model.head.weight)
        True
    """
    folder = Path(checks.path("the folder", folder))
    if len(vocabulary) != model.config.vocab_size:
        raise UsageError(
            f"the vocabulary has {len(vocabulary)} characters, "
            f"but the model has {model.config.vocab_size}"
        )
    folder.mkdir(parents=True, exist_ok=True)
    save_settings(folder, model.config, vocabulary, {})
    write_tensors(folder / MODEL, model.state_dict(), {})


def from_pretrained(
    folder: str | Path,
    backend: Backend = "fast",
    device: torch.device | str = "cpu",
    last: bool = False,
) -> Pretrained:
    """Reads a folder of :func:`save_pretrained` or of a training.

    Args:
        folder: the run.
        backend: ``'fast'`` for modules of charrnn_fast, ``'torch'`` for torch.nn's; checkpoints
            serve both.
        device: to hold the model.
        last: whether to take the last weights, or their average where one is kept, and not the
            best ones.

    Raises:
        UsageError: there is no such folder, or its files are damaged, do not fit each other, or
            come from a newer version.

    Example:
        >>> import tempfile
        >>> from charrnn_fast.charlm import from_pretrained
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     from_pretrained(folder + "/nowhere")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        charrnn_fast.charlm.errors.UsageError: no such run: ...
    """
    device = usable_device(device)
    use_kernels()
    saved = read_weights(Path(checks.path("the folder", folder)), last)
    model = build_model(saved.config, backend)
    model.load_state_dict(saved.tensors)
    return Pretrained(model.to(device).eval(), saved.vocabulary, saved.training)


class Weights(NamedTuple):
    """The contents of a folder, checked, before a model is made of them."""

    config: ModelConfig
    vocabulary: Vocabulary
    training: dict[str, Any]
    tensors: dict[str, Tensor]


def read_weights(folder: Path, last: bool = False) -> Weights:
    """The best weights of a folder, or the last ones; UsageError as from ``from_pretrained``."""
    config, vocabulary, training = read_settings(folder)
    path = folder / (LAST if last else MODEL)
    tensors, _ = read_tensors(path, "average." if last else "")
    if last and not tensors:  # no average is kept
        tensors, _ = read_tensors(path, "model.")
    check_weights(config, tensors, path)
    return Weights(config, vocabulary, training, tensors)
