"""A build: it does only what is out of date, and says in one line what it lacks."""

import importlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from built import ROOT, needs_objects


def preflight(path: Path, python: str = sys.executable, **environment: str) -> str:
    """What tools/preflight.sh says with only these programs on PATH; one line, or nothing."""
    shell = shutil.which("sh")
    assert shell is not None
    done = subprocess.run(
        [shell, str(ROOT / "tools" / "preflight.sh"), python],
        env={"PATH": str(path), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert bool(done.stderr) == (done.returncode == 1)
    assert done.stderr.count("\n") <= 1
    return done.stderr


def program(path: Path, script: str) -> str:
    """An executable shell script."""
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(0o755)
    return str(path)


@needs_objects
def test_a_build_does_only_what_is_out_of_date(tmp_path: Path, monkeypatch) -> None:
    """A change to a source, to a header that it includes, to a command; a loss; a failure."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    steps = importlib.import_module("steps")
    source, header = tmp_path / "a.cpp", tmp_path / "its own.h"
    source.write_text('#include "its own.h"\n', encoding="utf-8")
    compiled, linked = str(tmp_path / "made" / "a.o"), str(tmp_path / "made" / "a.so")
    done: list[str] = []
    make = steps.Step.make
    monkeypatch.setattr(steps.Step, "make", lambda step: (done.append(step.kind), make(step)))

    def build(*flags: str) -> list[str]:
        """The kinds of the steps that are done."""
        command = ["c++", "-fPIC", *flags, "-MMD", "-MF", f"{compiled}.d"]
        command += ["-c", str(source), "-o", compiled]
        wanted = [  # in the wrong order
            steps.Step("link", linked, ["c++", "-shared", compiled, "-o", linked], [compiled]),
            steps.Step("compile", compiled, command, [str(source)]),
        ]
        done.clear()
        return done if steps.make_all(wanted, 1) else [*done, "failed"]

    header.write_text("int a();\n", encoding="utf-8")
    assert build() == ["compile", "link"]
    assert build() == []
    assert build("-O1") == ["compile", "link"]
    header.write_text("int b();\n", encoding="utf-8")
    assert build("-O1") == ["compile", "link"]
    Path(linked).unlink()
    assert build("-O1") == ["link"]
    header.write_text("wrong\n", encoding="utf-8")
    assert build("-O1") == ["compile", "failed"]
    assert build("-O1") == ["compile", "failed"]
    header.write_text("int a();\n", encoding="utf-8")
    assert build("-O1") == ["compile", "link"]
    # A change that comes while the compiler runs is one that it may not have seen.
    os.utime(header, (time.time() + 1, time.time() + 1))
    assert build("-O1") == ["compile", "link"]


@needs_objects
def test_what_a_build_lacks_is_one_line(tmp_path: Path) -> None:
    """No compiler, one that is too old or without OpenMP, and an old Python or none."""
    assert "no C++ compiler was found; install g++ 11" in preflight(tmp_path)
    assert "named by CXX, g++-99, was not found" in preflight(tmp_path, CXX="g++-99")
    assert "nopython was not found; install Python 3.10" in preflight(tmp_path, "nopython")
    old = program(tmp_path / "old", '[ "$1" = -V ] && echo Python 3.9.2 && exit; exit 1')
    assert f"{old} is Python 3.9.2" in preflight(tmp_path, old)
    program(tmp_path / "g++", "exit 1")
    assert "g++ does not know C++20" in preflight(tmp_path)
    program(tmp_path / "g++", "read line; case $line in *omp.h*) exit 1; esac")
    assert "g++ has no OpenMP" in preflight(tmp_path)
    program(tmp_path / "g++", "exit 0")
    assert preflight(tmp_path) == ""
