"""What was built in this source tree, for tests that look into it; a copy elsewhere has nothing."""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from charrnn_fast import _extension

ROOT = Path(__file__).parents[1]


def objects() -> list[str]:
    """The object files that the kernels' library in this source tree was linked from."""
    folder = ROOT / "build" / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    sources = sorted((ROOT / "csrc" / "kernels").glob("*.cpp"))
    made = [folder / "kernels" / f"{source.stem}.o" for source in sources]
    return [str(path) for path in made if path.exists()]


needs_objects = pytest.mark.skipif(
    not objects() or shutil.which("objdump") is None,
    reason="needs binutils and the source tree that was built",
)


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def libraries() -> tuple[Path, Path]:
    """The extension and the kernels' library, as they are loaded."""
    from charrnn_fast import _C

    return Path(_C.__file__), Path(_C.__file__).with_name(_extension.KERNELS)
