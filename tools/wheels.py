"""One wheel for this Python, with a binding for each minor version of torch; and its test.

usage: wheels.py build [--torch VERSION]
       wheels.py test [--torch VERSION] [PYTEST ARGUMENTS]

A build wants no torch that can run: its headers, and the four libraries that a binding is linked
to, are kept in build/torches (3 GB). A test has an environment in build/wheel-tests for each torch,
as pip makes it (up to 7 GB). The wheel's tag follows from the glibc and libstdc++ of this machine:
built on an older one, it serves more.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TORCHES = ROOT / "build" / "torches"
DIST = ROOT / "dist"
VERSIONS = ("2.9.1", "2.10.0", "2.11.0", "2.12.1", "2.13.0", "2.14.1")
TESTED = ("2.9.1", "2.13.0", "2.14.1")
NEEDED = (
    "torch/version.py",
    "torch/include/",
    *(f"torch/lib/lib{name}.so" for name in ("c10", "torch", "torch_cpu", "torch_python")),
)
MAX_MB = 12


def run(*command, cwd=ROOT, **environment):
    variables = {**os.environ, **environment}
    variables.pop("PYTHONPATH", None)  # what is installed is meant
    subprocess.run([str(word) for word in command], cwd=cwd, env=variables, check=True)


def python(*arguments, executable=sys.executable, **options):
    run(executable, "-m", *arguments, **options)


def unpacked(version):
    """The folder of what a binding for this torch is built against."""
    folder = TORCHES / version
    if folder.exists():
        return folder
    with tempfile.TemporaryDirectory(dir=TORCHES) as name:
        # The build for CPUs, where pip is offered it: a fifth of the download, and the same to us.
        for spec in (f"torch=={version}+cpu", f"torch=={version}"):
            try:
                options = ("--no-deps", "--no-cache-dir", "--only-binary=:all:", "-d", name)
                python("pip", "download", "-q", *options, spec)
                break
            except subprocess.CalledProcessError:
                pass
        else:
            sys.exit(f"error: pip could not download torch {version}; see above.")
        (wheel,) = Path(name).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.startswith(NEEDED)]
            archive.extractall(Path(name) / "torch", names)
        (Path(name) / "torch").rename(folder)  # whole, or not at all
    return folder


def build(versions):
    TORCHES.mkdir(parents=True, exist_ok=True)
    torches = os.pathsep.join(str(unpacked(version)) for version in versions)
    for wheel in DIST.glob("*.whl"):
        wheel.unlink()
    with tempfile.TemporaryDirectory() as folder:
        options = ("--no-deps", "--no-build-isolation", "-w", folder)
        python("pip", "wheel", "-q", *options, ".", CHARRNN_FAST_TORCHES=torches)
        (built,) = Path(folder).glob("*.whl")
        # It finds the tag. Nothing is grafted in: torch brings the libraries, OpenMP's among them.
        excluded = ("libc10.so", "libtorch*.so", "libgomp.so.1")
        options = [f"--exclude={name}" for name in excluded]
        python("auditwheel", "repair", *options, "-w", DIST, built)
    (wheel,) = DIST.glob("*.whl")
    python("auditwheel", "show", wheel)
    python("twine", "check", "--strict", wheel)
    size = wheel.stat().st_size / 1e6
    print(f"{wheel.relative_to(ROOT)}: {size:.1f} MB, for torch {', '.join(versions)}")
    if "manylinux" not in wheel.name:
        sys.exit("error: the wheel's tag is not one of manylinux.")
    if size > MAX_MB:
        sys.exit(f"error: the wheel has more than {MAX_MB} MB.")


def test(version, arguments):
    """In an environment of its own, from a copy of the tests that sees no sources."""
    (wheel,) = DIST.glob("*.whl")
    folder = ROOT / "build" / "wheel-tests" / version
    copy, executable = folder / "tests-apart", folder / "bin" / "python"
    python("venv", folder)
    python("pip", "uninstall", "-q", "-y", "charrnn_fast", executable=executable)
    options = ("-q", "--only-binary=:all:", "-c", ROOT / "requirements" / "ci.txt")
    python("pip", "install", *options, f"torch=={version}", f"{wheel}[test]", executable=executable)
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(ROOT / "tests", copy / "tests")
    shutil.copy(ROOT / "pyproject.toml", copy)
    options = ("-q", "-p", "no:cacheprovider")
    python("pytest", *options, *arguments, cwd=copy, executable=executable)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=("build", "test"))
    parser.add_argument("--torch", action="append", help="a version, in place of all; repeatable")
    options, arguments = parser.parse_known_args()
    if options.action == "build":
        return build(options.torch or VERSIONS)
    failed = []
    for version in options.torch or TESTED:
        print(f"torch {version}", flush=True)
        try:
            test(version, arguments)
        except subprocess.CalledProcessError:
            failed.append(version)
    if failed:
        sys.exit(f"error: failed with torch {', '.join(failed)}.")


if __name__ == "__main__":
    main()
