"""Puts the figures of a results file into the README and the pages of docs/.

    python benchmarks/figures.py benchmarks/results/<machine>.json  # draws the plots, fills
    python benchmarks/figures.py                                    # says what disagrees

A figure stands between `<!-- figure: KEY -->` and `<!-- /figure -->`, and nobody writes it by hand.
The file that was filled in last is named in docs/benchmarks.md, itself such a place.
"""

from __future__ import annotations

import re
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from report import NOT_MEASURED, draw, environment, markdown, summary
from results import Comparison, load

ROOT = Path(__file__).resolve().parent.parent
PLACE = re.compile(r"(<!-- figure: ([\w-]+) -->)(.*?)(<!-- /figure -->)", re.DOTALL)
OF_BLOCKS = ("table", "tables", "picture")  # on lines of their own


def ratios(found: list[Comparison], topic: str, ours: str = "module") -> list[float]:
    """How many times faster than torch's module, in all comparisons of a topic."""
    chosen = [c for c in found if c.topic.startswith(topic) and {ours, c.torch} <= set(c.seconds)]
    return [c.speedup(ours, c.torch) for c in chosen]


def figures(data: dict, found: list[Comparison], results: Path, document: Path) -> dict[str, str]:
    """The text of every key, as this document shows it."""
    up = "../" * (len(document.relative_to(ROOT).parts) - 1)
    results = results.resolve().relative_to(ROOT)
    folder = up + results.with_suffix("").as_posix()

    def figure(values: list[float], of=statistics.geometric_mean, form="{:.1f}") -> str:
        return form.format(of(values)) if values else NOT_MEASURED

    def characters(topic: str, cell: str, B: int) -> list[float]:
        """Thousands a second."""
        return [
            c.info["characters"] / c.seconds["module"] / 1e3
            for c in found
            if (c.topic, c.cell, c.B) == (topic, cell, B)
        ]

    def threads(of_shape) -> list[float]:
        chosen = [c for c in found if c.topic.startswith("threads ") and of_shape(c)]
        return [c.speedup("2 threads", "1 threads") for c in chosen]

    steps = ratios(found, "workload ")
    if len(steps) < 15:  # of a quick run, which leaves some out
        steps = []
    return {
        "results": f"[`{results.as_posix()}`]({up}{results.as_posix()})",
        "machine": environment(data),
        "cpu": f"{data['machine_info']['cpu']}, {data['machine_info'].get('isa')} kernels",
        "step": figure(steps),
        "step-least": figure(steps, min),
        "step-most": figure(steps, max),
        "packed": figure(ratios(found, "workload tagger")),
        "overhead": figure(ratios(found, "overhead no_grad")),
        "sampling": figure(characters("charlm sampling 1x128", "RNN", 1), max, "{:,.0f}"),
        "sampling-ratio": figure(ratios(found, "charlm sampling 1x128"), min, "{:.0f}"),
        "training": figure(characters("charlm training 2x128", "RNN", 50), max, "{:,.0f}"),
        "training-ratio": figure(
            [r for c in found if c.cell == "RNN" for r in ratios([c], "charlm training 2x128")]
        ),
        "threads": figure(threads(lambda c: c.B >= 16 and c.H >= 64)),
        "table": summary(found),
        "tables": markdown(data, found, folder),
        "picture": (
            "![A training step of RNN, GRU and LSTM in five workloads, times faster than torch.nn]"
            f"({folder}/workloads.png)"
            if steps
            else NOT_MEASURED
        ),
    }


def filled(text: str, document: Path, results: Path) -> str:
    """The text of a document with the figures of the results."""
    texts = figures(*load(results), results, document)

    def place(match: re.Match) -> str:
        begin, key, _, end = match.groups()
        space = "\n" if key in OF_BLOCKS else ""
        return f"{begin}{space}{texts[key]}{space}{end}"

    return PLACE.sub(place, text)


def read() -> dict[Path, str]:
    """The documents that hold figures."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    texts = {page: page.read_text(encoding="utf-8") for page in pages}
    return {page: text for page, text in texts.items() if PLACE.search(text)}


def filled_in_last() -> Path:
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    named = re.search(r"<!-- figure: results -->\[`(.+?)`\]", text)
    assert named, "docs/benchmarks.md names no results file"
    return ROOT / named[1]


def disagreeing() -> list[str]:
    """Documents that are not what the results say."""
    results = filled_in_last()
    return [page.name for page, text in read().items() if filled(text, page, results) != text]


def missing() -> list[str]:
    """Figures that stand in a document and were not measured."""
    return [
        f"{page.name}: {key}"
        for page, text in read().items()
        for _, key, figure, _ in PLACE.findall(text)
        if NOT_MEASURED in figure
    ]


def main(results: str | None = None) -> int:
    if results is not None:
        draw(*load(results), Path(results))
        for page, text in read().items():
            page.write_text(filled(text, page, Path(results)), encoding="utf-8")
    wrong, absent = disagreeing(), missing()
    for name in wrong:
        print(f"{name} disagrees with {filled_in_last()}: run benchmarks/figures.py on that file")
    for place in absent:
        print(f"{place} was not measured")
    return bool(wrong or absent)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
