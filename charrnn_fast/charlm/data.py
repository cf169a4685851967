"""Text as arrays of ids, and the batches that training reads from them."""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor

from .errors import UsageError
from .options import TrainOptions, saved_options
from .vocabulary import CHUNK, MAX_CODE_POINT, ByteVocabulary, Ids, OnUnknown, Vocabulary
from .vocabulary import code_points as to_code_points

PAD = -100  # the target of a padded position: what cross_entropy ignores


def builtin_text() -> str:
    """Some 465 thousand characters of English that come with Python: its documentation's topics.

    Example:
        >>> from charrnn_fast.charlm import builtin_text
        >>> len(builtin_text()) > 400_000
        True
    """
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def text_pieces(path: str | Path | None) -> Iterator[str]:
    """The text of a UTF-8 file, or the built-in one for None, in pieces of at most ``CHUNK``.

    Raises UsageError if there is no such file, or it is no UTF-8.
    """
    if path is None:
        text = builtin_text()
        yield from (text[start : start + CHUNK] for start in range(0, len(text), CHUNK))
        return
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    read = 0
    with _open(path) as file:
        while piece := file.read(CHUNK):
            yield _decode(decoder, piece, path, read)
            read += len(piece)
    _decode(decoder, b"", path, read)


def _open(path: str | Path) -> BinaryIO:
    path = Path(path)
    if not path.exists():
        raise UsageError(f"no such file: {path}")
    if not path.is_file():
        raise UsageError(f"not a regular file: {path}")
    return path.open("rb")


def _decode(decoder: codecs.IncrementalDecoder, piece: bytes, path: str | Path, offset: int) -> str:
    try:
        return decoder.decode(piece, final=not piece)
    except UnicodeDecodeError as error:
        where = offset + error.start
        raise UsageError(
            f"{path} is not UTF-8 near byte {where}; convert it, or read it with --bytes"
        ) from None


class Corpus(NamedTuple):
    """A text: ``ids[n]`` is the id of its n-th character."""

    vocabulary: Vocabulary
    ids: Ids


def load_corpus(
    path: str | Path | None = None, byte_mode: bool = False, known: Vocabulary | None = None
) -> Corpus:
    """Reads a text, and makes the vocabulary of its characters.

    The file is read twice, piece by piece, so that memory stays near one id a character.

    Args:
        path: of a UTF-8 file; None: the built-in text.
        byte_mode: whether the ids are the bytes of the file, which then may be any.
        known: a vocabulary whose characters are part of the new one, too.

    Raises:
        UsageError: there is no such file, it is no UTF-8, or has fewer than two characters.

    Example:
        >>> import pathlib, tempfile
        >>> from charrnn_fast.charlm import load_corpus
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "text")
        ...     _ = path.write_text("a banana", encoding="utf-8")
        ...     corpus = load_corpus(path)
        >>> corpus.vocabulary, corpus.ids
        (Vocabulary(' abn'), array([1, 0, 2, 1, 3, 1, 3, 1], dtype=uint8))
    """
    vocabulary: Vocabulary
    ids: Ids
    if byte_mode:
        vocabulary = ByteVocabulary()
        if path is None:
            ids = vocabulary.encode(builtin_text())
        else:
            with _open(path) as file:
                ids = np.fromfile(file, dtype=np.uint8)
    else:
        seen = np.zeros(MAX_CODE_POINT + 1, dtype=bool)
        length = 0
        for piece in text_pieces(path):
            seen[to_code_points(piece)] = True
            length += len(piece)
        if length == 0:
            raise UsageError(f"the text is empty: {path}")
        characters = "".join(map(chr, np.flatnonzero(seen)))
        vocabulary = Vocabulary(characters + (known.characters if known else ""))
        ids = np.empty(length, dtype=vocabulary.dtype)
        start = 0
        for piece in text_pieces(path):
            end = start + len(piece)
            if end > length or not seen[to_code_points(piece)].all():
                raise changed(path)
            ids[start:end] = vocabulary.encode(piece)
            start = end
        if start < length:
            raise changed(path)
    if len(ids) < 2:
        what = "is empty" if len(ids) == 0 else "has a single character"
        raise UsageError(f"the text {what}: {path}; two are the least there is to predict")
    return Corpus(vocabulary, ids)


def changed(path: str | Path | None) -> UsageError:
    return UsageError(f"{path} changed while it was read: try again when it is complete")


def encode_file(
    path: str | Path | None, vocabulary: Vocabulary, on_unknown: OnUnknown = "error"
) -> Iterator[Ids]:
    """The ids of a file, piece by piece, with a vocabulary made elsewhere.

    Args:
        path: of a UTF-8 file, of any file for a :class:`ByteVocabulary`; None: the built-in text.
        vocabulary: that of a model.
        on_unknown: as of :meth:`Vocabulary.encode`.

    Raises:
        UsageError: there is no such file, it is no UTF-8, or a character is unknown.
    """
    if isinstance(vocabulary, ByteVocabulary) and path is not None:
        with _open(path) as file:
            while piece := file.read(CHUNK):
                yield np.frombuffer(piece, dtype=np.uint8)
        return
    for text in text_pieces(path):
        yield vocabulary.encode(text, on_unknown)


def read_prompt(path: str | Path, vocabulary: Vocabulary) -> str:
    """The text of a file, to continue; in byte mode any file, as ``vocabulary`` encodes it."""
    if isinstance(vocabulary, ByteVocabulary):
        with _open(path) as file:
            return file.read().decode("utf-8", "surrogateescape")
    return "".join(text_pieces(path))


def split(ids: Ids, fraction: float) -> tuple[Ids, Ids]:
    """The first part, to train on, and the last ``fraction`` of the text, held out."""
    cut = len(ids) - int(len(ids) * fraction)
    return ids[:cut], ids[cut:]


def text_hash(ids: Ids) -> str:
    """SHA-256 of a text's ids: whether a text is still the one that a run was trained on."""
    return hashlib.sha256(np.ascontiguousarray(ids).data).hexdigest()


def to_tensor(ids: Ids, device: torch.device | str = "cpu") -> Tensor:
    """Ids as int64, row-major, whatever the strides of the view."""
    return torch.from_numpy(ids.astype(np.int64, order="C")).to(device)


@dataclass(slots=True)
class Batch:
    """One step of training, for all processes together."""

    tokens: Tensor  # int64 [T, B]
    targets: Tensor  # int64 [T, B]: the characters that follow; PAD where there is none
    count: int  # targets that are not PAD
    fresh: bool  # the sequences begin here: the carried state is to be dropped


class Batches(Protocol):
    """An epoch of batches by index, the same ones whenever asked: training resumes anywhere."""

    batch_size: int

    def __len__(self) -> int: ...

    def batch(self, epoch: int, index: int) -> Batch: ...


@dataclass
class StreamBatches:
    """The text cut into B streams that run side by side, T characters a step.

    Stream b of batch i+1 begins where stream b of batch i ended, so the hidden state carries over.
    ``batch_size`` shrinks to what the text is long enough for.
    """

    ids: Ids
    batch_size: int
    seq_length: int

    def __post_init__(self) -> None:
        usable = len(self.ids) - 1
        if usable < self.seq_length:
            raise UsageError(
                f"{len(self.ids)} characters to train on are too few for one sequence of "
                f"{self.seq_length}; give more text or a smaller --seq-length"
            )
        self.batch_size = min(self.batch_size, usable // self.seq_length)
        length = usable // self.batch_size
        used = length * self.batch_size
        # [length + 1, B], a view: a stream, and the character after it.
        self._streams = sliding_window_view(self.ids[: used + 1], length + 1)[::length].T
        self._steps = length // self.seq_length

    def __len__(self) -> int:
        return self._steps

    def batch(self, epoch: int, index: int) -> Batch:
        start = index * self.seq_length
        rows = to_tensor(self._streams[start : start + self.seq_length + 1])
        return Batch(rows[:-1], rows[1:], self.seq_length * self.batch_size, fresh=index == 0)


class LineBatches:
    """Every line is an example of its own: it follows a line break and ends with one.

    Lines are shuffled each epoch by ``seed``, and padded to the longest of their batch; padding
    does not count in the loss. ``line_break`` is the id of the line break.
    """

    def __init__(self, ids: Ids, batch_size: int, line_break: int, seed: int) -> None:
        ends = np.flatnonzero(ids == line_break)
        starts = np.concatenate([[0], ends + 1])
        ends = np.concatenate([ends, [len(ids)]])
        filled = ends > starts
        self.starts, self.ends = starts[filled], ends[filled]
        if not len(self.starts):
            raise UsageError("the text has no line that is not empty")
        self.ids, self.batch_size = ids, min(batch_size, len(self.starts))
        self.line_break, self.seed = line_break, seed
        self._order: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return -(-len(self.starts) // self.batch_size)

    def batch(self, epoch: int, index: int) -> Batch:
        if self._order is None or self._order[0] != epoch:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.starts))
            self._order = (epoch, order)
        n, m = len(self.starts), len(self)
        return self.pad(self._order[1][index * n // m : (index + 1) * n // m])

    def pad(self, lines: np.ndarray) -> Batch:
        """The batch of the given lines, whatever the order of the epoch."""
        width = int((self.ends[lines] - self.starts[lines]).max()) + 1
        tokens = np.full((width, len(lines)), self.line_break, dtype=np.int64)
        targets = np.full((width, len(lines)), PAD, dtype=np.int64)
        count = 0
        for column, line in enumerate(lines):
            text = self.ids[self.starts[line] : self.ends[line]]
            tokens[1 : len(text) + 1, column] = text
            targets[: len(text), column] = text
            targets[len(text), column] = self.line_break
            count += len(text) + 1
        return Batch(torch.from_numpy(tokens), torch.from_numpy(targets), count, fresh=True)


def prepare(
    options: TrainOptions, vocabulary: Vocabulary, ids: Ids
) -> tuple[Batches, Ids | LineBatches | None]:
    """Batches to train on, and the held-out part; None where that is too short to predict."""
    train, held_out = split(ids, options.val_fraction)
    if not options.lines:
        batches = StreamBatches(train, options.batch_size, options.seq_length)
        return batches, held_out if len(held_out) > 1 else None
    end = line_break(vocabulary)
    cut = len(train) - int((train[::-1] == end).argmax()) if end in train else len(train)
    lines = LineBatches(ids[:cut], options.batch_size, end, options.seed)
    rest = ids[cut:]
    return lines, LineBatches(rest, options.batch_size, end, 0) if (rest != end).any() else None


def line_break(vocabulary: Vocabulary) -> int:
    """The id that ends a line; UsageError where there is none."""
    end = vocabulary.characters.find("\n")
    if end < 0:
        raise UsageError("--lines needs a text with line breaks")
    return end


def held_out_part(saved: dict[str, Any], vocabulary: Vocabulary) -> Ids | LineBatches:
    """The held-out part of a run's text, by the options in its config.json.

    UsageError where the text has moved or changed, or nothing was held out.
    """
    if not saved:
        raise UsageError("this folder holds a model without its training: name a text")
    options = saved_options(saved)
    corpus = load_corpus(options.text, options.bytes, vocabulary)
    if text_hash(corpus.ids) != saved.get("text_sha256"):
        raise UsageError(f"{options.text or 'the built-in text'} has changed since the training")
    _, part = prepare(options, corpus.vocabulary, corpus.ids)
    if part is None:
        raise UsageError("nothing was held out in this training: name a text")
    return part
