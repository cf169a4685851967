"""What a run needs to go on as if it had never stopped: counters, and the tensors beside them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import checkpoint
from .errors import UsageError

if TYPE_CHECKING:
    from .train import Trainer


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


def save_state(trainer: Trainer) -> None:
    """Writes the training state. Every process calls it, the first one writes."""
    gather, state = trainer.group.gather, trainer.state
    tensors = {
        "window": torch.stack(gather(trainer.window)),
        "random": torch.stack(gather(torch.get_rng_state())).cpu(),
    }
    if trainer.device.type == "cuda":
        mine = torch.cuda.get_rng_state(trainer.device)
        tensors["random_cuda"] = torch.stack(gather(mine)).cpu()
    if state is not None and not trainer.options.lines:
        # Process r has the sequences r, r + size, ...: interleave them again.
        tensors["state"] = torch.stack(gather(state), dim=2).flatten(1, 2)
    if trainer.group.rank:
        return
    tensors |= {f"model.{k}": v for k, v in trainer.model.state_dict().items()}
    tensors |= {f"optimizer.{k}": v for k, v in trainer.optimizer.state().items()}
    about = {"progress": asdict(trainer.progress), "text_sha256": trainer.text_hash}
    checkpoint.write_tensors(trainer.folder / checkpoint.LAST, tensors, about)


def check_layout(trainer: Trainer, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """UsageError for a training state that has other parts than ``save_state`` writes: a damaged
    file loses bytes, but only another version of this package has other names."""
    progress = about.get("progress")
    expected = {"window", "random", *(f"optimizer.{name}" for name in trainer.optimizer.state())}
    missing = expected - tensors.keys()
    if isinstance(progress, dict):
        missing |= {field.name for field in fields(Progress)} ^ progress.keys()
        if progress.get("step") and not trainer.options.lines:
            missing |= {"state"} - tensors.keys()
    if missing:
        raise UsageError(
            f"{trainer.folder / checkpoint.LAST} was written by another version of charrnn_fast, "
            f"whose training state has another layout (see {min(missing)}): this version uses its "
            "weights, but cannot resume the run"
        )


def restore_state(trainer: Trainer) -> None:
    """Reads it again, if any was written. UsageError for a file that is damaged or does not fit."""
    path = trainer.folder / checkpoint.LAST
    if not path.exists():  # stopped before the first checkpoint: the beginning is the same
        return
    tensors, about = checkpoint.read_tensors(path)
    if about.get("text_sha256") != trainer.text_hash:
        raise UsageError(
            f"the text is not the one {trainer.folder} was trained on; resume with that one"
        )
    weights = {k[6:]: v for k, v in tensors.items() if k.startswith("model.")}
    checkpoint.check_weights(trainer.config, weights, path)
    check_layout(trainer, tensors, about)
    trainer.model.load_state_dict(weights)
    group, device = trainer.group, trainer.device
    try:
        progress = Progress(**about["progress"])
        trainer.optimizer.load_state(
            {k[10:]: v for k, v in tensors.items() if k.startswith("optimizer.")}
        )
        same_group = group.size == len(tensors["random"])
        if same_group:
            torch.set_rng_state(tensors["random"][group.rank].clone())
        if "random_cuda" in tensors and device.type == "cuda":
            torch.cuda.set_rng_state(tensors["random_cuda"][group.rank], device)
        if same_group:
            trainer.window.copy_(tensors["window"][group.rank])
        elif group.rank == 0:
            trainer.window.copy_(tensors["window"].sum())
        if "state" in tensors:
            batch_size = trainer.batches.batch_size
            shape = (trainer.config.num_layers, batch_size, trainer.config.hidden_size)
            if tensors["state"].shape != shape:
                raise ValueError(f"the carried state is {tuple(tensors['state'].shape)}")
            mine = tensors["state"][:, group.rank :: group.size]
            trainer.state = mine.contiguous().to(device)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"{path} is damaged: {error}") from None
    if type(progress.step) is not int or progress.step < 0:
        raise UsageError(f"{path} is damaged: step {progress.step!r}")
    if progress.step >= trainer.total_steps:
        raise UsageError(
            f"{trainer.folder} is finished at step {progress.step}; to go on, give more "
            + ("--max-iters" if trainer.options.max_iters else "--max-epochs")
        )
    progress.finished = False  # it had stopped early, perhaps
    trainer.progress = progress
