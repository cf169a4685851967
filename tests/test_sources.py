"""The sources: generated code is its tool's, headers parse alone, cells are named in few files."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from built import ROOT

pytestmark = pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="runs apart from the sources")


KERNELS = ROOT / "csrc" / "kernels"


def test_the_table_of_tanh_is_what_its_tool_computes():
    tool = ROOT / "tools" / "tanh_table.py"
    made = subprocess.run([sys.executable, tool], capture_output=True, text=True, check=True)
    assert made.stdout == (ROOT / "csrc" / "kernels" / "tanh-table-inl.h").read_text()


def test_a_header_that_lacks_an_include_fails_lint(tmp_path: Path) -> None:
    """Without clang++ nothing is parsed: that is said, and no failure."""
    for path in (ROOT / "setup.py", *(ROOT / "tools").glob("*.py"), *KERNELS.glob("*.h")):
        target = tmp_path / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)  # writable, from a read-only checkout, too

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
