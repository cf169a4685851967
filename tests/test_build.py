"""What was built: the right instructions in the right files, and no symbol too many."""

import hashlib
import re
from pathlib import Path

import pytest
import torch
from built import ROOT, libraries, needs_objects, objects, run

from charrnn_fast import _extension

# Instructions with a VEX or EVEX prefix, which begin with v; verr and verw are old.
VECTOR_EXTENSION = re.compile(r"^\s*[0-9a-f]+:\s+v(?!err|erw)[a-z0-9]+\s", re.MULTILINE)


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
