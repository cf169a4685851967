"""Loads the compiled extension, or says in one sentence why it cannot be.

The kernels are a shared library of their own, and the extension binds them to one minor version of
torch. A build from source has one binding, ``_C``, for the torch that was there; a wheel has
``_C_torch2_13`` and its like, one for each torch that it serves. Whichever it is, it becomes
``charrnn_fast._C``. Beside each binding lies a file, ``_C.torch``, which says how it was built.
"""

import hashlib
import importlib.util
import re
import struct
import sys
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader
from pathlib import Path

import torch

FOLDER = Path(__file__).parent
KERNELS = "libcharrnn_fast_kernels.so"

FROM_SOURCE = "in its source folder: `make rebuild`, or `pip install --no-build-isolation .`"
AGAIN = f"install charrnn_fast again, or rebuild it ({FROM_SOURCE})"


def built_with() -> str:
    """The version of torch that the extension was built with."""
    return _stamp[0]


def cuda_choice() -> str:
    """Why the extension was built with CUDA kernels, or without them."""
    return " ".join(_stamp[2:])


def choose(folder: Path, running: str) -> Path:
    """The binding in `folder` for this Python and the torch of version `running`.

    Raises:
        ImportError: There is none.
    """
    stamps = {path.stem for path in folder.glob("_C*.torch")}
    found = {path.name.partition(".")[0]: path for path in sorted(folder.glob("_C*.so"))}
    ours = {path.name.removesuffix(s): path for s in EXTENSION_SUFFIXES for path in found.values()}
    ours = {stem: path for stem, path in ours.items() if "." not in stem}
    wanted = "_C_torch" + "_".join(running.split(".")[:2])
    for stem in (wanted, "_C"):
        if stem in ours:
            return ours[stem]
    for stem in (wanted, "_C"):
        if stem in found:
            tag = re.search(r"\.cpython-(\d)(\d+)", found[stem].name)
            other = "CPython {}.{}".format(*tag.groups()) if tag else "another Python"
            this = ".".join(map(str, sys.version_info[:2]))
            raise ImportError(
                f"charrnn_fast in {folder} was built for {other} ({found[stem].name}), and this is "
                f"{sys.implementation.name} {this}: {AGAIN}"
            )
        if stem in stamps:
            raise ImportError(
                f"charrnn_fast in {folder} is incomplete, {stem}{EXTENSION_SUFFIXES[0]} is "
                f"missing: {AGAIN}"
            )
    minors = sorted(
        tuple(map(int, stem.removeprefix("_C_torch").split("_"))) for stem in stamps - {"_C"}
    )
    if minors:
        served = ", ".join(".".join(map(str, minor)) for minor in minors)
        raise ImportError(
            f"charrnn_fast has bindings for torch {served}, and none for torch {running}: install "
            "one of these versions of torch, or a charrnn_fast that serves yours, or build it with "
            "yours (in its source folder: `pip install --no-build-isolation .`)"
        )
    raise ImportError(
        f"charrnn_fast's extension has not been built in {folder}: "
        "in its source folder, run `make build`, or `pip install --no-build-isolation -e .`; "
        "an installed one is found where Python is started outside that folder"
    )


def read_stamp(binding: Path) -> list[str]:
    """What setup.py wrote beside it: torch's version, a digest of the interface, a reason.

    Raises:
        ImportError: It is not there.
    """
    path = binding.with_name(binding.name.partition(".")[0] + ".torch")
    try:
        return path.read_text(encoding="ascii").splitlines()
    except FileNotFoundError:
        raise ImportError(
            f"charrnn_fast in {path.parent} is incomplete, {path.name} is missing: {AGAIN}"
        ) from None


def check(built: str, running: str) -> None:
    """Refuses another torch than at the build: the C++ interface differs by minor version.

    Raises:
        ImportError: The versions do not go together.
    """
    if built.split(".")[:2] != running.split(".")[:2]:
        raise ImportError(
            f"charrnn_fast was built with torch {built} and cannot run with torch {running}: "
            f"rebuild it in this environment ({FROM_SOURCE})"
        )


def interface_digest(root: Path) -> str | None:
    """Of the sources below `root` that declare what Python calls; None where there are none."""
    texts = [path.read_bytes() for path in sorted(root.glob("csrc/*.cpp"))]
    texts = [text for text in texts if b"m.def(" in text]
    return hashlib.sha256(b"".join(texts)).hexdigest() if texts else None


def check_sources(stamp: list[str], root: Path) -> None:
    """Refuses an extension that was built from other sources than lie beside the package, if any.

    Raises:
        ImportError: They differ, as they do after a pull without a build.
    """
    digest = interface_digest(root)
    if digest is not None and digest not in stamp[1:]:
        raise ImportError(
            f"charrnn_fast's extension is older than the sources in {root}, or not built from "
            "them: run `make build` there, or `pip install --no-build-isolation -e .`"
        )


def check_whole(path: Path) -> None:
    """Refuses a shared library that is missing or cut off, which the loader may die of.

    Raises:
        ImportError: It is.
    """
    if not path.exists():
        raise ImportError(
            f"charrnn_fast in {path.parent} is incomplete, {path.name} is missing: {AGAIN}"
        )
    size = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(64)
        whole = len(header) == 64 and header[:4] == b"\x7fELF"
        if whole:
            # ELF64: where the tables of segments and of sections begin, and their sizes.
            segments, sections = struct.unpack_from("=QQ", header, 0x20)
            entry, count, section_entry, section_count = struct.unpack_from("=4H", header, 0x36)
            file.seek(segments)
            table = file.read(entry * count)
            # In each segment: its offset and its size in the file.
            ends = [sections + section_entry * section_count, segments + entry * count]
            ends += [
                sum(struct.unpack_from("=Q16xQ", table, at + 8))
                for at in range(0, len(table) - entry + 1, entry)
            ]
            whole = max(ends) <= size
    if not whole:
        raise ImportError(
            f"charrnn_fast in {path.parent} is damaged, {path.name} is no whole library: {AGAIN}"
        )


def load(binding: Path) -> None:
    """Makes `binding` the module ``charrnn_fast._C``.

    Raises:
        ImportError: It cannot be loaded, or the kernels' library beside it cannot.
    """
    kernels = binding.with_name(KERNELS)
    check_whole(binding)
    check_whole(kernels)
    # Not by its own name: the module's, by which its first function is found, is always _C.
    name = f"{__package__}._C"
    spec = importlib.util.spec_from_file_location(
        name, binding, loader=ExtensionFileLoader(name, str(binding))
    )
    assert spec is not None
    assert spec.loader is not None
    try:
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    except ImportError as error:
        sys.modules.pop(name, None)
        if "RNN_H_" in str(error):
            raise ImportError(
                f"charrnn_fast in {binding.parent} is of two builds, {KERNELS} is not of that of "
                f"{binding.name}: {AGAIN}"
            ) from error
        raise ImportError(
            f"charrnn_fast was built with torch {read_stamp(binding)[0]}, and could not be loaded "
            f"with torch {torch.__version__}: rebuild it in this environment ({error})"
        ) from error
    setattr(sys.modules[__package__], "_C", module)  # noqa: B010  as the import system does


_binding = choose(FOLDER, torch.__version__)
_stamp = read_stamp(_binding)
check(built_with(), torch.__version__)
check_sources(_stamp, FOLDER.parent)
load(_binding)

from charrnn_fast import _C as _C  # noqa: E402
