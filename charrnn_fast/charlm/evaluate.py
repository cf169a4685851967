"""How well a model predicts a text."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import whole
from .data import PAD, LineBatches, to_tensor
from .errors import UsageError
from .model import CharRNN, State, steps_at_once
from .vocabulary import Ids

TOO_SHORT = "two characters are the least there is to predict"
LINES = 1 << 20  # characters of padded lines that are held at once


@torch.no_grad()
def evaluate(model: CharRNN, ids: Ids, streams: int = 1, seq_length: int = 256) -> float:
    """Mean loss over a text, in nats a character, with the state carried along.

    Args:
        model: of the vocabulary of ``ids``.
        ids: ``[N]``, as :meth:`Vocabulary.encode` gives them.
        streams: parts of the text that are read side by side, each from a zero state; the
            characters that are left over, fewer than ``streams``, are not read. 1 is exact.
        seq_length: steps that are computed at once, at most; fewer where the vocabulary is large.

    Raises:
        UsageError: the text has less than two characters.

    Example:
        >>> from charrnn_fast.charlm import ModelConfig, Vocabulary, build_model, evaluate
        >>> vocabulary = Vocabulary.from_text("a banana")
        >>> model = build_model(ModelConfig(len(vocabulary), hidden_size=16), seed=1)
        >>> 0 < evaluate(model, vocabulary.encode("a banana")) < 3
        True
    """
    streams, seq_length = whole("streams", streams, 1), whole("seq_length", seq_length, 1)
    if len(ids) < 2:
        raise UsageError(TOO_SHORT)
    streams = max(1, min(streams, (len(ids) - 1) // seq_length))
    length = (len(ids) - 1) // streams
    tokens = ids[: length * streams].reshape(streams, length).T
    targets = ids[1 : length * streams + 1].reshape(streams, length).T
    state: State | None = None
    total = torch.zeros((), dtype=torch.float64)
    with _evaluating(model):
        rows = steps_at_once(model.config.vocab_size, streams, seq_length)
        for start in range(0, length, rows):
            part = slice(start, start + rows)
            loss, state = losses(model, to_tensor(tokens[part]), to_tensor(targets[part]), state)
            total += loss
    return total.item() / (length * streams)


def losses(
    model: CharRNN, tokens: Tensor, targets: Tensor, state: State | None, reduction: str = "sum"
) -> tuple[Tensor, State]:
    """Nats of the targets ``[T, B]`` that are not PAD, ``reduction`` as of cross_entropy; and the
    state after the tokens ``[T, B]``."""
    device = model.head.weight.device
    logits, state = model(tokens.to(device), state)
    target = targets.to(device).flatten()
    loss = F.cross_entropy(logits.flatten(0, 1), target, ignore_index=PAD, reduction=reduction)
    return loss.cpu(), state


@torch.no_grad()
def evaluate_stream(model: CharRNN, pieces: Iterable[Ids]) -> tuple[float, int]:
    """:func:`evaluate` for a text of any length that arrives in pieces, in the memory of one.

    Args:
        model: of the vocabulary of the ids.
        pieces: ids, each ``[n]`` of any n.

    Returns:
        The mean loss in nats a character, NaN where nothing was predicted; and the number of
        characters predicted.

    Example:
        >>> from charrnn_fast.charlm import ModelConfig, Vocabulary, build_model, evaluate_stream
        >>> vocabulary = Vocabulary.from_text("a banana")
        >>> model = build_model(ModelConfig(len(vocabulary), hidden_size=16), seed=1)
        >>> loss, count = evaluate_stream(model, map(vocabulary.encode, ["a ban", "ana"]))
        >>> count
        7
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
    state: State | None = None
    last: Ids | None = None
    with _evaluating(model):
        rows = steps_at_once(model.config.vocab_size, 1, seq_length)
        for piece in pieces:
            if not len(piece):
                continue
            ids = piece if last is None else np.concatenate([last, piece])
            for start in range(0, len(ids) - 1, rows):
                part = to_tensor(ids[start : start + rows + 1, None])
                loss, state = losses(model, part[:-1], part[1:], state, "none")
                yield loss.numpy()
            last = ids[-1:]


@torch.no_grad()
def evaluate_lines(model: CharRNN, batches: LineBatches) -> tuple[float, int]:
    """Mean loss over lines, nats a character, the line break that ends each one included.

    Returns it and the number of characters predicted.
    """
    total, count = torch.zeros((), dtype=torch.float64), 0
    lengths = batches.ends - batches.starts + 1
    lines = np.argsort(lengths, kind="stable")
    start = 0
    with _evaluating(model):
        while start < len(lines):
            end = min(start + batches.batch_size, len(lines))
            while end > start + 1 and (end - start) * lengths[lines[end - 1]] > LINES:
                end -= 1
            batch = batches.pad(lines[start:end])
            state: State | None = None
            rows = steps_at_once(model.config.vocab_size, end - start, len(batch.tokens))
            for first in range(0, len(batch.tokens), rows):
                part = slice(first, first + rows)
                loss, state = losses(model, batch.tokens[part], batch.targets[part], state)
                total += loss
            count += batch.count
            start = end
    return total.item() / count, count


class _evaluating:
    """Within the block the model is in evaluation mode."""

    def __init__(self, model: CharRNN) -> None:
        self.model, self.training = model, model.training

    def __enter__(self) -> None:
        self.model.eval()

    def __exit__(self, *exc: object) -> None:
        self.model.train(self.training)
