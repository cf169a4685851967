"""One HTML page about a run, with nothing outside it: curves, samples, surprises, speed."""

from __future__ import annotations

import html
import io
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import checkpoint
from .checkpoint import Pretrained, from_pretrained
from .data import LineBatches, held_out_part
from .errors import UsageError
from .evaluate import surprisals
from .metrics import read_metrics
from .model import Backend, bits, perplexity
from .sample import sample
from .vocabulary import Ids, Vocabulary

TEMPERATURES = (0.5, 0.8, 1.0, 1.2)
SHOWN = 3000  # characters of the held-out text
GREATEST = 8.0  # bits at which the colour is full

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: #1b1b1b; background: #fff; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; }
table { border-collapse: collapse; } td, th { padding: .15rem 1rem .15rem 0; text-align: left; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
pre { font: 14px/1.45 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
      border-left: 3px solid #ccc; padding-left: 1rem; margin: .5rem 0 1rem; }
.samples { display: grid; gap: 1rem;
           grid-template-columns: repeat(auto-fit, minmax(min(25rem, 100%), 1fr)); }
.figure { overflow-x: auto; } svg { width: 100%; min-width: 36rem; height: auto; }
.scale span { padding: .1rem .6rem; display: inline-block; }
.note { color: #555; }
details td.number { font-size: 14px; white-space: normal; overflow-wrap: anywhere; }
"""


def write_report(
    run: str | Path, output: str | Path | None = None, backend: Backend = "fast"
) -> Path:
    """Writes the page of a run, ``RUN/report.html`` unless said otherwise, and returns its path.

    The held-out text is shown where the text that the run was trained on is still there, unchanged.
    UsageError for a folder that is no run, or without matplotlib.
    """
    run = Path(run)
    name = run.resolve().name
    pretrained = from_pretrained(run, backend)
    rows = read_metrics(run / checkpoint.METRICS)
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        # Nothing is fetched, nothing runs: the page shows text that a model wrote.
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">",
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(name)}: character model</title><style>{STYLE}</style></head>",
        f"<body><h1>{html.escape(name)}</h1>",
        summary(pretrained, rows),
        "<h2>Training</h2>",
        curves(rows),
        "<h2>Samples</h2>",
        samples(pretrained),
        "<h2>Held-out text, by surprise</h2>",
        surprises(pretrained),
        "<h2>Speed</h2>",
        speed(pretrained, rows, backend),
        settings(pretrained),
        "</body></html>",
    ]
    path = Path(output) if output else run / "report.html"
    checkpoint.write_atomic(path, "\n".join(parts).encode("utf-8", "replace"))
    return path


def series(rows: Sequence[dict[str, Any]], name: str) -> tuple[list[float], list[float]]:
    """Epochs and values of one quantity."""
    found = [r for r in rows if isinstance(r.get(name), (int, float))]
    return [float(r.get("epoch", r["step"])) for r in found], [float(r[name]) for r in found]


def table(rows: Sequence[tuple[str, object]]) -> str:
    cells = (
        f'<tr><th>{html.escape(name)}</th><td class="number">{html.escape(str(value))}</td></tr>'
        for name, value in rows
    )
    return f"<table>{''.join(cells)}</table>"


def summary(pretrained: Pretrained, rows: list[dict[str, Any]]) -> str:
    config = pretrained.model.config
    _, held_out = series(rows, "val_loss")
    lines: list[tuple[str, object]] = [
        ("cell, layers x hidden units", config.describe()),
        ("weights", f"{sum(p.numel() for p in pretrained.model.parameters()):,}"),
        ("characters in the vocabulary", len(pretrained.vocabulary)),
    ]
    if rows:
        lines.append(("steps", f"{rows[-1]['step']:,}"))
    if held_out:
        best = min(held_out)
        lines += [
            ("best held-out loss, nats/character", f"{best:.4f}"),
            ("bits/character", f"{bits(best):.4f}"),
            ("perplexity", f"{perplexity(best):.2f}"),
        ]
    return table(lines)


def curves(rows: list[dict[str, Any]]) -> str:
    """Losses, learning rate and gradient norm over epochs, as SVG in the page."""
    if not rows:
        return '<p class="note">No measurement has been written yet.</p>'
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator
    except ImportError:
        raise UsageError("the report needs: pip install matplotlib") from None
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "charrnn_fast", "font.size": 11}):
        figure = Figure(figsize=(9, 6), layout="constrained")
        axes: dict[str, Any] = figure.subplot_mosaic(
            [["loss", "loss"], ["rate", "norm"]], height_ratios=[2, 1]
        )
        # A line through one point shows nothing, and a short run may have no more.
        dots = {"marker": "o", "markersize": 3} if len(rows) < 30 else {}
        training = series(rows, "train_loss")
        axes["loss"].plot(*training, label="training", color="#8fb3d9", **dots)
        epochs, losses = series(rows, "val_loss")
        if losses:
            axes["loss"].plot(
                epochs, losses, label="held out", color="#b2182b", marker="o", markersize=3
            )
            best = int(np.argmin(losses))
            note = f"{losses[best]:.3f}"
            axes["loss"].annotate(
                note, (epochs[best], losses[best]), (0, 8), textcoords="offset points", ha="center"
            )
        axes["loss"].set(ylabel="nats/character", xlabel="epoch")
        axes["loss"].legend(frameon=False)
        axes["rate"].plot(*series(rows, "lr"), color="#555555", **dots)
        axes["rate"].set(ylabel="learning rate", xlabel="epoch")
        axes["norm"].plot(*series(rows, "grad_norm"), color="#555555", **dots)
        axes["norm"].set(ylabel="gradient norm", xlabel="epoch", yscale="log")
        axes["norm"].yaxis.set_major_formatter("{x:g}")
        axes["norm"].yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        axes["norm"].yaxis.set_minor_formatter("{x:g}")
        for axis in axes.values():
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(alpha=0.25)
        drawn = svg(figure, "Loss, learning rate and gradient norm over the epochs")
        return f'<div class="figure">{drawn}</div>'


def svg(figure: Any, title: str) -> str:
    """A figure as an element of the page."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Title": title})
    text = file.getvalue()
    return text[text.index("<svg") :].replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)


def samples(pretrained: Pretrained) -> str:
    boxes = []
    for temperature in TEMPERATURES:
        text = sample(
            pretrained.model, pretrained.vocabulary, length=500, temperature=temperature, seed=1
        )[0]
        boxes.append(f"<div><b>temperature {temperature}</b><pre>{html.escape(text)}</pre></div>")
    return f'<div class="samples">{"".join(boxes)}</div>'


def surprises(pretrained: Pretrained) -> str:
    """Held-out characters on a background that says how little the model expected each."""
    try:
        part = held_out_part(pretrained.training, pretrained.vocabulary)
    except (UsageError, OSError) as error:
        return f'<p class="note">It cannot be shown: {html.escape(str(error))}.</p>'
    ids = (part.ids if isinstance(part, LineBatches) else part)[:SHOWN]
    nats = np.concatenate([np.zeros(1), *surprisals(pretrained.model, [ids])])
    spans = "".join(
        f'<span style="background:{colour(bits(float(value)))}" '
        f'title="{bits(float(value)):.1f} bits">{html.escape(character)}</span>'
        for character, value in zip(characters_of(ids, pretrained.vocabulary), nats, strict=True)
    )
    scale = "".join(
        f'<span style="background:{colour(value)}">{value}{"+" if value == GREATEST else ""}</span>'
        for value in range(int(GREATEST) + 1)
    )
    mean = bits(float(nats[1:].mean()))
    return (
        f'<p class="scale">bits: {scale} &nbsp; mean of these {len(ids):,} characters: '
        f"{mean:.3f} bits</p><pre>{spans}</pre>"
    )


def characters_of(ids: Ids, vocabulary: Vocabulary) -> list[str]:
    """A text for each id, so that bytes within a character stand for themselves."""
    return [vocabulary.decode([i]) for i in ids.tolist()]


def colour(value: float) -> str:
    """From white at 0 bits to red at GREATEST, light enough for black letters."""
    rest = 1 - min(max(value, 0.0), GREATEST) / GREATEST
    return f"rgb({round(235 + 20 * rest)},{round(110 + 145 * rest)},{round(90 + 165 * rest)})"


def speed(pretrained: Pretrained, rows: list[dict[str, Any]], backend: Backend) -> str:
    _, training = series(rows, "chars_per_second")
    lines: list[tuple[str, object]] = []
    if training:
        seconds = max((r["seconds"] for r in rows if "seconds" in r), default=0.0)
        lines += [
            ("training, characters/s (median)", f"{float(np.median(training)):,.0f}"),
            ("training, seconds in all", f"{seconds:,.1f}"),
        ]
    for streams in (1, 64):
        start, length = time.perf_counter(), 1000 if streams == 1 else 200
        sample(pretrained.model, pretrained.vocabulary, length=length, seed=1, streams=streams)
        drawn = length * streams / (time.perf_counter() - start)
        lines.append((f"sampling, {streams} at a time, characters/s", f"{drawn:,.0f}"))
    return table(lines) + (
        f'<p class="note">Sampling was timed once, on the {html.escape(backend)} backend, when '
        "this page was made; charrnn-fast bench measures with care.</p>"
    )


def settings(pretrained: Pretrained) -> str:
    if not pretrained.training:
        return ""
    return (
        "<details><summary>Every option of this run</summary>"
        f"{table(sorted(pretrained.training.items()))}</details>"
    )
