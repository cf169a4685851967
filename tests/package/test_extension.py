"""The binding for the running torch is loaded; what cannot be loaded is one sentence."""

import hashlib
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch
from built import ROOT, libraries, needs_objects, run

import charrnn_fast
from charrnn_fast import _extension

SUFFIX = EXTENSION_SUFFIXES[0]


def folder_of(path: Path, *names: str) -> Path:
    """A folder with empty files of these names."""
    for name in names:
        (path / name).touch()
    return path


@pytest.mark.parametrize(
    ("running", "chosen"),
    [("2.13.0+cpu", "_C_torch2_13"), ("2.9.1", "_C_torch2_9"), ("2.14.1", "_C")],
)
def test_the_binding_of_the_running_torch_is_chosen(
    tmp_path: Path, running: str, chosen: str
) -> None:
    """Of a wheel's bindings, that of the minor version; else the one that was built from source."""
    stems = ("_C_torch2_13", "_C_torch2_9", "_C")
    folder_of(tmp_path, *(stem + SUFFIX for stem in stems), *(f"{stem}.torch" for stem in stems))
    assert _extension.choose(tmp_path, running).name == chosen + SUFFIX


@pytest.mark.parametrize("running", ["2.9.1", "2.15.0a0+git", "3.0.0"])
def test_a_torch_that_a_wheel_does_not_serve_is_one_sentence(tmp_path: Path, running: str) -> None:
    """It names those that are served, in order, and the ways out."""
    stems = ("_C_torch2_14", "_C_torch2_10")
    folder_of(tmp_path, *(stem + SUFFIX for stem in stems), *(f"{stem}.torch" for stem in stems))
    message = (
        rf"^charrnn_fast has bindings for torch 2\.10, 2\.14, and none for torch "
        rf"{re.escape(running)}: install one of these versions of torch, or .*, or build it"
    )
    with pytest.raises(ImportError, match=message):
        _extension.choose(tmp_path, running)


@pytest.mark.parametrize("stem", ["_C", "_C_torch2_13"])
def test_a_binary_of_another_python_is_named(tmp_path: Path, stem: str) -> None:
    """Not as missing, and not as a circular import."""
    other = f"{stem}.cpython-39-x86_64-linux-gnu.so"
    folder_of(tmp_path, other, f"{stem}.torch")
    with pytest.raises(ImportError, match=rf"was built for CPython 3\.9 \({re.escape(other)}\)"):
        _extension.choose(tmp_path, "2.13.0")
    (tmp_path / other).unlink()
    with pytest.raises(ImportError, match=rf"is incomplete, {stem}\.cpython.* is missing: install"):
        _extension.choose(tmp_path, "2.13.0")


def test_one_sentence_on_every_broken_installation(tmp_path: Path) -> None:
    """Each part missing or cut off, and parts of two builds; the copy that was left whole loads."""
    binding, kernels = libraries()
    stem = binding.name.partition(".")[0]
    installed = binding.parent
    version = re.search(rb"RNN_H_[0-9a-f]{16}", kernels.read_bytes())
    assert version is not None

    def cut(path: Path, size: int) -> None:
        path.write_bytes(path.read_bytes()[:size])

    def other_header(path: Path) -> None:
        path.write_bytes(path.read_bytes().replace(version.group(), b"RNN_H_" + b"0" * 16))

    def rename(path: Path) -> None:
        path.rename(path.with_name(f"{stem}.cpython-39-x86_64-linux-gnu.so"))

    size = binding.stat().st_size
    cases: list[tuple[str, Callable[[Path], None], str]] = [
        (binding.name, Path.unlink, "is incomplete, .* is missing: install"),
        (binding.name, rename, r"was built for CPython 3\.9"),
        (binding.name, lambda path: cut(path, 0), "is damaged, .* is no whole library: install"),
        (binding.name, lambda path: cut(path, size // 2), "is damaged, .* is no whole library"),
        (binding.name, lambda path: cut(path, size - 1), "is damaged, .* is no whole library"),
        (binding.name, lambda path: path.write_bytes(b"x" * size), "is damaged"),
        (kernels.name, Path.unlink, "is incomplete, lib.* is missing: install"),
        (kernels.name, lambda path: cut(path, 100000), "is damaged, lib.* is no whole library"),
        (kernels.name, other_header, "is of two builds, lib.* is not of that of _C.*: install"),
        (f"{stem}.torch", Path.unlink, r"is incomplete, _C.*\.torch is missing: install"),
        ("py.typed", lambda path: None, "loads"),
    ]
    for number, (name, damage, _) in enumerate(cases):
        copy = tmp_path / str(number) / "charrnn_fast"
        shutil.copytree(installed, copy, ignore=shutil.ignore_patterns("__pycache__", "charlm"))
        damage(copy / name)
    script = """
import sys, torch
for number in range(int(sys.argv[1])):
    sys.path.insert(0, f"{sys.argv[2]}/{number}")
    for name in [name for name in sys.modules if name.partition(".")[0] == "charrnn_fast"]:
        del sys.modules[name]
    try:
        import charrnn_fast
        print("loads")
    except ImportError as error:
        print(*str(error).splitlines())
"""
    printed = run(sys.executable, "-c", script, str(len(cases)), str(tmp_path)).splitlines()
    for number, (line, (name, _, message)) in enumerate(zip(printed, cases, strict=True)):
        assert re.search(message, line), (number, name, line)
        assert "circular" not in line


@pytest.mark.parametrize("running", ["2.9.1", "2.14.0+cu130", "3.0.0"])
def test_another_torch_is_one_sentence(running: str) -> None:
    """An extension for another torch is refused before it is loaded."""
    with pytest.raises(
        ImportError, match=rf"with torch 2\.13\.0.* torch {re.escape(running)}: rebuild"
    ):
        _extension.check("2.13.0+cpu", running)


@pytest.mark.parametrize("running", ["2.13.0", "2.13.1+cu130"])
def test_a_patch_release_of_torch_is_accepted(running: str) -> None:
    """The C++ interface holds within a minor version."""
    _extension.check("2.13.0+cpu", running)


def test_the_extension_says_what_it_was_built_with() -> None:
    """The file beside the extension is of this build, or of a patch release beside this one."""
    assert _extension.built_with().split(".")[:2] == torch.__version__.split(".")[:2]


def test_a_stale_extension_is_one_sentence(tmp_path: Path) -> None:
    """After a pull without a build, what was built before is refused before it is loaded."""
    _extension.check_sources([torch.__version__], tmp_path)  # no sources, as where wheels go
    declares = tmp_path / "csrc" / "ops.cpp"
    declares.parent.mkdir()
    declares.write_text('m.def("an op");\n', encoding="utf-8")
    digest = hashlib.sha256(declares.read_bytes()).hexdigest()
    # What declares nothing may change without the Python files knowing.
    (tmp_path / "csrc" / "kernels.cpp").write_text("int kernel();\n", encoding="utf-8")
    _extension.check_sources([torch.__version__, digest], tmp_path)
    declares.write_text('m.def("another op");\n', encoding="utf-8")
    for stamp in ([torch.__version__, digest], [torch.__version__]):
        with pytest.raises(ImportError, match=r"is older than the sources in .*: run `make build`"):
            _extension.check_sources(stamp, tmp_path)


@needs_objects
def test_the_extension_goes_with_its_sources() -> None:
    """The digest beside the extension is that of the sources that it was built from."""
    stamp = Path(_extension.__file__).with_name("_C.torch").read_text(encoding="ascii").splitlines()
    assert stamp[:2] == [torch.__version__, _extension.interface_digest(ROOT)]


def test_a_missing_extension_is_one_sentence(tmp_path: Path) -> None:
    """A source folder that was not built says what to do."""
    shutil.copytree(
        Path(charrnn_fast.__file__).parent,
        tmp_path / "charrnn_fast",
        ignore=shutil.ignore_patterns("*.so", "_C*.torch"),
    )
    command = [sys.executable, "-c", "import charrnn_fast._extension"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "has not been built in " in done.stderr
    assert "in its source folder, run `make build`" in done.stderr
    assert "where Python is started outside that folder" in done.stderr
