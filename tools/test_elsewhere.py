"""Runs the tests as other machines would: what passes here must not pass by luck of this one.

usage: test_elsewhere.py [PYTEST ARGUMENTS] [--only NAME ...]

Without arguments for pytest it runs the module tests, ten minutes each on two idle cores. Each
variant has its log in build/elsewhere. Exits with 1 where one failed or could not be run.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOGS = ROOT / "build" / "elsewhere"
MODULE_TESTS = [
    *("tests", "--ignore=tests/charlm", "--ignore=tests/cuda", "--ignore=tests/package")
]
BUSY = 4  # processes beside the variant `load`
NOBODY = 65534

# The code paths of CPUs that are older than this one, in the libraries that stock's results come
# from; then numbers of threads, one of them odd and more than many machines have.
VARIANTS = {
    "mkl-avx2": {"MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "mkl-sse": {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    "mkl-reproducible": {"MKL_CBWR": "COMPATIBLE"},
    "aten-default": {"ATEN_CPU_CAPABILITY": "default"},
    "aten-avx2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "onednn-sse": {"ONEDNN_MAX_CPU_ISA": "SSE41"},
    "onednn-avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    "old-cpu": {
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
    },
    "threads-1": {"OMP_NUM_THREADS": "1"},
    "threads-2": {"OMP_NUM_THREADS": "2"},
    "threads-5": {"OMP_NUM_THREADS": "5", "MKL_DYNAMIC": "FALSE"},
    "load": {},
    "read-only": {},
}


class NotRun(Exception):
    """Why a variant could not be run."""


def pytest_of(tests):
    # Nothing is written beside the tests, which may be read-only.
    return [sys.executable, "-B", "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]


def run(tests, log, cwd=ROOT, before=(), **environment):
    # What Inductor keeps for one of ATen's code paths does not compile for another.
    with log.open("w") as file, tempfile.TemporaryDirectory() as kept:
        kept_by = {"TORCHINDUCTOR_CACHE_DIR": kept, "PYTHONPATH": str(cwd)}
        variables = {**os.environ, **kept_by, **environment}
        return subprocess.run(
            [*before, *pytest_of(tests)], cwd=cwd, env=variables, stdout=file, stderr=file
        ).returncode


def under_load(tests, log):
    """Beside as many busy processes as keep every core of a small machine taken."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(BUSY)]
    try:
        return run(tests, log)
    finally:
        for process in busy:
            process.kill()
            process.wait()


def as_an_ordinary_user(tests, log):
    """From a copy that the user may not write to; this user itself where it is not root."""
    with tempfile.TemporaryDirectory() as folder:
        copy, home = Path(folder) / "checkout", Path(folder) / "home"
        kept = shutil.ignore_patterns(".git", ".venv*", "build", "dist", "__pycache__", ".*_cache")
        shutil.copytree(ROOT, copy, ignore=kept)
        home.mkdir()
        before = []
        if os.getuid() == 0:
            os.chown(home, NOBODY, NOBODY)
            os.chmod(folder, 0o755)
            setpriv = shutil.which("setpriv")
            if setpriv is None:
                raise NotRun("setpriv (util-linux) was not found")
            before = [setpriv, f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
            code = (
                "import subprocess as s, sys, torch; s.run([sys.executable, '-c', ''], check=True)"
            )
            if subprocess.run([*before, sys.executable, "-c", code], cwd="/").returncode:
                raise NotRun(f"an ordinary user may not run {sys.executable}, or not read torch")
        for path in (copy, *copy.rglob("*")):
            path.chmod(0o555 if path.is_dir() or os.access(path, os.X_OK) else 0o444)
        try:
            own = {"HOME": str(home), "TMPDIR": str(home), "TORCHINDUCTOR_CACHE_DIR": str(home)}
            return run(tests, log, copy, before, **own)
        finally:
            for path in (copy, *copy.rglob("*")):
                if path.is_dir():
                    path.chmod(0o755)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    options, tests = parser.parse_known_args()
    tests = tests or MODULE_TESTS
    LOGS.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in options.only:
        log, start = LOGS / f"{name}.log", time.monotonic()
        kind = {"load": under_load, "read-only": as_an_ordinary_user}.get(name)
        try:
            code = kind(tests, log) if kind else run(tests, log, **VARIANTS[name])
            said = log.read_text().rstrip().rpartition("\n")[2]
        except NotRun as why:
            code, said = 1, f"NOT RUN: {why}"
        variables = " ".join("=".join(item) for item in VARIANTS[name].items())
        seconds = time.monotonic() - start
        print(f"{name:17} {'failed' if code else 'passed':7} {seconds:5.0f} s  {said}", flush=True)
        if code:
            failed.append(name)
            print(f"{'':17} {variables} {log.relative_to(ROOT)}", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
