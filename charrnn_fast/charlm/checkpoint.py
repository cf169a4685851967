"""Folders that hold a model, and the training state that continues it.

    RUN/config.json          what the weights mean, and every option of the training
    RUN/vocab.json           the characters
    RUN/model.safetensors    the best weights so far; these names load into plain torch.nn modules
    RUN/last.safetensors     the last weights, optimizer, random state, carried state and counters
    RUN/metrics.jsonl        one line for each measurement

Nothing is pickled, so nothing that is loaded can run code. Every file is written beside its place,
flushed to the disk and renamed: a crash or a full disk leaves the previous one.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from .errors import UsageError
from .model import Backend, CharRNN, ModelConfig, build_model
from .vocabulary import Vocabulary

FORMAT = 1
CONFIG, VOCABULARY = "config.json", "vocab.json"
MODEL, LAST, METRICS = "model.safetensors", "last.safetensors", "metrics.jsonl"


class Pretrained(NamedTuple):
    """A model with what is needed to use it. ``training`` holds the options it was trained with."""

    model: CharRNN
    vocabulary: Vocabulary
    training: dict[str, Any]


def write_atomic(path: Path, content: bytes) -> None:
    """Replaces ``path`` by ``content``, or leaves it as it was and raises OSError."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself
    finally:
        os.close(folder)


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> Any:
    if not path.is_file():
        raise UsageError(f"no such file: {path}; is {path.parent} a run?")
    try:
        return json.loads(path.read_bytes())
    except ValueError:
        raise UsageError(f"{path} is damaged: not JSON") from None


def write_tensors(path: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # One entry: several would be written in an order that differs from time to time.
    metadata = {"charrnn_fast": json.dumps({"format_version": FORMAT, **about})}
    write_atomic(path, serialize(tensors, metadata))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name, on the CPU, and what ``write_tensors`` was told about them."""
    if not path.is_file():
        raise UsageError(f"no such file: {path}; is {path.parent} a run?")
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get("charrnn_fast", "{}"))
            check_format(path, about.get("format_version", FORMAT))
            return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118
    except UsageError:
        raise
    except (SafetensorError, ValueError, OSError) as error:
        raise UsageError(f"{path} is damaged or cut short: {error}") from None


def check_format(path: Path, version: object) -> None:
    if not isinstance(version, int) or version < 1:
        raise UsageError(f"{path} has no valid format version: {version!r}")
    if version > FORMAT:
        raise UsageError(
            f"{path} has format {version}, and this version of charrnn_fast reads up to {FORMAT}; "
            "upgrade charrnn_fast"
        )


def config_of(model: CharRNN) -> ModelConfig:
    rnn = model.rnn
    return ModelConfig(
        vocab_size=rnn.input_size,
        hidden_size=rnn.hidden_size,
        num_layers=rnn.num_layers,
        nonlinearity=rnn.mode.removeprefix("RNN_").lower(),  # type: ignore[arg-type]
        dropout=model.dropout.p,
    )


def load_weights(model: CharRNN, tensors: dict[str, Tensor], path: Path) -> None:
    """Like ``load_state_dict``, with one line for whatever does not fit."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise UsageError(
                f"{path} does not fit {CONFIG}: {name} is {found.get(name, 'missing')}, "
                f"expected {expected.get(name, 'no such tensor')}"
            )
    model.load_state_dict(tensors)


def save_settings(
    folder: Path, config: ModelConfig, vocabulary: Vocabulary, training: dict[str, Any]
) -> None:
    from charrnn_fast import __version__

    folder.mkdir(parents=True, exist_ok=True)
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
        raise UsageError(f"no such run: {folder}")
    settings = read_json(path)
    if not isinstance(settings, dict):
        raise UsageError(f"{path} is damaged: not an object")
    check_format(path, settings.get("format_version"))
    try:
        config = ModelConfig(**settings["model"])
    except (KeyError, TypeError) as error:
        raise UsageError(f"{path} is damaged: {error}") from None
    vocabulary = Vocabulary.from_json(read_json(folder / VOCABULARY))
    if len(vocabulary) != config.vocab_size:
        raise UsageError(
            f"{folder / VOCABULARY} has {len(vocabulary)} characters, "
            f"but the model has {config.vocab_size}"
        )
    return config, vocabulary, settings.get("training", {})


def save_pretrained(folder: str | Path, model: CharRNN, vocabulary: Vocabulary) -> None:
    """Writes a model and its vocabulary as a folder that ``from_pretrained`` reads."""
    folder = Path(folder)
    save_settings(folder, config_of(model), vocabulary, {})
    write_tensors(folder / MODEL, model.state_dict(), {})


def from_pretrained(
    folder: str | Path,
    backend: Backend = "fast",
    device: torch.device | str = "cpu",
    last: bool = False,
) -> Pretrained:
    """Reads a folder of ``save_pretrained`` or of a training: the best weights, or the last ones.

    Raises UsageError for a folder that is none, and for files that are damaged, do not fit each
    other, or come from a newer version.
    """
    folder = Path(folder)
    config, vocabulary, training = read_settings(folder)
    model = build_model(config, backend)
    path = folder / (LAST if last else MODEL)
    tensors, _ = read_tensors(path)
    if last:
        tensors = {k.removeprefix("model."): v for k, v in tensors.items() if k[:6] == "model."}
    load_weights(model, tensors, path)
    return Pretrained(model.to(device).eval(), vocabulary, training)
