"""Characters to ids and back, vectorised."""

from __future__ import annotations

import codecs
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from .errors import UsageError

Ids = npt.NDArray[np.unsignedinteger[Any]]
OnUnknown = Literal["error", "skip", "replace"]

CHUNK = 1 << 20  # characters handled at once: bounds the memory of a conversion
MAX_CODE_POINT = 0x10FFFF


def code_points(text: str) -> npt.NDArray[np.uint32]:
    """The code points of ``text``, ``[len(text)]``."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def show(characters: Iterable[str], limit: int = 10) -> str:
    """Characters as a message can hold them: ``'é' (U+00E9), ...``, at most ``limit`` of them."""
    characters = list(characters)
    named = [f"{c!r} (U+{ord(c):04X})" for c in characters[:limit]]
    more = len(characters) - limit
    return ", ".join(named) + (f" and {more} more" if more > 0 else "")


class Vocabulary:
    """A fixed set of characters; ids are their ranks in code point order.

    Ids have the smallest of the types uint8, uint16 and uint32 that holds them all.

    Args:
        characters: in any order; what occurs twice counts once.

    Attributes:
        characters: all of them, in order of their ids.

    Raises:
        UsageError: there is no character.

    Example:
        >>> from charrnn_fast.charlm import Vocabulary
        >>> vocabulary = Vocabulary.from_text("a banana")
        >>> vocabulary
        Vocabulary(' abn')
        >>> ids = vocabulary.encode("nab")
        >>> ids, vocabulary.decode(ids)
        (array([3, 1, 2], dtype=uint8), 'nab')
    """

    kind = "characters"

    def __init__(self, characters: Iterable[str]) -> None:
        self.characters = "".join(sorted(set(characters)))
        if not self.characters:
            raise UsageError("a vocabulary needs at least one character")
        self._codes = code_points(self.characters)
        self.dtype: np.dtype[np.unsignedinteger[Any]] = np.min_scalar_type(len(self) - 1)
        # One entry for every code point up to the greatest known one, and one for all beyond.
        self._table = np.full(int(self._codes[-1]) + 2, -1, dtype=np.int32)
        self._table[self._codes] = np.arange(len(self._codes), dtype=np.int32)

    @classmethod
    def from_text(cls, text: str) -> Vocabulary:
        """The characters that occur in ``text``."""
        seen = np.zeros(MAX_CODE_POINT + 1, dtype=bool)
        for start in range(0, len(text), CHUNK):
            seen[code_points(text[start : start + CHUNK])] = True
        return cls(map(chr, np.flatnonzero(seen)))

    def __len__(self) -> int:
        return len(self.characters)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Vocabulary)
            and self.kind == other.kind
            and self.characters == other.characters
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.characters!r})"

    @property
    def replacement(self) -> int:
        """The id that stands for unknown characters under ``'replace'``: a space's, or else 0."""
        return max(self.characters.find(" "), 0)

    def encode(self, text: str, on_unknown: OnUnknown = "error") -> Ids:
        """Ids of ``text``, ``[len(text)]``, or fewer with ``skip``.

        Args:
            text: what to encode.
            on_unknown: what becomes of characters outside the vocabulary: ``'error'`` raises
                UsageError naming them, ``'skip'`` drops them, ``'replace'`` puts
                :attr:`replacement` there.

        Raises:
            UsageError: characters are unknown and ``on_unknown`` is ``'error'``.
        """
        if on_unknown not in ("error", "skip", "replace"):
            raise UsageError(f"on_unknown is error, skip or replace, not {on_unknown!r}")
        chunks = [
            self._encode(text[start : start + CHUNK], on_unknown)
            for start in range(0, len(text), CHUNK)
        ]
        return np.concatenate(chunks) if chunks else np.empty(0, dtype=self.dtype)

    def _encode(self, text: str, on_unknown: OnUnknown) -> Ids:
        codes = code_points(text)
        ids = self._table[np.minimum(codes, len(self._table) - 1)]
        unknown = ids < 0
        if unknown.any():
            if on_unknown == "error":
                names = show(map(chr, np.unique(codes[unknown])))
                raise UsageError(
                    f"not in the vocabulary: {names}; to go on without, "
                    "use --on-unknown skip or replace"
                )
            if on_unknown == "skip":
                ids = ids[~unknown]
            else:
                ids[unknown] = self.replacement
        return ids.astype(self.dtype)

    def decode(self, ids: npt.ArrayLike) -> str:
        """The text of integer ``ids`` of any shape, read in C order.

        Raises:
            IndexError: an id is outside of the vocabulary.
        """
        flat = np.asarray(ids, dtype=np.int64).ravel()
        if flat.size and (flat.min() < 0 or flat.max() >= len(self)):
            raise IndexError(f"ids must lie in [0, {len(self)})")
        return self._codes[flat].astype("<u4").tobytes().decode("utf-32-le", "surrogatepass")

    def decoder(self, errors: str = "replace") -> Decoder:
        """A function that decodes a stream of ids piece by piece. ``errors`` is that of
        ``bytes.decode``, for :class:`ByteVocabulary`."""
        return Decoder(self, errors)

    def to_json(self) -> dict[str, Any]:
        """What ``vocab.json`` of a run holds."""
        return {"kind": self.kind, "characters": self.characters}

    @staticmethod
    def from_json(value: dict[str, Any]) -> Vocabulary:
        """The inverse of :meth:`to_json`; UsageError for anything else."""
        match value:
            case {"kind": "characters", "characters": str(characters)}:
                return Vocabulary(characters)
            case {"kind": "bytes"}:
                return ByteVocabulary()
        raise UsageError("this is no vocabulary: expected a kind and its characters")


class ByteVocabulary(Vocabulary):
    """The 256 bytes. Text is its UTF-8 encoding, so nothing is ever unknown.

    Example:
        >>> from charrnn_fast.charlm import ByteVocabulary
        >>> vocabulary = ByteVocabulary()
        >>> vocabulary.encode("é")
        array([195, 169], dtype=uint8)
        >>> len(vocabulary)
        256
    """

    kind = "bytes"

    def __init__(self) -> None:
        super().__init__(map(chr, range(256)))

    def __repr__(self) -> str:
        return "ByteVocabulary()"

    def _encode(self, text: str, on_unknown: OnUnknown) -> Ids:
        return np.frombuffer(text.encode("utf-8", "surrogateescape"), dtype=np.uint8)

    def decode(self, ids: npt.ArrayLike) -> str:
        """The text of ``ids``; bytes that are no UTF-8 become U+FFFD."""
        return bytes(np.asarray(ids, dtype=np.int64).ravel().tolist()).decode("utf-8", "replace")

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind}


class Decoder:
    """Text from successive pieces of one stream of ids.

    In byte mode a character may be split between two pieces; it appears with the second.
    """

    def __init__(self, vocabulary: Vocabulary, errors: str = "replace") -> None:
        self._vocabulary = vocabulary
        self._utf8 = (
            codecs.getincrementaldecoder("utf-8")(errors)
            if isinstance(vocabulary, ByteVocabulary)
            else None
        )

    def __call__(self, ids: npt.ArrayLike, final: bool = False) -> str:
        if self._utf8 is None:
            return self._vocabulary.decode(ids)
        piece = bytes(np.asarray(ids, dtype=np.int64).ravel().tolist())
        return self._utf8.decode(piece, final)
