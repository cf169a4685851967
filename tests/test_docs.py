"""The README and docs/ name files, tests and commands that exist, and their Python runs."""

import re
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

pytestmark = pytest.mark.skipif(not (ROOT / "docs").exists(), reason="runs apart from the sources")


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def test_named_tests_exist():
    """Each `file::test` of a page is a test."""
    named = {match for page in PAGES for match in re.findall(r"`(\w+\.py)::(\w+)`", text_of(page))}
    assert len(named) > 50
    for file, name in sorted(named):
        source = text_of(ROOT / "tests" / file)
        assert f"\ndef {name}(" in source, f"{file}::{name}"


def heading_anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    titles = re.findall(r"^#+ (.+)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """To a file that is there, and to a heading of it."""
    for target in re.findall(r"\]\(([^)]+)\)", text_of(page)):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        # A source distribution has no benchmarks.
        in_sources = (ROOT / linked.relative_to(ROOT).parts[0]).exists()
        assert linked.exists() or not in_sources, f"{page.name}: {target}"
        assert not anchor or anchor in heading_anchors(linked), f"{page.name}: {target}"


def test_every_page_is_linked_from_the_readme():
    for page in (ROOT / "docs").glob("*.md"):
        assert f"(docs/{page.name}" in text_of(README), page.name


@pytest.mark.parametrize("name", ["design.md", "extending.md"])
def test_named_files_exist(name):
    """Each `file.ext` is one of the sources; a capital NAME stands for any."""
    files = {path.name for folder in ("csrc", "charrnn_fast", "tests", "tools", "benchmarks")
             for path in (ROOT / folder).rglob("*")} | {"setup.py"}  # fmt: skip
    if not (ROOT / "benchmarks").exists():
        pytest.skip("runs apart from the sources")
    named = set(re.findall(r"`([\w./-]+\.(?:py|cpp|h|cu|cuh))`", text_of(ROOT / "docs" / name)))
    assert len(named) > 10
    missing = {file for file in named if "NAME" not in file and Path(file).name not in files}
    assert not missing


def test_make_targets_exist():
    """Each `make target` of a page is a target."""
    if not (ROOT / "Makefile").exists():
        pytest.skip("runs apart from the sources")
    targets = set(re.findall(r"^([\w-]+):", text_of(ROOT / "Makefile"), re.MULTILINE))
    for page in PAGES:
        named = set(re.findall(r"(?:`|^)make ([a-z][\w-]*)", text_of(page), re.MULTILINE))
        assert named <= targets, f"{page.name}: {named - targets}"


def test_what_extras_install_is_listed_with_its_licence():
    """Each requirement of pyproject.toml has a licence in CONTRIBUTING.md."""
    pyproject = tomllib.loads(text_of(ROOT / "pyproject.toml"))
    extras = pyproject["project"]["optional-dependencies"].values()
    lines = [*pyproject["build-system"]["requires"], *pyproject["project"]["dependencies"]]
    lines += [line for extra in extras for line in extra]
    names = {re.split(r"[\s<>=!;\[]", line, maxsplit=1)[0] for line in lines}
    section = text_of(ROOT / "CONTRIBUTING.md").split("## Dependencies\n", 1)[1].split("\n## ")[0]
    assert names <= set(re.findall(r"[\w-]+", section))


def test_python_of_the_features_page_runs():
    (block,) = re.findall(r"```python\n(.*?)```", text_of(ROOT / "docs" / "features.md"), re.DOTALL)
    values: dict = {}
    exec(block, values)
    assert values["cells"].shape == (values["T"], values["B"], 32)


def test_the_readme_is_short():
    assert len(text_of(README).splitlines()) <= 120


def test_python_of_the_readme_runs():
    (block,) = re.findall(r"```python\n(.*?)```", text_of(README), re.DOTALL)
    values: dict = {}
    exec(f"import torch\n{block}", values)
    assert values["output"].shape == (100, 32, 128)


def test_the_silent_limit_comes_first():
    limits = text_of(README).split("## Limits\n\n", 1)[1]
    assert limits.startswith("- **Silent: ")
    assert "output.data" in limits.split("\n- ")[0]
