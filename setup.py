"""Builds the kernels' library and the extension. All else about the package is in pyproject.toml.

charrnn_fast/libcharrnn_fast_kernels.so holds the kernels, which know no torch. The extension that
binds them to a torch, charrnn_fast._C, is thin: a wheel has one for each minor version of torch.
A step whose command and files are as at the last build is not done again (tools/steps.py);
tools/toolchain.py finds torch, the compiler and CUDA.

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
import os
import platform
import shlex
import shutil
import sys
import sysconfig

if sys.version_info < (3, 10):  # noqa: UP036  setup.py may be run by hand
    sys.exit(f"error: charrnn_fast needs Python 3.10+; this is {platform.python_version()}.")

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

# Where pip runs this file, its folder is not on the path.
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "tools"))
import toolchain
from steps import Step, make_all, write

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


def binding_sources():
    """All that knows torch, without .cu files."""
    cuda = glob.glob("csrc/cuda/*.cpp") if toolchain.cuda_choice()[0] else []
    return sorted(glob.glob("csrc/*.cpp") + cuda)


def extensions():
    """What setuptools is to know: names. BuildKernels knows the rest."""
    if not toolchain.HAVE_TORCH:
        return [Extension("charrnn_fast._C", [])]
    return [Extension(f"charrnn_fast.{torch.module}", []) for torch in toolchain.torches()]


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


class BuildKernels(build_ext):
    """Compiles and links, and puts the results where setuptools wants them."""

    def finalize_options(self):
        super().finalize_options()
        # One folder for every way of building (in place, editable, wheel), so that they share
        # objects.
        abi = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        self.build_temp = os.path.join("build", abi + os.environ.get("CHARRNN_FAST_VARIANT", ""))

    def run(self):
        toolchain.check()
        super().run()

    def build_extensions(self):
        # Taken before, so that a source that changes meanwhile is noticed.
        stamp = f"{interface_digest()}\n{toolchain.cuda_choice()[1]}\n"
        jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        if not make_all(self.steps(), jobs):  # the compiler has said what is wrong
            has_cuda = toolchain.cuda_choice()[0]
            hint = "; CHARRNN_FAST_CUDA=0 builds without the CUDA kernels" if has_cuda else ""
            raise CompileError(f"the build failed{hint}")
        folder = os.path.join(self.build_lib, "charrnn_fast")
        os.makedirs(folder, exist_ok=True)
        # An earlier build's bindings of other versions of torch would become part of the wheel.
        for pattern in ("_C*.so", "_C*.torch"):
            for path in glob.glob(os.path.join(folder, pattern)):
                os.remove(path)
        for built, name in self.results():
            self.replace(built, os.path.join(folder, name))
        for torch in toolchain.torches():
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
        if toolchain.cuda_choice()[0]:
            # Not by torch's CUDAExtension, which needs a torch that was built with CUDA: the
            # kernels include no header of torch.
            nvcc = [os.path.join(toolchain.cuda_home(), "bin", "nvcc")]
            flags = ["-O3", "-std=c++20", *toolchain.gencode_flags(), "-Icsrc"]
            flags += ["-Xcompiler", "-fPIC,-fvisibility=hidden"]
            cuda = [
                compile(object_path(self.build_temp, source), source, flags, "nvcc", nvcc)
                for source in sorted(glob.glob("csrc/cuda/*.cu"))
            ]
        for torch in toolchain.torches():
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
                flags += [f"-L{os.path.join(toolchain.cuda_home(), 'lib64')}"]
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
        for torch in toolchain.torches():
            folder = os.path.join(self.build_temp, torch.folder)
            name = os.path.basename(self.get_ext_filename(f"charrnn_fast.{torch.module}"))
            yield os.path.join(folder, f"{torch.module}.so"), name

    def files(self):
        """The names, in the package, of all that this command makes."""
        stamps = [f"{torch.module}.torch" for torch in toolchain.torches()]
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
