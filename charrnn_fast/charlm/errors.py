"""Errors whose cause lies with the request, not with the program."""

from __future__ import annotations


class UsageError(ValueError):
    """Something the caller can mend; the message says how. The command prints it and exits with 2.

    Example:
        >>> from charrnn_fast.charlm import SampleOptions
        >>> SampleOptions(temperature=-1)
        Traceback (most recent call last):
        charrnn_fast.charlm.errors.UsageError: --temperature must be finite and at least 0, not -1
    """


class TrainingDiverged(RuntimeError):
    """The loss became NaN, infinite, or ten times that of guessing. The last good checkpoint is
    untouched.

    Example:
        >>> from charrnn_fast.charlm import TrainingDiverged
        >>> issubclass(TrainingDiverged, RuntimeError)
        True
    """
