"""docs/features.md names tests that exist."""

import re
from pathlib import Path

import pytest

DOCUMENT = Path(__file__).parent.parent / "docs" / "features.md"


@pytest.mark.skipif(not DOCUMENT.exists(), reason="runs apart from the sources")
def test_named_tests_exist():
    """Each `file::test` of the document is a test."""
    named = re.findall(r"`(\w+\.py)::(\w+)`", DOCUMENT.read_text(encoding="utf-8"))
    assert len(named) > 50
    for file, name in named:
        source = (Path(__file__).parent / file).read_text(encoding="utf-8")
        assert f"\ndef {name}(" in source, f"{file}::{name}"
