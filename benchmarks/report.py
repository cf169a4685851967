"""Turns a results file into the README's table and the plots beside it.

    python benchmarks/report.py benchmarks/results/<machine>.json [--readme README.md]

Plots go next to the results file. With --readme the text between the markers in that file is
replaced; otherwise it is printed.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from results import Cell, load

PEERS = ("nn.RNN", "JAX", "ONNX Runtime", "oneDNN")
COLOURS = {"nn.RNN": "C3", "JAX": "C0", "ONNX Runtime": "C2", "oneDNN": "C1", "op": "black"}
TOPICS = ("forward", "forward+backward")


def microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.3g}" if seconds < 1e-3 else f"{seconds * 1e6:,.0f}"


def environment(data: dict) -> str:
    machine = data["machine_info"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    limits = machine["limits"]
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {limits['clock_ghz']:.1f} GHz; "
        f"FMA peak {limits['fp32_gflops']:.0f} GFLOP/s a core; {machine.get('isa', 'no')} kernels; "
        f"{versions}; commit {data['commit_info']['id'][:7]}, {data['datetime'][:10]}"
    )


def main_table(cells: list[Cell], topic: str) -> str:
    peers = [p for p in PEERS if any(c.topic == topic and p in c.seconds for c in cells)]
    lines = [
        f"| B T I H | {' | '.join(peers)} | our op | our module | op vs best peer | % of peak |",
        "|---|" + "---:|" * (len(peers) + 4),
    ]
    for c in cells:
        if c.topic != topic:
            continue
        times = [microseconds(c.seconds[p]) if p in c.seconds else "" for p in peers]
        times += [microseconds(c.seconds["op"]), microseconds(c.seconds["module"])]
        ratio = c.speedup("op", c.best_peer())
        share = f"{100 * c.share_of_peak():.0f}"
        lines.append(f"| {c.B} {c.T} {c.I} {c.H} | {' | '.join(times)} | {ratio:.1f}x | {share} |")
    return "\n".join(lines)


def side_table(cells: list[Cell], chosen, what: str, unit) -> str:
    """One line a cell, one column a side: the small comparisons."""
    cells = [c for c in cells if chosen(c)]
    if not cells:
        return ""
    sides = list(dict.fromkeys(s for c in cells for s in c.seconds if s != "FMA peak"))
    lines = [f"| {what} | {' | '.join(sides)} |", "|---|" + "---:|" * len(sides)]
    for c in cells:
        figures = [unit(c, c.seconds[s]) if s in c.seconds else "" for s in sides]
        lines.append(f"| {c.topic}, {c.name} | {' | '.join(figures)} |")
    return "\n".join(lines)


def markdown(data: dict, cells: list[Cell], folder: str) -> str:
    stem = f"{folder}/" if folder else ""
    parts = [
        f"{environment(data)}. Microseconds, float32, tanh, one thread on one pinned core; medians "
        "of rounds in which all sides take turns, after each was checked against float64. Peers "
        "without an autograd engine stand beside our op, called as they are, with arguments bound "
        "once; `nn.RNN` beside our module.",
    ]
    if "note" in data["machine_info"]:
        parts.append(data["machine_info"]["note"])
    for topic in TOPICS:
        name = "Forward" if topic == "forward" else "Forward and all gradients"
        parts += [f"**{name}**", main_table(cells, topic)]
    end_to_end = side_table(
        cells,
        lambda c: c.topic.startswith("charlm"),
        "thousand characters/s",
        lambda c, s: f"{c.info['characters'] / s / 1e3:,.1f}",
    )
    if end_to_end:
        parts += ["**The character model, end to end**", end_to_end]
    parts.append(
        "\n".join(
            f"![{text}]({stem}{name}.png)"
            for name, text in (
                ("speedup", "Speed-up by shape against each peer"),
                ("roofline", "Achieved GFLOP/s against the measured peak"),
                ("scaling", "Time a step against sequence length"),
            )
        )
    )
    parts.append(
        "`make bench` measures all of it again; `benchmarks/targets.py` lists every target and, "
        "where one is missed, what the machine allows."
    )
    return "\n\n".join(parts)


def plots(data: dict, cells: list[Cell], folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "savefig.dpi": 130, "savefig.bbox": "tight"})
    note = environment(data)

    def save(figure, name):
        figure.text(0, -0.02, note, fontsize=6, wrap=True, verticalalignment="top")
        figure.savefig(folder / f"{name}.png", metadata={"Software": None})
        plt.close(figure)

    # Speed-up by shape.
    figure, axes = plt.subplots(1, 2, figsize=(11, 5.5), sharey=True)
    for axis, topic in zip(axes, TOPICS, strict=True):
        chosen = [c for c in cells if c.topic == topic]
        for peer in PEERS:
            points = [
                (c.speedup("module" if peer == "nn.RNN" else "op", peer), row)
                for row, c in enumerate(chosen)
                if peer in c.seconds
            ]
            if points:
                axis.plot(*zip(*points, strict=True), "o", color=COLOURS[peer], label=peer)
        axis.axvline(1, color="grey", linewidth=1)
        axis.set_xscale("log")
        axis.set_xticks([1, 2, 5, 10, 20, 50], ["1x", "2x", "5x", "10x", "20x", "50x"])
        axis.set_title(f"{topic}: times faster than each peer")
        axis.set_yticks(range(len(chosen)), [f"{c.B} {c.T} {c.I} {c.H}" for c in chosen])
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    axes[0].set_ylabel("B T I H")
    axes[0].invert_yaxis()
    save(figure, "speedup")

    # Against the roof: the work a step offers at once decides how much of it can be reached.
    figure, axis = plt.subplots(figsize=(8, 4.5))
    chosen = [c for c in cells if c.topic == "forward+backward"]
    for side in ("op", *PEERS):
        points = [
            (c.B * c.H, c.info["flops"] / c.seconds[side] / 1e9)
            for c in chosen
            if side in c.seconds
        ]
        if points:
            label = "charrnn_fast" if side == "op" else side
            axis.plot(*zip(*points, strict=True), "o", color=COLOURS[side], label=label, alpha=0.8)
    if chosen:
        peak = sorted(c.peak() for c in chosen)[len(chosen) // 2] / 1e9
        axis.axhline(peak, color="grey", label=f"FMA peak, {peak:.0f} GFLOP/s")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("B x H: values computed a step")
    axis.set_ylabel("GFLOP/s, forward and all gradients")
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=7)
    save(figure, "roofline")

    # Scaling in T.
    figure, axis = plt.subplots(figsize=(8, 4))
    chosen = sorted((c for c in cells if c.topic == "scaling in T"), key=lambda c: c.T)
    for side in ("op", *PEERS):
        points = [(c.T, c.seconds[side] / c.T * 1e6) for c in chosen if side in c.seconds]
        if points:
            label = "charrnn_fast" if side == "op" else side
            axis.plot(*zip(*points, strict=True), "o-", color=COLOURS[side], label=label)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("T")
    axis.set_ylabel("microseconds a step")
    if chosen:
        axis.set_title(
            f"B={chosen[0].B} I={chosen[0].I} H={chosen[0].H}, forward and all gradients"
        )
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=7)
    save(figure, "scaling")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--readme", type=Path, help="file to update between its markers")
    arguments = parser.parse_args()
    data, cells = load(arguments.results)
    folder = arguments.results.with_suffix("")
    folder.mkdir(exist_ok=True)
    plots(data, cells, folder)
    if not arguments.readme:
        print(markdown(data, cells, str(folder)))
        return
    readme = arguments.readme.resolve()
    where = folder.resolve().relative_to(readme.parent).as_posix()
    text = markdown(data, cells, where)
    begin, end = "<!-- measured -->", "<!-- /measured -->"
    found = re.compile(f"{begin}(.*{end})?", re.DOTALL)
    old = readme.read_text()
    assert begin in old, f"{readme} has no {begin}"
    readme.write_text(found.sub(lambda _: f"{begin}\n{text}\n{end}", old, count=1))


if __name__ == "__main__":
    main()
