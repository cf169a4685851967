"""What was built: the right instructions in the right files, the right torch, a sound package."""

import hashlib
import importlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch
from test_native import ROOT, objects

import charrnn_fast
from charrnn_fast import _extension

needs_objects = pytest.mark.skipif(
    not objects() or shutil.which("objdump") is None,
    reason="needs binutils and the source tree that was built",
)


def is_installed(name: str) -> bool:
    return bool(list(metadata.Distribution.discover(name=name)))


needs_metadata = pytest.mark.skipif(
    not is_installed("charrnn_fast"), reason="needs an installation"
)
# Instructions with a VEX or EVEX prefix, which begin with v; verr and verw are old.
VECTOR_EXTENSION = re.compile(r"^\s*[0-9a-f]+:\s+v(?!err|erw)[a-z0-9]+\s", re.MULTILINE)


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def built_objects() -> list[Path]:
    """Every object of the kernels' library and of the extension."""
    kernels = [Path(path) for path in objects()]
    binding = kernels[0].parents[1] / f"torch-{torch.__version__}"
    return [*kernels, binding / "binding.o"]


@needs_objects
def test_only_isa_files_hold_instructions_beyond_the_baseline() -> None:
    """The extension runs on every x86-64 CPU: AVX code lies behind the ISA table alone."""
    for path in built_objects():
        code = run("objdump", "-d", "--no-show-raw-insn", str(path))
        found = VECTOR_EXTENSION.search(code)
        if path.stem.startswith("isa_avx"):
            assert found, f"{path.name} has no AVX instruction: is the check still right?"
        else:
            assert not found, f"{path.name} holds {found.group().strip()}"


@needs_objects
def test_isa_files_share_no_code_with_others() -> None:
    """A weak symbol of an ISA file could be the copy that the linker keeps for every CPU."""
    for path in built_objects():
        if path.stem.startswith("isa_"):
            weak = [line for line in run("nm", "-C", str(path)).splitlines() if " W " in line]
            assert not weak, f"{path.name}: {weak}"


@needs_objects
def test_kernels_neither_allocate_nor_start_threads() -> None:
    """What the ISA files use from outside is known, and short."""
    allowed = {"memcpy", "memmove", "memset", "_GLOBAL_OFFSET_TABLE_", "__cpu_model"}
    allowed |= {"__cpu_features2", "__cpu_indicator_init", "__stack_chk_fail"}
    # The tables that one ISA takes over from another.
    allowed |= {f"_ZN12charrnn_fast10kAvx512F{bits}E" for bits in (32, 64)}
    for path in built_objects():
        if path.stem.startswith("isa_"):
            names = {line.split()[-1] for line in run("nm", "-u", str(path)).splitlines()}
            assert names <= allowed, f"{path.name} uses {sorted(names - allowed)}"


def libraries() -> tuple[Path, Path]:
    """The extension and the kernels' library, as they are loaded."""
    from charrnn_fast import _C

    return Path(_C.__file__), Path(_C.__file__).with_name(_extension.KERNELS)


@needs_objects
@pytest.mark.parametrize("which", [0, 1])
def test_libraries_are_hardened(which: int) -> None:
    """No executable stack, no writable relocations once loaded."""
    headers = run("objdump", "-p", str(libraries()[which]))
    assert re.search(r"STACK.*\n.*flags rw-", headers)
    assert "RELRO" in headers
    assert "BIND_NOW" in headers or re.search(r"FLAGS_1\s+0x0*1\b", headers)


@needs_objects
def test_the_kernels_library_exports_what_its_header_declares() -> None:
    """Three functions, under a version that is the header's digest, and nothing of torch in it."""
    binding, kernels = libraries()
    header = ROOT / "csrc" / "kernels" / "rnn.h"
    version = "RNN_H_" + hashlib.sha256(header.read_bytes()).hexdigest()[:16]
    exported = run("nm", "-DC", "--defined-only", str(kernels)).splitlines()
    functions = {line.split(maxsplit=2)[2] for line in exported if " T " in line}
    names = ("isa()", "isas()", "select_isa(char const*)")
    assert functions == {f"charrnn_fast::{name}@@{version}" for name in names}
    assert len(exported) == len(functions) + 1  # and the version
    declared = re.findall(r"^CHARRNN_FAST_EXPORT .*?(\w+)\(", header.read_text(), re.MULTILINE)
    assert sorted(declared) == sorted(name.partition("(")[0] for name in names)

    needed = re.findall(r"NEEDED\s+(\S+)", run("objdump", "-p", str(kernels)))
    assert not [name for name in needed if "torch" in name or "c10" in name or "gomp" in name]
    headers = run("objdump", "-p", str(binding))
    assert _extension.KERNELS in re.findall(r"NEEDED\s+(\S+)", headers)
    assert re.findall(r"R(?:UN)?PATH\s+(\S+)", headers) == ["$ORIGIN"]
    assert [line for line in run("nm", "-DC", str(binding)).splitlines() if f"@{version}" in line]


SUFFIX = EXTENSION_SUFFIXES[0]
KERNELS = ROOT / "csrc" / "kernels"


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
    assert "has not been built: in its source folder, run `make build`" in done.stderr


@needs_metadata
def test_few_dependencies_with_permissive_licences() -> None:
    """At run time: torch, numpy, tqdm and safetensors, and no copyleft among them."""
    needed = [
        re.split(r"[\s<>=!;\[(]", line, maxsplit=1)[0]
        for line in metadata.requires("charrnn_fast") or []
        if "extra ==" not in line and "python_version" not in line
    ]
    assert sorted(needed) == ["numpy", "safetensors", "torch", "tqdm"]
    for name in needed:
        about = metadata.metadata(name)
        licence = " ".join(
            [about.get("License-Expression") or "", about.get("License") or ""]
            + [line for line in about.get_all("Classifier") or [] if line.startswith("License")]
        )
        assert re.search(r"BSD|Apache|MIT|MPL", licence), f"{name}: {licence!r}"


@needs_metadata
def test_the_lock_names_all_that_testing_and_linting_installs() -> None:
    """Continuous integration installs known versions, of what is needed and of what that needs."""
    lock = ROOT / "requirements" / "ci.txt"
    if not lock.exists():
        pytest.skip("not run from the source tree")

    def plain(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    locked = {
        plain(line.split("==")[0])
        for line in lock.read_text(encoding="utf-8").splitlines()
        if "==" in line
    }
    # The Makefile pins torch, and the lock has what that one needs.
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    pinned = f"torch=={torch.__version__.removesuffix('+cpu')}" in makefile
    # What `make lint` uses is there once that was run.
    lint = [name for name in ("ruff", "mypy", "clang-format") if is_installed(name)]
    seen, wanted = {"torch"}, ["charrnn-fast[test]", *lint] + ["torch"] * pinned
    while wanted:
        name, _, extra = wanted.pop().partition("[")
        for line in metadata.requires(name) or []:
            needed, _, condition = line.partition(";")
            needed = plain(re.split(r"[\s<>=!~;\[(]", needed, maxsplit=1)[0])
            if "extra" in condition and f'"{extra.rstrip("]")}"' not in condition:
                continue
            if needed in seen or not is_installed(needed):
                continue
            seen.add(needed)
            wanted.append(needed)
    assert seen - {"torch"} <= locked


@needs_metadata
def test_versions_agree() -> None:
    """The package, its metadata and the changelog name one version."""
    assert metadata.version("charrnn_fast") == charrnn_fast.__version__
    changelog = ROOT / "CHANGELOG.md"
    if changelog.exists():
        assert f"## {charrnn_fast.__version__}" in changelog.read_text(encoding="utf-8")


def preflight(path: Path, python: str = sys.executable, **environment: str) -> str:
    """What tools/preflight.sh says with only these programs on PATH; one line, or nothing."""
    shell = shutil.which("sh")
    assert shell is not None
    done = subprocess.run(
        [shell, str(ROOT / "tools" / "preflight.sh"), python],
        env={"PATH": str(path), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert bool(done.stderr) == (done.returncode == 1)
    assert done.stderr.count("\n") <= 1
    return done.stderr


def program(path: Path, script: str) -> str:
    """An executable shell script."""
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(0o755)
    return str(path)


@needs_objects
def test_a_build_does_only_what_is_out_of_date(tmp_path: Path, monkeypatch) -> None:
    """A change to a source, to a header that it includes, to a command; a loss; a failure."""
    monkeypatch.syspath_prepend(str(ROOT))
    setup = importlib.import_module("setup")
    source, header = tmp_path / "a.cpp", tmp_path / "its own.h"
    source.write_text('#include "its own.h"\n', encoding="utf-8")
    compiled, linked = str(tmp_path / "made" / "a.o"), str(tmp_path / "made" / "a.so")
    done: list[str] = []
    make = setup.Step.make
    monkeypatch.setattr(setup.Step, "make", lambda step: (done.append(step.kind), make(step)))

    def build(*flags: str) -> list[str]:
        """The kinds of the steps that are done."""
        command = ["c++", "-fPIC", *flags, "-MMD", "-MF", f"{compiled}.d"]
        command += ["-c", str(source), "-o", compiled]
        steps = [  # in the wrong order
            setup.Step("link", linked, ["c++", "-shared", compiled, "-o", linked], [compiled]),
            setup.Step("compile", compiled, command, [str(source)]),
        ]
        done.clear()
        return done if setup.make_all(steps, 1) else [*done, "failed"]

    header.write_text("int a();\n", encoding="utf-8")
    assert build() == ["compile", "link"]
    assert build() == []
    assert build("-O1") == ["compile", "link"]
    header.write_text("int b();\n", encoding="utf-8")
    assert build("-O1") == ["compile", "link"]
    Path(linked).unlink()
    assert build("-O1") == ["link"]
    header.write_text("wrong\n", encoding="utf-8")
    assert build("-O1") == ["compile", "failed"]
    assert build("-O1") == ["compile", "failed"]
    header.write_text("int a();\n", encoding="utf-8")
    assert build("-O1") == ["compile", "link"]
    # A change that comes while the compiler runs is one that it may not have seen.
    os.utime(header, (time.time() + 1, time.time() + 1))
    assert build("-O1") == ["compile", "link"]


@needs_objects
def test_what_a_build_lacks_is_one_line(tmp_path: Path) -> None:
    """No compiler, one that is too old or without OpenMP, and an old Python or none."""
    assert "no C++ compiler was found; install g++ 11" in preflight(tmp_path)
    assert "named by CXX, g++-99, was not found" in preflight(tmp_path, CXX="g++-99")
    assert "nopython was not found; install Python 3.10" in preflight(tmp_path, "nopython")
    old = program(tmp_path / "old", '[ "$1" = -V ] && echo Python 3.9.2 && exit; exit 1')
    assert f"{old} is Python 3.9.2" in preflight(tmp_path, old)
    program(tmp_path / "g++", "exit 1")
    assert "g++ does not know C++20" in preflight(tmp_path)
    program(tmp_path / "g++", "read line; case $line in *omp.h*) exit 1; esac")
    assert "g++ has no OpenMP" in preflight(tmp_path)
    program(tmp_path / "g++", "exit 0")
    assert preflight(tmp_path) == ""


def test_the_table_of_tanh_is_what_its_tool_computes():
    tool = ROOT / "tools" / "tanh_table.py"
    made = subprocess.run([sys.executable, tool], capture_output=True, text=True, check=True)
    assert made.stdout == (ROOT / "csrc" / "kernels" / "tanh-table-inl.h").read_text()


def test_a_header_that_lacks_an_include_fails_lint(tmp_path: Path) -> None:
    """Without clang++ nothing is parsed: that is said, and no failure."""
    if not (ROOT / "csrc").exists():
        pytest.skip("runs apart from the sources")
    for name in ("setup.py", "tools/parse_headers.py", *map(str, KERNELS.glob("*.h"))):
        target = tmp_path / Path(name).relative_to(ROOT) if Path(name).is_absolute() else name
        (tmp_path / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / target)

    def parse(path: str) -> tuple[int, str]:
        command = [sys.executable, str(tmp_path / "tools" / "parse_headers.py")]
        done = subprocess.run(
            command, env={"PATH": path}, capture_output=True, text=True, check=False
        )
        return done.returncode, done.stdout

    code, said = parse(str(tmp_path))
    assert code == 0
    assert "clang++ was not found" in said
    clang = shutil.which("clang++")
    if clang is None:
        pytest.skip("needs clang++")
    header = tmp_path / "csrc" / "kernels" / "pack-inl.h"
    header.write_text(header.read_text().replace('#include "tile-inl.h"\n', ""))
    code, said = parse(f"{Path(clang).parent}:/usr/bin:/bin")
    assert code == 1
    assert re.search(r"[1-9]\d* failed", said)


# Where the formulas are, and where a mode's name becomes a cell.
NAMES_CELLS = {
    "kernels/rnn.h",
    "kernels/cells-inl.h",
    "cuda/cells.cuh",
    "composite.cpp",
    "layer.h",
    "layer.cpp",
}


@pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="runs apart from the sources")
def test_cells_are_named_in_few_files():
    """The cell is one parameter: no loop, tile, panel or check asks which one it is."""
    found = set()
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix in (".cpp", ".h", ".cu", ".cuh"):
            code = re.sub(r"//[^\n]*", "", path.read_text(encoding="utf-8"))
            if re.search(r"\b(k?Lstm|k?Gru|LSTM|GRU)\b", code):
                found.add(str(path.relative_to(ROOT / "csrc")))
    assert found <= NAMES_CELLS, sorted(found - NAMES_CELLS)
    assert {"kernels/rnn.h", "kernels/cells-inl.h"} <= found
