"""The kernels as they are in the extension, run without torch between inaccessible pages."""

import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


def objects() -> list[str]:
    """The object files that the extension in this source tree was linked from."""
    found = []
    for folder in (ROOT / "build").glob(f"{sysconfig.get_platform()}*-torch-{torch.__version__}"):
        found += sorted(str(path) for path in folder.glob("isa_*/csrc/isa_*.o"))
        found += [str(path) for path in folder.glob("csrc/dispatch.o")]
    return found


@pytest.mark.skipif(not objects(), reason="not run from the source tree that was built")
def test_kernels_keep_to_their_buffers(tmp_path: Path) -> None:
    """Every ISA of this CPU: right results, same bits for every team, nothing out of bounds."""
    compiler = next(filter(shutil.which, ("c++", "g++", "clang++")))
    driver = tmp_path / "driver"
    source = str(ROOT / "tests" / "native" / "driver.cpp")
    command = [compiler, "-std=c++20", "-O1", f"-I{ROOT / 'csrc'}", source, *objects(), "-pthread"]
    subprocess.run([*command, "-o", str(driver)], check=True)
    done = subprocess.run([str(driver), "150", "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "150 cases" in done.stdout
