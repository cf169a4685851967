"""When the CUDA sources are part of a build, and that such a build links and says so."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def toolchain(monkeypatch):
    """tools/toolchain.py as a module; environment variables of a build are unset."""
    for name in ("CHARRNN_FAST_CUDA", "CHARRNN_FAST_CUDA_ARCHS", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("toolchain", ROOT / "tools" / "toolchain.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def toolkit(folder, release):
    """A folder that looks like a toolkit, up to the answers that nvcc gives."""
    for name in ("bin/nvcc", "lib64/libcudart_static.a"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    nvcc = folder / "bin/nvcc"
    nvcc.write_text(
        "#!/bin/sh\n[ $1 = --list-gpu-arch ] && exec printf 'compute_75\\ncompute_80\\n'\n"
        f"echo Cuda compilation tools, release {release}, V{release}.48\n"
    )
    nvcc.chmod(0o755)
    return str(folder)


@pytest.mark.parametrize(
    ("torch_cuda", "release", "built", "why"),
    [
        (None, "13.0", False, "is built without CUDA"),
        ("13.0", None, False, "torch has CUDA 13.0, but no toolkit was found"),
        ("12.8", "13.0", False, "torch has CUDA 12.8, but the toolkit is 13.0"),
        ("13.0", "13.1", True, "torch has CUDA 13.0, and so has the toolkit 13.1"),
    ],
)
def test_cuda_is_chosen_where_torch_and_a_toolkit_have_it(
    toolchain, monkeypatch, tmp_path, torch_cuda, release, built, why
):
    home = release and toolkit(tmp_path, release)
    monkeypatch.setattr(toolchain, "cuda_home", lambda: home)
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    choice, reason = toolchain.cuda_choice()
    assert choice is built
    assert why in reason
    monkeypatch.setenv("CHARRNN_FAST_CUDA", "0")
    assert toolchain.cuda_choice() == (False, "CHARRNN_FAST_CUDA=0")
    monkeypatch.setenv("CHARRNN_FAST_CUDA", "1")
    if home:
        assert toolchain.cuda_choice() == (True, "CHARRNN_FAST_CUDA=1")
    else:
        with pytest.raises(SystemExit, match="no CUDA toolkit was found; set CUDA_HOME"):
            toolchain.cuda_choice()
    monkeypatch.setenv("CHARRNN_FAST_CUDA", "yes")
    with pytest.raises(SystemExit, match="must be 1 or 0, not 'yes'"):
        toolchain.cuda_choice()


def test_cuda_home_is_a_whole_toolkit(toolchain, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", toolkit(tmp_path, "13.0"))
    assert toolchain.cuda_home() == str(tmp_path)
    assert toolchain.toolkit_release() == "13.0"
    assert toolchain.cuda_archs() == ["75", "80"]  # of those that were tested, what this nvcc knows
    (tmp_path / "lib64/libcudart_static.a").unlink()
    assert toolchain.cuda_home() != str(tmp_path)


SHOW = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from charrnn_fast import _C, cli, ops
print(_C.__file__)
for op in ("rnn_layer", "rnn_layer_backward", "generate"):
    print(op, torch._C._dispatch_has_kernel_for_dispatch_key(f"charrnn_fast::{op}", "CUDA"))
with FakeTensorMode():
    for dtype in (torch.float32, torch.bfloat16):
        print("generates", dtype, ops.generates(torch.empty(2, 2, device="cuda", dtype=dtype), "RNN_TANH"))
cli.main(["info"])
"""


@pytest.mark.slow
def test_a_build_with_cuda_links_and_registers_its_kernels(toolchain, tmp_path):
    """For sm_80, beside whatever torch is here; without a device that is all that can be seen."""
    if toolchain.cuda_home() is None:
        pytest.skip("no CUDA toolkit was found")
    environment = {
        **os.environ,
        "CHARRNN_FAST_CUDA": "1",
        "CHARRNN_FAST_CUDA_ARCHS": "80",
        "CHARRNN_FAST_VARIANT": "-cuda",
    }
    command = [sys.executable, "setup.py", "-q", "build", "--build-lib", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    done = subprocess.run(
        [sys.executable, "-c", SHOW],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path))
    for line in (
        *("rnn_layer True", "rnn_layer_backward True", "generate True"),
        *("generates torch.float32 True", "generates torch.bfloat16 False"),
        "CUDA kernels      in this build: CHARRNN_FAST_CUDA=1",
    ):
        assert line in done.stdout.splitlines()
