"""The kernels as they are in the extension, run without torch between inaccessible pages."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from built import ROOT, objects


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tests/native/driver.cpp, linked with the kernels."""
    if not objects():
        pytest.skip("not run from the source tree that was built")
    compiler = next(filter(shutil.which, ("c++", "g++", "clang++")))
    output = tmp_path_factory.mktemp("native") / "driver"
    source = str(ROOT / "tests" / "native" / "driver.cpp")
    command = [compiler, "-std=c++20", "-O1", f"-I{ROOT / 'csrc'}", source, *objects(), "-pthread"]
    subprocess.run([*command, "-o", str(output)], check=True)
    return output


def test_kernels_keep_to_their_buffers(driver: Path) -> None:
    """Every ISA of this CPU: right results, same bits for every team, nothing out of bounds."""
    done = subprocess.run([str(driver), "150", "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "150 cases" in done.stdout


def test_the_driver_notices_a_read_past_a_buffer(driver: Path) -> None:
    """One byte past the end of each kind of buffer is a fault: it would be seen above."""
    for buffer in range(11):
        done = subprocess.run([str(driver), "overrun", str(buffer)], capture_output=True)
        assert done.returncode == (-signal.SIGSEGV if buffer < 10 else 2), buffer


@pytest.mark.slow  # two minutes of compiling and emulating
@pytest.mark.skipif(
    not (shutil.which("aarch64-linux-gnu-g++") and shutil.which("qemu-aarch64")),
    reason="needs aarch64-linux-gnu-g++ and qemu-aarch64",
)
def test_neon_kernels_under_emulation(tmp_path: Path) -> None:
    """The aarch64 kernels, cross-compiled, do in an emulator what the others do here."""
    output = str(tmp_path / "driver")
    build = [sys.executable, str(ROOT / "tests" / "native" / "build.py"), output, "-static"]
    machine = {"CXX": "aarch64-linux-gnu-g++", "CHARRNN_FAST_MACHINE": "aarch64"}
    subprocess.run(build, check=True, env=os.environ | machine)
    done = subprocess.run(["qemu-aarch64", output, "20", "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "neon: 20 cases" in done.stdout
