"""Builds the kernels' library and the extension. All else about the package is in pyproject.toml.

charrnn_fast/libcharrnn_fast_kernels.so holds the kernels, which know no torch. The extension that
binds them to a torch, charrnn_fast._C, is thin: a wheel has one for each minor version of torch.
A step whose command and files are as at the last build is not done again.

Environment: CXX (compiler), MAX_JOBS (parallel compilations), CHARRNN_FAST_CUDA (1 builds the CUDA
sources too, 0 does not; by default they are where torch has CUDA and its toolkit is found),
CHARRNN_FAST_CUDA_ARCHS (compute capabilities, "75 80 90 100"; the last also as PTX),
CHARRNN_FAST_MACHINE (the machine to compile for, when that is not this one; aarch64 or x86_64),
CHARRNN_FAST_CXXFLAGS and CHARRNN_FAST_LDFLAGS (added to every compilation and to the links; the
sanitizer builds use them), CHARRNN_FAST_VARIANT (ends the name of the folder of objects, so that a
build with other flags or another compiler has its own), CHARRNN_FAST_TORCHES (folders of unpacked
torch wheels, separated by ":"; one binding for each, in place of the one for the torch that is
installed; `make wheels` uses it).
"""

import glob
import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import NamedTuple

if sys.version_info < (3, 10):  # noqa: UP036  setup.py may be run by hand
    sys.exit(f"error: charrnn_fast needs Python 3.10+; this is {platform.python_version()}.")

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

# An extension must be built against the torch it will run with. Under pip's build isolation the
# environment that pip installs into is hidden; its torch is still the one to build against.
if importlib.util.find_spec("torch") is None:
    sys.path.append(sysconfig.get_path("purelib"))
UNPACKED_TORCHES = list(filter(None, os.environ.get("CHARRNN_FAST_TORCHES", "").split(os.pathsep)))
HAVE_TORCH = bool(UNPACKED_TORCHES) or importlib.util.find_spec("torch") is not None

EXTRA_CXX_FLAGS = shlex.split(os.environ.get("CHARRNN_FAST_CXXFLAGS", ""))
EXTRA_LD_FLAGS = shlex.split(os.environ.get("CHARRNN_FAST_LDFLAGS", ""))

# Contraction is off so that results depend on the source alone: every FMA is written out.
CXX_FLAGS = [
    *("-std=c++20", "-O3", "-g0", "-Wall", "-Wextra"),
    *("-fvisibility=hidden", "-fvisibility-inlines-hidden", "-fstack-protector-strong"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"),
]
LD_FLAGS = ["-Wl,--as-needed,-z,relro,-z,now,-z,noexecstack"]
KERNELS = "libcharrnn_fast_kernels.so"

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


def interface_digest():
    """Of the sources that declare what Python calls.

    By it charrnn_fast/_extension.py, which does the same, tells whether the extension goes with the
    Python files beside it.
    """
    digest = hashlib.sha256()
    for path in sorted(glob.glob("csrc/*.cpp")):
        with open(path, "rb") as file:
            text = file.read()
        if b"m.def(" in text:
            digest.update(text)
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


def binding_sources():
    """All that knows torch, without .cu files."""
    return sorted(glob.glob("csrc/*.cpp") + glob.glob("csrc/cuda/*.cpp") * cuda_choice()[0])


def extensions():
    """What setuptools is to know: names. BuildKernels knows the rest."""
    if not HAVE_TORCH:
        return [Extension("charrnn_fast._C", [])]
    return [Extension(f"charrnn_fast.{torch.module}", []) for torch in torches()]


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


def object_path(folder, source):
    """Where the object of a source in csrc goes."""
    return os.path.join(folder, os.path.splitext(os.path.relpath(source, "csrc"))[0] + ".o")


def exports_of_kernels():
    """The linker's list of what KERNELS exports, under a version that is the header's digest.

    A binding that was compiled with another rnn.h then asks for a version that is not there, and
    the loader refuses it.
    """
    with open("csrc/kernels/rnn.h", "rb") as file:
        version = hashlib.sha256(file.read()).hexdigest()[:16]
    names = ("isa()", "isas()", "select_isa(char const*)")
    listed = " ".join(f'"charrnn_fast::{name}";' for name in names)
    return f'RNN_H_{version} {{ global: extern "C++" {{ {listed} }}; local: *; }};\n'


class Step(NamedTuple):
    """A run of a compiler or linker."""

    kind: str  # one of ORDER
    output: str
    command: list[str]
    inputs: list[str]

    # In which they are begun: a step waits for its inputs, and should not keep a thread for that.
    ORDER = ("nvcc", "compile", "link")

    def is_made(self):
        """Whether the output is there, by this command, later than all that went into it."""
        try:
            with open(f"{self.output}.made", encoding="utf-8") as file:
                started, command, inputs = json.load(file)
            changed = max(map(os.path.getmtime, inputs))
            return command == self.command and changed < started and os.path.exists(self.output)
        except (OSError, ValueError):
            return False

    def make(self):
        """Runs the command.

        Raises:
            subprocess.CalledProcessError: It failed.
        """
        print(f"{self.kind} {self.output}", flush=True)
        started = time.time()
        os.makedirs(os.path.dirname(self.output), exist_ok=True)
        for path in (f"{self.output}.made", self.output):  # a process may have the old one mapped
            if os.path.exists(path):
                os.remove(path)
        subprocess.run(self.command, check=True)
        inputs = list(self.inputs)
        if self.kind != "link":  # the compiler has listed what it included
            with open(f"{self.output}.d", encoding="utf-8") as file:
                inputs += shlex.split(file.read().replace("\\\n", "").partition(": ")[2])
        with open(f"{self.output}.made", "w", encoding="utf-8") as file:
            json.dump([started, self.command, inputs], file)


def make_all(steps, jobs):
    """Does the steps that are not done already, some at once, up to the first that fails.

    Returns whether none did.
    """
    running = {}

    def make(step):
        for path in step.inputs:
            if path in running:  # begun before, or done
                running[path].result()
        if not step.is_made():
            step.make()

    with ThreadPoolExecutor(jobs) as pool:
        for step in sorted(steps, key=lambda step: Step.ORDER.index(step.kind)):
            running[step.output] = pool.submit(make, step)
        done, _ = wait(running.values(), return_when=FIRST_EXCEPTION)
        pool.shutdown(wait=False, cancel_futures=True)
    errors = {future.exception() for future in done} - {None}
    print(*errors, sep="\n", end="\n" * bool(errors), file=sys.stderr)
    return not errors


def write(path, text):
    """Writes `text`; what depends on it stays up to date if it is there. Returns `path`."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "a+", encoding="utf-8") as file:
        file.seek(0)
        if file.read() != text:
            file.truncate(0)
            file.write(text)
    return path


class BuildKernels(build_ext):
    """Compiles and links, and puts the results where setuptools wants them."""

    def finalize_options(self):
        super().finalize_options()
        # One folder for every way of building (in place, editable, wheel), so that they share
        # objects.
        abi = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        self.build_temp = os.path.join("build", abi + os.environ.get("CHARRNN_FAST_VARIANT", ""))

    def run(self):
        check_toolchain()
        super().run()

    def build_extensions(self):
        # Taken before, so that a source that changes meanwhile is noticed.
        stamp = f"{interface_digest()}\n{cuda_choice()[1]}\n"
        jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        if not make_all(self.steps(), jobs):  # the compiler has said what is wrong
            hint = "; CHARRNN_FAST_CUDA=0 builds without the CUDA kernels" * cuda_choice()[0]
            raise CompileError(f"the build failed{hint}")
        folder = os.path.join(self.build_lib, "charrnn_fast")
        os.makedirs(folder, exist_ok=True)
        # An earlier build's bindings of other versions of torch would become part of the wheel.
        for pattern in ("_C*.so", "_C*.torch"):
            for path in glob.glob(os.path.join(folder, pattern)):
                os.remove(path)
        for built, name in self.results():
            self.replace(built, os.path.join(folder, name))
        for torch in torches():
            with open(os.path.join(folder, f"{torch.module}.torch"), "w", encoding="ascii") as file:
                file.write(f"{torch.version}\n{stamp}")

    def steps(self):
        """How to make everything from the sources."""
        # Python's flags first, for ours to overrule. Where Python itself lies is no matter here.
        compile_flags = [*self.compiler.compiler_so[1:], *CXX_FLAGS, "-Icsrc"]
        linker = self.compiler.linker_so[1:]
        link_flags = [flag for flag in linker if not flag.startswith(("-L", "-Wl,-rpath"))]
        link_flags += [*LD_FLAGS, *EXTRA_LD_FLAGS]
        cxx = shlex.split(os.environ["CXX"])
        steps = []

        def compile(output, source, flags, kind="compile", compiler=cxx):
            command = [*compiler, *flags, "-MMD", "-MF", f"{output}.d", "-c", source, "-o", output]
            steps.append(Step(kind, output, command, [source]))
            return output

        def link(output, inputs, flags, needs=()):
            command = [*cxx, *inputs, *link_flags, *flags, "-o", output]
            steps.append(Step("link", output, command, [*inputs, *needs]))

        folder = os.path.join(self.build_temp, "kernels")
        # The longest first.
        sources = {**dict(reversed(isa_sources().items())), "csrc/kernels/dispatch.cpp": []}
        objects = [
            compile(
                object_path(self.build_temp, source),
                source,
                [*compile_flags, *isa, *EXTRA_CXX_FLAGS],
            )
            for source, isa in sources.items()
        ]
        exports = write(os.path.join(folder, "exports.map"), exports_of_kernels())
        kernels = os.path.join(folder, KERNELS)
        flags = [f"-Wl,-soname,{KERNELS}", f"-Wl,--version-script={exports}", "-Wl,-Bsymbolic"]
        link(kernels, objects, flags, [exports])

        cuda = []
        if cuda_choice()[0]:
            # Not by torch's CUDAExtension, which needs a torch that was built with CUDA: the
            # kernels include no header of torch.
            nvcc = [os.path.join(cuda_home(), "bin", "nvcc")]
            flags = ["-O3", "-std=c++20", *gencode_flags(), "-Icsrc"]
            flags += ["-Xcompiler", "-fPIC,-fvisibility=hidden"]
            cuda = [
                compile(object_path(self.build_temp, source), source, flags, "nvcc", nvcc)
                for source in sorted(glob.glob("csrc/cuda/*.cu"))
            ]
        for torch in torches():
            folder = os.path.join(self.build_temp, torch.folder)
            # torch's headers are not ours to warn about.
            flags = [flag for path in torch.include_dirs for flag in ("-isystem", path)]
            flags += [f"-I{path}" for path in self.include_dirs]
            # at::parallel_for is serial, without a word, where OpenMP is not on.
            flags = [*compile_flags, "-fopenmp", *flags, *EXTRA_CXX_FLAGS]
            # In one file: torch's headers take longer than all that is ours.
            lines = [f'#include "{os.path.relpath(path, "csrc")}"\n' for path in binding_sources()]
            source = write(os.path.join(folder, "binding.cpp"), "".join(lines))
            binding = compile(os.path.join(folder, "binding.o"), source, flags)
            flags = ["-fopenmp", "-Wl,-rpath,$ORIGIN"]
            flags += [f"-L{path}" for path in torch.library_dirs]
            flags += ["-lc10", "-ltorch", "-ltorch_cpu", "-ltorch_python"]
            if cuda:
                # The static runtime: it is ours alone, and works beside a torch without CUDA.
                flags += [f"-L{os.path.join(cuda_home(), 'lib64')}"]
                flags += ["-lcudart_static", "-lrt", "-ldl", "-lpthread"]
            link(os.path.join(folder, f"{torch.module}.so"), [binding, *cuda, kernels], flags)
        return steps

    @staticmethod
    def replace(source, target):
        """Copies, also over a newer file. A process that has the old one mapped keeps it."""
        if os.path.exists(target):
            os.remove(target)
        shutil.copy2(source, target)

    def results(self):
        """What was linked, and the name of each in the package."""
        yield os.path.join(self.build_temp, "kernels", KERNELS), KERNELS
        for torch in torches():
            folder = os.path.join(self.build_temp, torch.folder)
            name = os.path.basename(self.get_ext_filename(f"charrnn_fast.{torch.module}"))
            yield os.path.join(folder, f"{torch.module}.so"), name

    def files(self):
        """The names, in the package, of all that this command makes."""
        stamps = [f"{torch.module}.torch" for torch in torches()]
        return [*(name for _, name in self.results()), *stamps]

    def copy_extensions_to_source(self):
        package = self.get_finalized_command("build_py").get_package_dir("charrnn_fast")
        for name in self.files():
            self.replace(
                os.path.join(self.build_lib, "charrnn_fast", name), os.path.join(package, name)
            )

    def get_outputs(self):
        return [os.path.join(self.build_lib, "charrnn_fast", name) for name in self.files()]


if __name__ == "__main__":
    setup(ext_modules=extensions(), cmdclass={"build_ext": BuildKernels})
