"""Values that a caller gives, as plain Python ones: checked before anything is done with them."""

from __future__ import annotations

import math
import numbers
import operator
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from .errors import UsageError

MOST = 2**63 - 1  # what PyTorch, NumPy and the kernels hold a number in


def whole(name: str, value: Any, least: int = 0, most: int = MOST) -> int:
    """A whole number, NumPy's among them; no bool, and no float however round."""
    try:
        if is_bool(value):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise UsageError(f"{name} must be a whole number, not {value!r}") from None
    if not least <= number <= most:
        if most == MOST:
            limit = f"at least {least}" if number < least else "below 2^63"
        else:
            limit = f"in [{least}, {most}]"
        raise UsageError(f"{name} must be {limit}, not {number}")
    return number


def real(
    name: str,
    value: Any,
    least: float = 0.0,
    below: float = math.inf,
    *,
    open: bool = False,
    closed: bool = False,
) -> float:
    """A finite number of [least, below); ``open`` leaves out ``least``, ``closed`` adds ``below``.

    No bool, and no text.
    """
    if is_bool(value) or not isinstance(value, numbers.Real):
        raise UsageError(f"{name} must be a number, not {value!r}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    inside = least < number if open else least <= number
    if not (inside and (number < below or (closed and number == below))):
        if below == math.inf:
            limit = "positive and finite" if open else "finite"
            limit += f" and at least {least:g}" if not open and least > -math.inf else ""
        else:
            limit = f"in {'(' if open else '['}{least:g}, {below:g}{']' if closed else ')'}"
        raise UsageError(f"{name} must be {limit}, not {value!r}")
    return number


def flag(name: str, value: Any) -> bool:
    if not is_bool(value):
        raise UsageError(f"{name} must be true or false, not {value!r}")
    return bool(value)


def one_of(name: str, value: Any, choices: Sequence[str]) -> str:
    if not isinstance(value, str) or value not in choices:
        raise UsageError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
    return str(value)


def path(name: str, value: Any) -> str:
    """A path, of any class, as text."""
    try:
        found = os.fsdecode(value)
    except TypeError:
        raise UsageError(f"{name} must be a path, not {value!r}") from None
    if not found or "\0" in found:
        raise UsageError(f"{name} must be a path, not {found!r}")
    return found


def device(name: str, value: Any) -> str:
    if not isinstance(value, (str, torch.device)):
        raise UsageError(f"{name} must be a device, not {value!r}")
    return str(value)


def is_bool(value: Any) -> bool:
    return isinstance(value, (bool, np.bool_))
