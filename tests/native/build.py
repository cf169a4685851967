"""Builds the kernels and their driver without torch.

    python tests/native/build.py OUTPUT [compiler flags]

The flags come after setup.py's own, for example -fsanitize=thread.
"""

import os
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DRIVER = ROOT / "tests" / "native" / "driver.cpp"


def build(output: Path, flags: list[str]) -> None:
    """Compiles dispatch.cpp and the ISA files as setup.py does, and links them with the driver."""
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    from setup import CXX_FLAGS, isa_sources

    compiler = shlex.split(os.environ.get("CXX", "c++"))
    sources = {"csrc/kernels/dispatch.cpp": [], str(DRIVER): [], **isa_sources()}
    with tempfile.TemporaryDirectory() as folder:

        def compile_one(item: tuple[str, list[str]]) -> str:
            source, isa_flags = item
            target = str(Path(folder) / (Path(source).stem + ".o"))
            command = [*compiler, *CXX_FLAGS, "-Icsrc", *isa_flags, *flags]
            subprocess.run([*command, "-c", source, "-o", target], check=True)
            return target

        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            objects = list(pool.map(compile_one, sources.items()))
        subprocess.run([*compiler, *flags, *objects, "-pthread", "-o", output], check=True)


if __name__ == "__main__":
    build(Path(sys.argv[1]).absolute(), sys.argv[2:])
