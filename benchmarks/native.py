"""Small C++ libraries of the benchmarks, built on demand."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch.utils import cpp_extension

SOURCES = Path(__file__).parent / "native"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "charrnn_fast-bench"


def build(source: str, *flags: str) -> ctypes.CDLL:
    """Compiles native/<source> unless the same was built before, and loads it with ctypes."""
    path = SOURCES / source
    command = ["g++", "-O3", "-std=c++17", "-shared", "-fPIC", "-Wall", "-Wextra", *flags]
    key = hashlib.sha256(path.read_bytes() + " ".join(command).encode()).hexdigest()[:16]
    library = CACHE / f"{path.stem}-{key}.so"
    if not library.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        unfinished = library.with_suffix(f".{os.getpid()}")
        # Flags that name libraries must follow the source that needs them.
        subprocess.run([*command[:7], str(path), "-o", str(unfinished), *flags], check=True)
        unfinished.replace(library)
    return ctypes.CDLL(str(library))


@functools.cache
def machine() -> ctypes.CDLL:
    library = build("machine.cpp", "-march=native", "-pthread")
    for name in ("fma_loop", "bf16_loop", "cycle_loop"):
        function = getattr(library, name)
        function.argtypes, function.restype = [ctypes.c_int64], ctypes.c_double
    library.fma_loop_on_two.argtypes = [ctypes.c_int32, ctypes.c_int32, ctypes.c_int64]
    library.fma_loop_on_two.restype = ctypes.c_double
    library.lost_share.argtypes = [ctypes.c_int32, ctypes.c_int32, ctypes.c_double]
    library.lost_share.restype = ctypes.c_double
    library.read_loop.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int32]
    library.read_loop.restype = ctypes.c_double
    return library


def best_rate(work, repeats: int = 20) -> float:
    """Units of work a second: the best of `repeats` calls of work(), which returns its units."""
    best = 0.0
    for _ in range(repeats):
        start = time.perf_counter()
        units = work()
        best = max(best, units / (time.perf_counter() - start))
    return best


def read_gbytes(size: int, in_turns: bool) -> float:
    """GB/s of reading so many bytes again and again; in turns: there and back."""
    library = machine()
    data = np.zeros(size // 4 + 16, np.float32)
    address = (data.ctypes.data + 63) // 64 * 64
    rounds = max(2, 2**24 // size)
    return best_rate(lambda: library.read_loop(address, size, rounds, in_turns)) / 1e9


def core_limits() -> dict[str, float | dict[int, float]]:
    """FMA peaks in GFLOP/s, read bandwidths in GB/s and clock in GHz of the core we run on."""
    library = machine()
    return {
        "fp32_gflops": best_rate(lambda: library.fma_loop(200_000)) / 1e9,
        "bf16_gflops": best_rate(lambda: library.bf16_loop(200_000)) / 1e9,
        # Larger than L1, within half of L2.
        "l2_read_gbytes": read_gbytes(256 * 1024, False),
        # Of [H, H] matrices of float32.
        "matrix_read_gbytes": {H: read_gbytes(4 * H**2, True) for H in (64, 128, 256, 512, 1024)},
        "clock_ghz": best_rate(lambda: library.cycle_loop(3_000_000)) / 1e9,
    }


def lost_share(cpus: list[int], seconds: float = 1.0) -> float:
    """Share of the time that two busy cores do not get though nothing else runs: the host's."""
    return machine().lost_share(cpus[0], cpus[1], seconds)


@functools.cache
def bound_op() -> ModuleType:
    """The caller of our ops; takes half a minute to build."""
    source = SOURCES / "bound_op.cpp"
    versions = f"{torch.__version__} {sys.implementation.cache_tag}"
    key = hashlib.sha256(source.read_bytes() + versions.encode()).hexdigest()[:16]
    library = CACHE / f"bound_op-{key}.so"
    if library.exists():
        spec = importlib.util.spec_from_file_location("bound_op", library)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    CACHE.mkdir(parents=True, exist_ok=True)
    path = os.environ["PATH"]
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{path}"  # ninja lies there
    # A folder of this process: in a shared one, the lock of a build that was killed is waited for.
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        try:
            module = cpp_extension.load(
                "bound_op",
                [str(source)],
                extra_cflags=["-O2", "-std=c++20"],
                build_directory=folder,
            )
        finally:
            os.environ["PATH"] = path
        Path(module.__file__).replace(library)
    return module


@functools.cache
def onednn() -> ctypes.CDLL:
    """The oneDNN peer; raises ImportError with the reason where it cannot be had."""
    prefix = Path(os.environ.get("ONEDNN_PREFIX", sys.prefix))
    if not (prefix / "include/oneapi/dnnl/dnnl.hpp").exists():
        raise ImportError(f"no oneDNN headers under {prefix}; pip install onednn-devel-cpu-gomp")
    lib = prefix / "lib"
    try:
        flags = [f"-I{prefix}/include", f"-L{lib}", f"-Wl,-rpath,{lib}", "-ldnnl"]
        library = build("onednn_rnn.cpp", "-fopenmp", *flags)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ImportError(f"oneDNN peer not built: {error}") from error
    pointer = ctypes.c_void_p
    sizes = [ctypes.c_int64] * 4
    library.rnn_create.argtypes = [ctypes.c_char_p, *sizes, ctypes.c_int, *[pointer] * 7]
    library.rnn_create.restype = pointer
    library.rnn_run.argtypes = library.rnn_destroy.argtypes = [pointer]
    library.rnn_read.argtypes = [pointer] * 8
    library.rnn_error.restype = library.rnn_version.restype = ctypes.c_char_p
    return library


if __name__ == "__main__":
    for name, value in core_limits().items():
        print(f"{name:20} {value}")
