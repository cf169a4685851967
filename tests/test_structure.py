"""What the tree promises to a reader: where things may be named."""

import re
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[1] / "csrc"
# A second cell is not a second copy: all other code asks sizes_of() and the cell it is given.
NAMES_CELLS = {
    "kernels/rnn.h",  # the numbers of each cell
    "kernels/cells-inl.h",  # the formulas of the kernels
    "composite.cpp",  # the formulas in tensors
    "layer.cpp",  # where modes are parsed
}


@pytest.mark.skipif(not CSRC.is_dir(), reason="not run from a source tree")
def test_where_cells_are_named() -> None:
    """LSTM and GRU are named where their formulas and numbers are, and nowhere else in csrc."""
    naming = re.compile(r"\b(Lstm|Gru|kLstm|kGru)\b")
    found = {
        path.relative_to(CSRC).as_posix()
        for path in CSRC.rglob("*")
        if path.is_file() and naming.search(path.read_text(encoding="utf-8"))
    }
    assert found == NAMES_CELLS
