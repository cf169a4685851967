"""Loads the compiled extension, or says in one sentence why it cannot be."""

import hashlib
from pathlib import Path

import torch

# What Python calls is declared in these. setup.py has the same list.
INTERFACE = ("csrc/generate.cpp", "csrc/module.cpp", "csrc/ops.cpp", "csrc/short_way.cpp")


def built_with() -> str:
    """The version of torch that the extension was built with.

    Raises:
        ImportError: The extension has not been built.
    """
    return _stamp()[0]


def cuda_choice() -> str:
    """Why the extension was built with CUDA kernels, or without them."""
    return " ".join(_stamp()[2:])


def _stamp() -> list[str]:
    """What setup.py wrote beside the extension: torch's version, INTERFACE's digest, a reason."""
    try:
        return (Path(__file__).parent / "_C.torch").read_text(encoding="ascii").splitlines()
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


def check_sources(stamp: list[str], root: Path) -> None:
    """Refuses an extension that was built from other sources than lie beside the package, if any.

    Raises:
        ImportError: They differ, as they do after a pull without a build.
    """
    paths = [root / name for name in INTERFACE]
    if not all(path.exists() for path in paths):
        return
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()
    if digest not in stamp[1:]:
        raise ImportError(
            f"charrnn_fast's extension is older than the sources in {root}, or not built from "
            "them: run `make build` there, or `pip install --no-build-isolation -e .`"
        )


check(built_with(), torch.__version__)
check_sources(_stamp(), Path(__file__).parent.parent)
try:
    from charrnn_fast import _C as _C
except ImportError as error:
    raise ImportError(
        f"charrnn_fast was built with torch {built_with()}, and could not be loaded with torch "
        f"{torch.__version__}: rebuild it in this environment ({error})"
    ) from error
