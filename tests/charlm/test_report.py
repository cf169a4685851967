"""The page about a run."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from charrnn_fast.charlm import ModelConfig, UsageError, Vocabulary, build_model, save_pretrained
from charrnn_fast.charlm.metrics import read_metrics
from charrnn_fast.charlm.report import TEMPERATURES, colour, curves, write_report

pytest.importorskip("matplotlib", reason="needs: pip install matplotlib")


class Page(HTMLParser):
    """Tags that are open, attributes that name other files, and the text."""

    VOID = ("meta", "br", "link", "img")

    def __init__(self, content: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.outside: list[str] = []
        self.titles: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(content)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "xlink:href", "data") and not value.startswith("#"):
                self.outside.append(value)
            if tag == "span" and name == "title":
                self.titles.append(value)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_page_is_whole_and_alone(trained):
    """Well-formed, fetches nothing, runs nothing, and has each part."""
    path = write_report(trained.folder)
    assert path == trained.folder / "report.html"
    content = path.read_text(encoding="utf-8")
    page = Page(content)
    assert page.outside == []
    assert "script" not in page.tags
    assert not re.search(r"url\((?!#)|@import", content)
    assert "default-src 'none'" in content
    assert {"svg", "pre", "table", "details"} <= page.tags
    for heading in ("Training", "Samples", "Held-out text, by surprise", "Speed"):
        assert f"<h2>{heading}" in content
    for temperature in TEMPERATURES:
        assert f"temperature {temperature}" in page.text
    best = f"{trained.progress.best_loss:.4f}"
    assert best in page.text
    assert "held out" in page.text  # the legend of the curves
    assert "characters/s" in page.text


def test_every_held_out_character_has_its_surprise(trained):
    """The titles are the bits of each character; their mean is what is written above them."""
    content = write_report(trained.folder).read_text(encoding="utf-8")
    page = Page(content)
    count = min(3000, len(trained.held_out))
    values = [float(title.removesuffix(" bits")) for title in page.titles]
    assert len(values) == count
    mean = float(re.search(r"([\d.]+) bits</p>", content).group(1))
    assert sum(values[1:]) / (count - 1) == pytest.approx(mean, abs=0.06)
    shown = trained.vocabulary.decode(trained.held_out[:count])
    assert shown in page.text


def test_text_is_escaped(options, text):
    """What the model writes and what the text holds stays text."""
    from charrnn_fast.charlm import train

    text.write_text("<script>alert('x')</script>&amp;<b>\n" * 90)
    trainer = train(options, max_epochs=1, say=None)
    page = Page(write_report(trainer.folder).read_text(encoding="utf-8"))
    assert "script" not in page.tags
    assert "<script>alert('x')</script>" in page.text


@pytest.mark.parametrize("changes", [{"lines": True}, {"bytes": True}, {"val_fraction": 0.0}])
def test_kinds_of_runs(options, changes):
    from charrnn_fast.charlm import train

    trainer = train(options, max_epochs=1, say=None, **changes)
    page = Page(write_report(trainer.folder).read_text(encoding="utf-8"))
    assert bool(page.titles) == ("val_fraction" not in changes)


def test_text_that_is_gone_or_changed(trained, text):
    """The page is made all the same, and says so."""
    text.write_text("another text " * 50)
    assert "has changed since the training" in write_report(trained.folder).read_text()
    text.unlink()
    assert "no such file" in write_report(trained.folder).read_text()


def test_model_without_a_training(tmp_path):
    vocabulary = Vocabulary("ab\n")
    save_pretrained(tmp_path, build_model(ModelConfig(3, 4, 1), "torch"), vocabulary)
    content = write_report(tmp_path, tmp_path / "page.html").read_text()
    assert "No measurement" in content
    assert "without its training" in content
    with pytest.raises(UsageError, match="no such run"):
        write_report(tmp_path / "nothing")


def test_a_single_measurement_is_seen():
    """A line through one point draws nothing: few points have marks."""
    row = {"step": 1, "epoch": 1.0, "train_loss": 2.0, "lr": 1e-3, "grad_norm": 1.0}
    for colour_of_line in ("#8fb3d9", "#555555"):
        mark = re.compile(f"<use [^>]*fill: {colour_of_line}")
        assert mark.search(curves([row]))
        assert not mark.search(curves([row] * 30))


def test_metrics_that_are_being_written(tmp_path):
    path = Path(tmp_path / "metrics.jsonl")
    path.write_text(json.dumps({"step": 1, "lr": 2}) + '\n[1]\n{"step": 2, "tr')
    assert read_metrics(path) == [{"step": 1, "lr": 2}]


def test_colours_go_from_white_to_red():
    assert colour(0) == "rgb(255,255,255)"
    assert colour(8) == colour(99) == "rgb(235,110,90)"


def test_without_matplotlib(trained, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(UsageError, match="pip install matplotlib"):
        write_report(trained.folder)
