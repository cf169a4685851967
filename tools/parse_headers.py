"""Parses every header of csrc/kernels alone: each must include what it needs.

    python tools/parse_headers.py

Wants clang++. Without it nothing is parsed, which is said; that is no failure. Headers that name an
ISA are parsed with the flags of that ISA, the rest as the baseline; headers of other machines are
left out.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "csrc" / "kernels"
FLAGS = ["-std=c++20", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-x", "c++", "-"]
# The vectors that a header is written for, where its name does not begin with them.
VECTORS_OF = {"bfloat16-inl.h": "avx512bf16"}


def isa_of(header: Path) -> str:
    """The ISA whose vectors a header includes; "baseline" where that is any."""
    own = re.fullmatch(r"(avx2|avx512|neon)-inl\.h", header.name)
    return own.group(1) if own else VECTORS_OF.get(header.name, "baseline")


def main() -> int:
    sys.path.insert(0, str(ROOT))
    from setup import ISA_FLAGS

    compiler = shutil.which("clang++")
    if compiler is None:
        print("clang++ was not found: the headers of csrc/kernels were not parsed alone.")
        return 0
    headers = sorted(KERNELS.glob("*.h"))
    parsed = [header for header in headers if isa_of(header) in ISA_FLAGS]
    failed = 0
    for header in parsed:
        command = [compiler, *ISA_FLAGS[isa_of(header)].split(), *FLAGS]
        twice = f'#include "{header}"\n' * 2  # the second time for its guard
        failed += subprocess.run(command, input=twice, text=True, check=False).returncode != 0
    print(f"{len(parsed) - failed} of {len(headers)} headers parsed alone, {failed} failed")
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
