"""Loads the compiled extension, or says in one sentence why it cannot be."""

from pathlib import Path

import torch


def built_with() -> str:
    """The version of torch that the extension was built with.

    Raises:
        ImportError: The extension has not been built.
    """
    try:
        return (Path(__file__).parent / "_C.torch").read_text(encoding="ascii").strip()
    except FileNotFoundError:
        raise ImportError(
            "charrnn_fast's extension has not been built: in its source folder, run `make build`, "
            "or `pip install --no-build-isolation -e .`"
        ) from None


def check(built: str, running: str) -> None:
    """Refuses another torch than at the build: the C++ interface differs by minor version.

    Raises:
        ImportError: The versions do not go together.
    """
    if built.split(".")[:2] != running.split(".")[:2]:
        raise ImportError(
            f"charrnn_fast was built with torch {built} and cannot run with torch {running}: "
            "rebuild it in this environment (in its source folder: `make rebuild`, or "
            "`pip install --no-build-isolation .`)"
        )


check(built_with(), torch.__version__)
try:
    from charrnn_fast import _C as _C
except ImportError as error:
    raise ImportError(
        f"charrnn_fast was built with torch {built_with()}, and could not be loaded with torch "
        f"{torch.__version__}: rebuild it in this environment ({error})"
    ) from error
