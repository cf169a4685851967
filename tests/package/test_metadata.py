"""What the package says of itself: dependencies, their licences and pins, its version."""

import re
from importlib import metadata

import pytest
import torch
from built import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import charrnn_fast


def is_installed(name: str) -> bool:
    return bool(list(metadata.Distribution.discover(name=name)))


needs_metadata = pytest.mark.skipif(
    not is_installed("charrnn_fast"), reason="needs an installation"
)


@needs_metadata
def test_few_dependencies_with_permissive_licences() -> None:
    """At run time: torch, numpy, tqdm and safetensors, under BSD, MIT, Apache or MPL."""
    needed = [
        re.split(r"[\s<>=!;\[(]", line, maxsplit=1)[0]
        for line in metadata.requires("charrnn_fast") or []
        if "extra ==" not in line and "python_version" not in line
    ]
    assert sorted(needed) == ["numpy", "safetensors", "torch", "tqdm"]
    for name in needed:
        about = metadata.metadata(name)
        licence = " ".join(
            [about.get("License-Expression") or "", about.get("License") or ""]
            + [line for line in about.get_all("Classifier") or [] if line.startswith("License")]
        )
        assert re.search(r"BSD|Apache|MIT|MPL", licence), f"{name}: {licence!r}"


@needs_metadata
def test_the_lock_names_all_that_testing_and_linting_installs() -> None:
    """Continuous integration installs known versions, of what is needed and of what that needs."""
    lock = ROOT / "requirements" / "ci.txt"
    if not lock.exists():
        pytest.skip("not run from the source tree")

    def plain(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    locked = {
        plain(line.split("==")[0])
        for line in lock.read_text(encoding="utf-8").splitlines()
        if "==" in line
    }
    # The Makefile pins torch, and the lock has what that one needs.
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    pinned = f"torch=={torch.__version__.removesuffix('+cpu')}" in makefile
    # What `make lint` uses is there once that was run.
    lint = [name for name in ("ruff", "mypy", "clang-format") if is_installed(name)]
    seen, wanted = {"torch"}, ["charrnn-fast[test]", *lint] + ["torch"] * pinned
    while wanted:
        name, _, extra = wanted.pop().partition("[")
        for line in metadata.requires(name) or []:
            needed, _, condition = line.partition(";")
            needed = plain(re.split(r"[\s<>=!~;\[(]", needed, maxsplit=1)[0])
            if "extra" in condition and f'"{extra.rstrip("]")}"' not in condition:
                continue
            if needed in seen or not is_installed(needed):
                continue
            seen.add(needed)
            wanted.append(needed)
    assert seen - {"torch"} <= locked


def test_the_lock_has_one_version_of_each_package() -> None:
    """For one Python: pip finds no answer to two, and `make dist` is run too seldom to tell."""
    lock = ROOT / "requirements" / "ci.txt"
    if not lock.exists():
        pytest.skip("not run from the source tree")
    lines = lock.read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if "==" in line]
    for python in ("3.10", "3.11", "3.14"):
        names = [
            canonicalize_name(pin.name)
            for pin in pins
            if pin.marker is None or pin.marker.evaluate({"python_version": python})
        ]
        assert len(names) == len(set(names)) > 40, python


@needs_metadata
def test_versions_agree() -> None:
    """The package, its metadata and the changelog name one version."""
    assert metadata.version("charrnn_fast") == charrnn_fast.__version__
    changelog = ROOT / "CHANGELOG.md"
    if changelog.exists():
        assert f"## {charrnn_fast.__version__}" in changelog.read_text(encoding="utf-8")
