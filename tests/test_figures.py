"""Figures in the README and docs/ are those of the results file that is committed."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def figures(monkeypatch):
    if not (ROOT / "benchmarks").exists():
        pytest.skip("runs apart from the sources")
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    return pytest.importorskip("figures")


def test_documents_agree_with_the_results(figures):
    assert figures.disagreeing() == []


def test_all_figures_are_measured(figures):
    assert figures.missing() == []


def test_a_changed_figure_is_noticed(figures):
    """One digit of the tables."""
    page = ROOT / "docs" / "benchmarks.md"
    text = page.read_text(encoding="utf-8")
    digit = text.index("x (")  # of the first mean
    changed = f"{text[: digit - 1]}{(int(text[digit - 1]) + 1) % 10}{text[digit:]}"
    assert figures.filled(changed, page, figures.filled_in_last()) == text != changed


def test_the_picture_has_a_bar_a_cell_and_a_tick_where_there_is_a_peer(figures):
    """As many times longer than torch's as it is faster."""
    pytest.importorskip("matplotlib").use("Agg")
    report, results = sys.modules["report"], sys.modules["results"]
    info = {"B": 1, "T": 2, "I": 3, "H": 4, "packed": False}
    seconds = {"RNN": {"JAX": 2.0}, "GRU": {"JAX": 4.0, "oneDNN": 5.0}, "LSTM": {}}
    found = [
        results.Comparison(
            "workload x",
            {**info, "cell": cell},
            {"module": 3.0, f"nn.{cell}": 12.0, **peers},
            {},
        )
        for cell, peers in seconds.items()
    ]
    drawn = {}
    report.workloads({}, found, lambda figure, name: drawn.update({name: figure}))
    (axis,) = drawn["workloads"].axes
    assert [bar.get_width() for bar in axis.patches] == [3.0] * 3  # from 1 to 4
    ticks = [line for line in axis.lines if len(set(line.get_xdata())) == 1 and line.get_lw() == 2]
    assert [line.get_xdata()[0] for line in ticks] == [6.0, 3.0]
    assert [text.get_text() for text in axis.texts] == ["4.0x"] * 3
