"""Every public name has a docstring whose examples run as they are printed."""

import doctest

import pytest
import torch
from built import ROOT

import charrnn_fast
from charrnn_fast import charlm

PUBLIC = [
    (module, name)
    for module in (charrnn_fast, charlm)
    for name in module.__all__
    if name != "__version__"
]


@pytest.mark.parametrize(("module", "name"), PUBLIC, ids=lambda x: getattr(x, "__name__", x))
def test_examples_run(module, name, monkeypatch, tmp_path):
    """Each has one at least, which needs no name but what it imports."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    finder = doctest.DocTestFinder(exclude_empty=False)
    found = finder.find(getattr(module, name), name, module=False, globs={})
    ran = [doctest.DocTestRunner().run(case) for case in found if "._" not in case.name]
    assert not sum(result.failed for result in ran)
    assert sum(result.attempted for result in ran)


@pytest.mark.skipif(not (ROOT / "docs" / "api").exists(), reason="not run from the source tree")
def test_every_public_name_is_on_a_page():
    """`make docs` warns of names that a page has and the package has not; this is the reverse."""
    texts = {path.stem: path.read_text(encoding="utf-8") for path in ROOT.glob("docs/api/*.rst")}
    pages, index = "\n".join(texts.values()), texts["index"].split()
    for _, name in PUBLIC:
        assert f":: {name}\n" in pages or f":: {name}(" in pages, name
        assert name in index, name
