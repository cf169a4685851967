"""The examples run, solve their tasks, agree with torch.nn, and are short enough to copy."""

import runpy
from pathlib import Path

import pytest

from charrnn_fast.ops import assert_fused

FOLDER = Path(__file__).parent.parent / "examples"
NAMES = ["rl_policy", "forecaster", "tagger", "per_sample_gradients", "replace"]

pytestmark = pytest.mark.skipif(not FOLDER.exists(), reason="runs apart from the sources")


def functions_of(name):
    return runpy.run_path(str(FOLDER / f"{name}.py"))


@pytest.fixture
def printed(capsys):
    """What was printed has a line of ours, one of torch's, and their difference."""
    yield
    out = capsys.readouterr().out
    for words in ("charrnn_fast", "torch.nn", " ms ", "largest difference"):
        assert words in out, out


@pytest.mark.parametrize("name", NAMES)
def test_they_are_short(name):
    assert len((FOLDER / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= 80


def test_every_example_is_named_in_the_readme_or_docs():
    root = FOLDER.parent
    pages = [root / "README.md", *(root / "docs").glob("*.md")]
    text = "".join(page.read_text(encoding="utf-8") for page in pages)
    for path in FOLDER.glob("*.py"):
        assert f"examples/{path.name}" in text, path.name


@pytest.mark.usefixtures("printed")
def test_rl_policy():
    """It learns what to remember; chance is a half."""
    right, difference = functions_of("rl_policy")["main"]()
    assert right > 0.9
    assert 0 < difference < 1e-4


@pytest.mark.usefixtures("printed")
def test_forecaster():
    """A day ahead, by a carried state, far better than the last value."""
    error, naive, difference = functions_of("forecaster")["main"]()
    assert error < 0.3 * naive
    assert 0 < difference < 1e-4


@pytest.mark.usefixtures("printed")
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_tagger():
    """It learns the rule, and ONNX Runtime gives its scores."""
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    right, difference, exported = functions_of("tagger")["main"]()
    assert right > 0.9
    assert 0 < difference < 1e-4
    assert exported < 1e-4


@pytest.mark.usefixtures("printed")
def test_per_sample_gradients():
    """They differ from sample to sample, are torch's, and are clipped to the norm."""
    functions = functions_of("per_sample_gradients")
    norms, difference = functions["main"]()
    assert norms.shape == (functions["B"],)
    assert norms.max() > 1.1 * norms.min() > functions["CLIP"]
    assert difference < 1e-5


@pytest.mark.usefixtures("printed")
def test_replace():
    """All recurrent modules are ours while it runs, and torch's after undo()."""
    with assert_fused():
        report, model, difference = functions_of("replace")["main"]()
    assert report.changed == ["encoder", "decoder"]
    assert not report.left
    assert type(model.encoder).__module__ == "torch.nn.modules.rnn"
    assert difference < 1e-5
