"""What a build finds on this machine: versions of torch, a C++ compiler, a CUDA toolkit.

For setup.py, which has the environment variables that choose among them.
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from typing import NamedTuple

# An extension must be built against the torch it will run with. Under pip's build isolation the
# environment that pip installs into is hidden; its torch is still the one to build against.
if importlib.util.find_spec("torch") is None:
    sys.path.append(sysconfig.get_path("purelib"))
UNPACKED_TORCHES = list(filter(None, os.environ.get("CHARRNN_FAST_TORCHES", "").split(os.pathsep)))
HAVE_TORCH = bool(UNPACKED_TORCHES) or importlib.util.find_spec("torch") is not None


class Torch(NamedTuple):
    """What the build needs of a torch, and the module that is built against it."""

    module: str
    version: str
    include_dirs: list[str]
    library_dirs: list[str]

    @property
    def folder(self):
        """The name of the folder of its objects. One that is unpacked has its headers elsewhere."""
        return f"torch-{self.version}" + "-unpacked" * (self.module != "_C")


def installed_torch():
    """The torch that this environment has. Some distributions keep its headers elsewhere."""
    import torch
    from torch.utils.cpp_extension import include_paths, library_paths

    return Torch("_C", torch.__version__, include_paths(), library_paths())


def unpacked_torch(folder):
    """A torch that need not be fit to import: its headers, libraries and version.py are there."""
    path = os.path.join(os.path.abspath(folder), "torch")
    with open(os.path.join(path, "version.py"), encoding="utf-8") as file:
        version = re.search(r"^__version__ = '(.+)'$", file.read(), re.MULTILINE).group(1)
    minor = "_".join(version.split(".")[:2])
    include = os.path.join(path, "include")
    api = os.path.join(include, "torch", "csrc", "api", "include")
    return Torch(f"_C_torch{minor}", version, [include, api], [os.path.join(path, "lib")])


def torches():
    """The versions of torch to build for."""
    return [unpacked_torch(folder) for folder in UNPACKED_TORCHES] or [installed_torch()]


def check():
    """Exits with one line when something that the build needs is missing."""
    if not HAVE_TORCH:
        sys.exit(
            "error: torch is not installed in this environment; charrnn_fast is built against the "
            "torch it will run with. Install torch >= 2.9, then: pip install --no-build-isolation ."
        )
    if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
        sys.exit(
            "error: Python.h was not found; install the Python development headers "
            "(Debian, Ubuntu: apt install python3-dev; Fedora: dnf install python3-devel)."
        )
    named = os.environ.get("CXX")
    compilers = [shlex.split(named)[0]] if named else ["c++", "g++", "clang++"]
    found = next((compiler for compiler in compilers if shutil.which(compiler)), None)
    if found is None:
        sys.exit(
            f"error: no C++ compiler was found (looked for {', '.join(compilers)}); install g++ 11 "
            "or newer, or clang (Debian, Ubuntu: apt install g++), or name one with CXX=..."
        )
    if not named:
        os.environ["CXX"] = found


def cuda_home():
    """The folder of a toolkit that has nvcc and the static runtime, or None."""
    on_path = os.path.realpath(shutil.which("nvcc") or "")
    homes = [os.environ.get("CUDA_HOME"), os.path.dirname(os.path.dirname(on_path))]
    for home in [*homes, "/usr/local/cuda"]:
        if home and all(
            os.path.exists(os.path.join(home, path))
            for path in ("bin/nvcc", "lib64/libcudart_static.a")
        ):
            return home
    return None


def toolkit_release():
    """The release of the toolkit, "13.0"; "" without one."""
    if cuda_home() is None:
        return ""
    nvcc = os.path.join(cuda_home(), "bin", "nvcc")
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release ([\d.]+)", text).group(1)


def cuda_choice():
    """Whether the CUDA sources are part of this build, and why; `charrnn-fast info` tells it."""
    forced = os.environ.get("CHARRNN_FAST_CUDA", "")
    if forced not in ("", "0", "1"):
        sys.exit(f"error: CHARRNN_FAST_CUDA must be 1 or 0, not {forced!r}.")
    if forced == "1" and cuda_home() is None:
        sys.exit("error: CHARRNN_FAST_CUDA=1, but no CUDA toolkit was found; set CUDA_HOME.")
    if forced:
        return forced == "1", f"CHARRNN_FAST_CUDA={forced}"
    if UNPACKED_TORCHES:
        return False, "a wheel for several versions of torch has none"
    import torch

    wanted, found = torch.version.cuda, toolkit_release()
    if wanted is None:
        return False, f"torch {torch.__version__} is built without CUDA"
    if not found:
        return False, f"torch has CUDA {wanted}, but no toolkit was found"
    # The runtime that is linked in must not ask for a newer driver than torch does.
    if found.split(".")[0] != wanted.split(".")[0]:
        return False, f"torch has CUDA {wanted}, but the toolkit is {found}"
    return True, f"torch has CUDA {wanted}, and so has the toolkit {found}"


def cuda_archs():
    """The compute capabilities to compile for: by default the tested ones that nvcc knows."""
    named = os.environ.get("CHARRNN_FAST_CUDA_ARCHS", "").split()
    if named:
        return named
    nvcc = os.path.join(cuda_home(), "bin", "nvcc")
    command = [nvcc, "--list-gpu-arch"]
    known = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return [arch for arch in ("75", "80", "90", "100") if f"compute_{arch}" in known]


def gencode_flags():
    """nvcc's, for cuda_archs(); the last also as PTX, for later devices."""
    archs = cuda_archs()
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return [*flags, f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]
