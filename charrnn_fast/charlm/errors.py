"""Errors whose cause lies with the request, not with the program."""

from __future__ import annotations


class UsageError(ValueError):
    """Something the caller can mend; the message says how. The CLI prints it and exits with 2."""


class TrainingDiverged(RuntimeError):
    """The loss became NaN or exploded. The last good checkpoint is untouched."""
