"""Builds charrnn_fast._C. Everything else about the package is in pyproject.toml.

Environment: CXX (compiler), MAX_JOBS (parallel compilations), CHARRNN_FAST_CUDA (1 builds the CUDA
sources too, 0 does not; by default they are where torch has CUDA and its toolkit is found),
CHARRNN_FAST_CUDA_ARCHS (compute capabilities, "75 80 90 100"; the last also as PTX),
CHARRNN_FAST_MACHINE (the machine to compile for, when that is not this one; aarch64 or x86_64),
CHARRNN_FAST_CXXFLAGS and CHARRNN_FAST_LDFLAGS (added to every compilation and to the link; the
sanitizer builds use them), CHARRNN_FAST_VARIANT (ends the name of the folder of objects, so that a
build with other flags or another compiler has its own).
"""

import glob
import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor

if sys.version_info < (3, 10):  # noqa: UP036  setup.py may be run by hand
    sys.exit(f"error: charrnn_fast needs Python 3.10+; this is {platform.python_version()}.")

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, ExecError

# An extension must be built against the torch it will run with. Under pip's build isolation the
# environment that pip installs into is hidden; its torch is still the one to build against.
if importlib.util.find_spec("torch") is None:
    sys.path.append(sysconfig.get_path("purelib"))
HAVE_TORCH = importlib.util.find_spec("torch") is not None

# Newer torch puts ccache before the compiler by itself, and fails where CXX already has it.
for variable in ("CC", "CXX"):
    wrapper, _, compiler = os.environ.get(variable, "").partition(" ")
    if os.path.basename(wrapper) in ("ccache", "sccache") and compiler:
        os.environ[variable] = compiler.strip()

EXTRA_CXX_FLAGS = shlex.split(os.environ.get("CHARRNN_FAST_CXXFLAGS", ""))
EXTRA_LD_FLAGS = shlex.split(os.environ.get("CHARRNN_FAST_LDFLAGS", ""))

# Contraction is off so that results depend on the source alone: every FMA is written out.
CXX_FLAGS = [
    *("-std=c++20", "-O3", "-g0", "-Wall", "-Wextra"),
    *("-fvisibility=hidden", "-fvisibility-inlines-hidden", "-fstack-protector-strong"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"),
]
LD_FLAGS = ["-Wl,-z,relro,-z,now,-z,noexecstack"]

# What csrc/kernels/isa_NAME.cpp is compiled with, by machine. No other file is compiled for more
# than the machine's baseline, so that one binary serves every CPU.
AVX512 = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c"
ISA_FLAGS = {
    "x86_64": {
        "baseline": "",
        "avx2": "-mavx2 -mfma -mf16c",
        "avx512": AVX512,
        "avx512bf16": AVX512 + " -mavx512bf16",
    },
    "aarch64": {"baseline": "", "neon": ""},
}.get(os.environ.get("CHARRNN_FAST_MACHINE") or platform.machine(), {"baseline": ""})

# What Python calls is declared in these: by their digest charrnn_fast/_extension.py tells whether
# the extension goes with the Python files beside it.
INTERFACE = ("csrc/generate.cpp", "csrc/module.cpp", "csrc/ops.cpp", "csrc/short_way.cpp")


def interface_digest():
    """The digest of INTERFACE."""
    digest = hashlib.sha256()
    for path in INTERFACE:
        with open(path, "rb") as file:
            digest.update(file.read())
    return digest.hexdigest()


def isa_sources():
    """The ISA files to build on this machine, with the flags of each."""
    paths = {isa: f"csrc/kernels/isa_{isa}.cpp" for isa in ISA_FLAGS}
    return {path: ISA_FLAGS[isa].split() for isa, path in paths.items() if os.path.exists(path)}


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


def extension():
    """The extension: binding files here, ISA files as objects of their own (see BuildKernels)."""
    sources = sorted([*glob.glob("csrc/*.cpp"), "csrc/kernels/dispatch.cpp"])
    headers = sorted(glob.glob("csrc/**/*.h", recursive=True))
    if not HAVE_TORCH:
        return Extension("charrnn_fast._C", sources, depends=headers)
    from torch.utils.cpp_extension import CppExtension

    cuda, _ = cuda_choice()
    if cuda:
        sources += sorted(glob.glob("csrc/cuda/*.cpp"))
        headers += sorted(glob.glob("csrc/cuda/*.cu*"))
    ext = CppExtension("charrnn_fast._C", sources)
    # torch's headers are not ours to warn about.
    system = [flag for path in ext.include_dirs for flag in ("-isystem", path)]
    ext.include_dirs = [os.path.abspath("csrc")]
    # at::parallel_for is serial, without a word, where OpenMP is not on.
    ext.extra_compile_args = {"cxx": [*CXX_FLAGS, "-fopenmp", *system, *EXTRA_CXX_FLAGS]}
    ext.extra_link_args = ["-fopenmp", *LD_FLAGS, *EXTRA_LD_FLAGS]
    if cuda:
        # The static runtime: it is ours alone, and works beside a torch built without CUDA.
        ext.library_dirs.append(os.path.join(cuda_home(), "lib64"))
        ext.libraries += ["cudart_static", "rt", "dl", "pthread"]
    ext.depends = [*headers, *isa_sources(), "setup.py"]
    return ext


def check_toolchain():
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


if HAVE_TORCH:
    import torch
    from torch.utils.cpp_extension import BuildExtension

    class BuildKernels(BuildExtension):
        """Compiles each ISA file with its own flags, and links the objects into the extension."""

        def finalize_options(self):
            super().finalize_options()
            # One folder for every way of building (in place, editable, wheel), so that they share
            # objects; another torch means another folder.
            abi = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
            variant = os.environ.get("CHARRNN_FAST_VARIANT", "")
            self.build_temp = os.path.join("build", f"{abi}-torch-{torch.__version__}{variant}")

        def run(self):
            check_toolchain()
            super().run()

        def build_extensions(self):
            try:
                super().build_extensions()
            except RuntimeError as error:  # the compiler has said what is wrong
                raise CompileError(str(error)) from None

        def build_extension(self, ext):
            def build_isa(item):
                source, flags = item
                name = os.path.splitext(os.path.basename(source))[0]
                return self.compiler.compile(
                    [source],
                    output_dir=os.path.join(self.build_temp, name),
                    include_dirs=ext.include_dirs,
                    extra_postargs=[*CXX_FLAGS, *flags, *EXTRA_CXX_FLAGS],
                )

            # Not by torch's CUDAExtension, which needs a torch that was built with CUDA: the
            # kernels include no header of torch.
            def build_cuda(source):
                name = os.path.splitext(os.path.basename(source))[0]
                out = os.path.abspath(os.path.join(self.build_temp, f"cuda_{name}.o"))
                archs = cuda_archs()
                flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
                flags.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
                host = ["-Xcompiler", "-fPIC,-fvisibility=hidden", "-Icsrc"]
                nvcc = os.path.join(cuda_home(), "bin", "nvcc")
                os.makedirs(self.build_temp, exist_ok=True)
                try:
                    self.spawn([nvcc, "-O3", "-std=c++20", *flags, *host, "-c", source, "-o", out])
                except ExecError as error:
                    hint = "CHARRNN_FAST_CUDA=0 builds without the CUDA kernels"
                    raise CompileError(f"{error}; {hint}") from None
                return out

            with_cuda, why = cuda_choice()
            jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
            with ThreadPoolExecutor(jobs if self.use_ninja else 1) as pool:
                for objects in pool.map(build_isa, isa_sources().items()):
                    ext.extra_objects += objects
                if with_cuda:
                    ext.extra_objects += pool.map(build_cuda, sorted(glob.glob("csrc/cuda/*.cu")))
            # Taken before, so that a source that changes meanwhile is noticed. With CUDA or without
            # it is another extension, though no source is newer.
            stamp = f"{torch.__version__}\n{interface_digest()}\n{why}\n"
            path = self.version_file(self.build_lib)
            if os.path.exists(path):
                with open(path, encoding="ascii") as file:
                    self.force = self.force or file.read().splitlines()[2:] != [why]
            super().build_extension(ext)
            with open(path, "w", encoding="ascii") as file:
                file.write(stamp)

        def copy_extensions_to_source(self):
            super().copy_extensions_to_source()
            shutil.copy(self.version_file(self.build_lib), self.version_file("."))

        def get_outputs(self):
            return [*super().get_outputs(), self.version_file(self.build_lib)]

        @staticmethod
        def version_file(root):
            """Where charrnn_fast/_extension.py reads with what the extension was built."""
            return os.path.join(root, "charrnn_fast", "_C.torch")

else:

    class BuildKernels(build_ext):
        """Says what is missing."""

        def run(self):
            check_toolchain()


if __name__ == "__main__":
    setup(ext_modules=[extension()], cmdclass={"build_ext": BuildKernels})
