"""How well a model predicts a text."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from .data import PAD, LineBatches, to_tensor
from .model import CharRNN
from .vocabulary import Ids


@torch.no_grad()
def evaluate(model: CharRNN, ids: Ids, streams: int = 1, seq_length: int = 256) -> float:
    """Mean loss over a text, nats a character, with the state carried along.

    ``streams`` parts of the text are read side by side, each from a zero state; the characters
    that are left over (fewer than ``streams``) are not read. One stream is exact.
    """
    streams = max(1, min(streams, (len(ids) - 1) // seq_length))
    length = (len(ids) - 1) // streams
    tokens = ids[: length * streams].reshape(streams, length).T
    targets = ids[1 : length * streams + 1].reshape(streams, length).T
    device = model.head.weight.device
    total, state = torch.zeros((), dtype=torch.float64), None
    with _evaluating(model):
        for start in range(0, length, seq_length):
            rows = slice(start, start + seq_length)
            logits, state = model(to_tensor(tokens[rows], device), state)
            target = to_tensor(targets[rows], device).flatten()
            total += F.cross_entropy(logits.flatten(0, 1), target, reduction="sum").cpu()
    return total.item() / (length * streams)


@torch.no_grad()
def evaluate_stream(model: CharRNN, pieces: Iterable[Ids]) -> tuple[float, int]:
    """The same for a text of any length that arrives in pieces, in the memory of one of them.

    Returns the mean loss in nats a character, and the number of characters predicted.
    """
    total, count = 0.0, 0
    for surprise in surprisals(model, pieces):
        total += float(surprise.sum(dtype=np.float64))
        count += len(surprise)
    return (total / count if count else float("nan")), count


@torch.no_grad()
def surprisals(
    model: CharRNN, pieces: Iterable[Ids], seq_length: int = 1024
) -> Iterable[npt.NDArray[np.float32]]:
    """Nats of each character given all before it, but for the very first one, piece by piece."""
    device = model.head.weight.device
    state, last = None, None
    with _evaluating(model):
        for piece in pieces:
            ids = piece if last is None else np.concatenate([last, piece])
            for start in range(0, len(ids) - 1, seq_length):
                part = ids[start : start + seq_length + 1]
                logits, state = model(to_tensor(part[:-1, None], device), state)
                target = to_tensor(part[1:], device)
                yield F.cross_entropy(logits[:, 0], target, reduction="none").cpu().numpy()
            last = ids[-1:]


@torch.no_grad()
def evaluate_lines(model: CharRNN, batches: LineBatches) -> tuple[float, int]:
    """Mean loss over lines, nats a character, the line break that ends each one included.

    Returns it and the number of characters predicted.
    """
    device = model.head.weight.device
    total, count = torch.zeros((), dtype=torch.float64), 0
    lines = np.argsort(batches.ends - batches.starts, kind="stable")
    with _evaluating(model):
        for start in range(0, len(lines), batches.batch_size):
            batch = batches.pad(lines[start : start + batches.batch_size])
            logits, _ = model(batch.tokens.to(device))
            total += F.cross_entropy(
                logits.flatten(0, 1),
                batch.targets.to(device).flatten(),
                ignore_index=PAD,
                reduction="sum",
            ).cpu()
            count += batch.count
    return total.item() / count, count


class _evaluating:
    """Puts a model into evaluation mode for a while."""

    def __init__(self, model: CharRNN) -> None:
        self.model, self.training = model, model.training

    def __enter__(self) -> None:
        self.model.eval()

    def __exit__(self, *exc: object) -> None:
        self.model.train(self.training)
