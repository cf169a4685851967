"""All that a run needs to resume bit for bit: counters and tensors."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from . import checkpoint
from .errors import UsageError
from .model import ModelConfig, State

CARRIED = ("state", "cell_state")  # the names of h and c


@dataclass
class Progress:
    """The counters of a run: with the tensors of the training state, all that resuming needs."""

    step: int = 0
    best_loss: float = math.inf  # nats, held out
    best_step: int = 0
    stale: int = 0  # evaluations since the best one
    val_loss: float = math.nan
    train_loss: float = math.nan  # mean since the last line of metrics
    window_steps: int = 0
    window_seconds: float = 0.0
    seconds: float = 0.0  # spent in training steps
    finished: bool = False

    def check(self) -> None:
        """ValueError for values that no training has."""
        for counter in fields(self):
            value: Any = getattr(self, counter.name)
            kind = type(counter.default)
            kinds = (int, float) if kind is float else (kind,)
            if type(value) not in kinds or value < 0:
                raise ValueError(f"{counter.name} {value!r}")


@dataclass
class TrainingState:
    """A moment of a training, of all its processes together, and its file.

    Rows of ``window`` and ``random`` belong to one process each, by rank; ``carried`` is the state
    of all sequences, ``[layers, B, H]``, and empty where none is carried.
    """

    progress: Progress
    text_hash: str
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    window: Tensor
    random: Tensor
    random_cuda: Tensor | None = None
    carried: State = ()
    average: dict[str, Tensor] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """By their names in the file."""
        named = {"window": self.window, "random": self.random}
        if self.random_cuda is not None:
            named["random_cuda"] = self.random_cuda
        named |= dict(zip(CARRIED, self.carried, strict=False))
        for part in ("model", "optimizer", "average"):
            named |= {f"{part}.{name}": tensor for name, tensor in getattr(self, part).items()}
        return named

    def write(self, path: Path) -> None:
        about = {"progress": asdict(self.progress), "text_sha256": self.text_hash}
        checkpoint.write_tensors(path, self.tensors(), about)

    @classmethod
    def read(cls, path: Path, config: ModelConfig, like: TrainingState) -> TrainingState:
        """The state in a file, of a training that is ``like`` another state: with tensors of the
        same names and, but for the number of processes, the same shapes.

        UsageError for a file that is damaged, of another training, or of another version.
        """
        tensors, about = checkpoint.read_tensors(path)
        if about.get("text_sha256") != like.text_hash:
            raise UsageError(
                f"the text is not the one {path.parent} was trained on; resume with that one"
            )
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "optimizer": {}, "average": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            if part in parts:
                parts[part][rest] = tensor
        checkpoint.check_weights(config, parts["model"], path)
        check_layout(path, like, tensors, about.get("progress"))
        try:
            progress = Progress(**about["progress"])
            progress.check()
            for kind, named in (("optimizer", like.optimizer), ("average", like.average)):
                for name, own in named.items():
                    check_shape(f"the {kind}'s state of {name}", parts[kind][name], own)
            carried = tuple(tensors[name] for name in CARRIED if name in tensors)
            for tensor, own in zip(carried, like.carried if progress.step else (), strict=True):
                check_shape("the carried state", tensor, own)
            check_shape("window", tensors["window"], tensors["random"][:, 0])
            check_shape("random", tensors["random"][0], like.random[0])
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise UsageError(f"{path} is damaged: {error}") from None
        return cls(
            progress,
            like.text_hash,
            window=tensors["window"],
            random=tensors["random"],
            random_cuda=tensors.get("random_cuda"),
            carried=carried,
            **parts,
        )


def check_shape(what: str, tensor: Tensor, own: Tensor) -> None:
    if tensor.shape != own.shape:
        raise ValueError(f"{what} is {tuple(tensor.shape)}, expected {tuple(own.shape)}")


def check_layout(
    path: Path, like: TrainingState, tensors: dict[str, Tensor], progress: Any
) -> None:
    """UsageError for a training state that has other parts than ``write`` gives it: a damaged file
    loses bytes, but only another version of this package has other names."""
    missing = like.tensors().keys() - {"random_cuda"} - tensors.keys()
    if isinstance(progress, dict):
        missing |= {field.name for field in fields(Progress)} ^ progress.keys()
        if not progress.get("step"):
            missing -= set(CARRIED)
    if missing:
        raise UsageError(
            f"{path} was written by another version of charrnn_fast, "
            f"whose training state has another layout (see {min(missing)}): this version uses its "
            "weights, but cannot resume the run"
        )


def step_of(path: Path) -> int:
    """The step of a training state, 0 where none has been written."""
    if not path.exists():
        return 0
    _, about = checkpoint.read_tensors(path, "no tensor")
    step = about.get("progress", {}).get("step")
    return step if type(step) is int else -1
