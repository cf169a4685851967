"""Turns a results file into tables, which are printed, and plots, which go beside it.

    python benchmarks/report.py benchmarks/results/<machine>.json

figures.py puts them into the documents.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from results import GATES, Comparison, load

ENGINES = ("JAX", "ONNX Runtime", "oneDNN")  # the peers beside torch's module
COLOURS = {"torch": "C3", "JAX": "C0", "ONNX Runtime": "C2", "oneDNN": "C1", "op": "black"}
CELL_COLOURS = {"RNN": "#4c78a8", "GRU": "#f58518", "LSTM": "#54a24b"}
TOPICS = ("forward", "forward+backward")
SEQUENCES = ("packed", "bidirectional")


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


def of(found: list[Comparison], cell: str, topic: str) -> list[Comparison]:
    return [c for c in found if c.cell == cell and c.topic == topic]


def cells_of(found: list[Comparison]) -> list[str]:
    """The cells that were measured."""
    return [cell for cell in GATES if any(of(found, cell, topic) for topic in TOPICS)]


def peers_of(cell: str) -> tuple[str, ...]:
    return (f"nn.{cell}", *ENGINES)


def colour(side: str) -> str:
    return COLOURS["torch" if side.startswith("nn.") else side]


NOT_MEASURED = "not measured"


def summary(found: list[Comparison]) -> str:
    """A line a comparison, a column a cell: geometric means over the shapes, and the worst one."""

    def over_torch(side):
        return lambda c: c.speedup(side, c.torch)

    def over_best(c):
        return c.speedup("op", c.best_peer())

    rows = (
        ("training step, against `torch.nn`", "forward+backward", over_torch("module")),
        ("the same with packed sequences", "packed", over_torch("module")),
        ("forward, against `torch.nn`", "forward", over_torch("module")),
        ("one step of a cell, against `torch.nn`'s", "cell step",
         lambda c: c.speedup(f"{c.cell}Cell", f"{c.torch}Cell")),
        ("our operator, forward, against the best of all", "forward", over_best),
        ("our operator, training step, against the best of all", "forward+backward", over_best),
    )  # fmt: skip

    def figure(chosen, ratio):
        ratios = [ratio(c) for c in chosen if c.peers]
        if not ratios:
            return NOT_MEASURED
        return f"{statistics.geometric_mean(ratios):.1f}x ({min(ratios):.1f}x)"

    lines = [f"| times faster: mean (worst) | {' | '.join(GATES)} |", "|---|" + "---:|" * 3]
    for name, topic, ratio in rows:
        figures = [figure(of(found, cell, topic), ratio) for cell in GATES]
        lines.append(f"| {name} | {' | '.join(figures)} |")
    return "\n".join(lines)


def main_table(found: list[Comparison], cell: str, topic: str) -> str:
    chosen = of(found, cell, topic)
    peers = [p for p in peers_of(cell) if any(p in c.seconds for c in chosen)]
    lines = [
        f"| B T I H | {' | '.join(peers)} | our op | our module | op vs best peer | % of peak |",
        "|---|" + "---:|" * (len(peers) + 4),
    ]
    for c in chosen:
        times = [microseconds(c.seconds[p]) if p in c.seconds else "" for p in peers]
        times += [microseconds(c.seconds["op"]), microseconds(c.seconds["module"])]
        ratio = f"{c.speedup('op', c.best_peer()):.1f}x" if c.peers else ""
        share = f"{100 * c.share_of_peak():.0f}"
        lines.append(f"| {c.B} {c.T} {c.I} {c.H} | {' | '.join(times)} | {ratio} | {share} |")
    return "\n".join(lines)


def side_table(found: list[Comparison], chosen, what: str, unit) -> str:
    """One line a comparison, one column a side, for small ones; torch's modules are one column."""
    found = [c for c in found if chosen(c)]
    if not found:
        return ""

    def column(c, side):
        return {c.torch: "torch's", f"{c.torch}Cell": "torch's", f"{c.cell}Cell": "our cell"}.get(
            side, side
        )

    sides = list(dict.fromkeys(column(c, s) for c in found for s in c.seconds if s != "FMA peak"))
    lines = [f"| {what} | {' | '.join(sides)} |", "|---|" + "---:|" * len(sides)]
    for c in found:
        figures = {column(c, side): unit(c, seconds) for side, seconds in c.seconds.items()}
        row = " | ".join(figures.get(side, "") for side in sides)
        lines.append(f"| {c.cell} {c.topic}, {c.name} | {row} |")
    return "\n".join(lines)


def markdown(data: dict, found: list[Comparison], folder: str) -> str:
    stem = f"{folder}/" if folder else ""
    parts = [
        f"{environment(data)}. Float32, one thread on one pinned core; medians of rounds in which "
        "all sides take turns, after each was checked against float64. Peers without an autograd "
        "engine stand beside our op, called as they are, with arguments bound once; torch's module "
        "beside our module.",
        summary(found),
    ]
    if "note" in data["machine_info"]:
        parts.append(data["machine_info"]["note"])
    for cell in cells_of(found):
        for topic in TOPICS:
            name = "forward" if topic == "forward" else "forward and all gradients"
            parts += [f"**{cell}, {name}** (microseconds)", main_table(found, cell, topic)]
    tables = (
        ("Sequences of different lengths, and both directions, with all gradients", SEQUENCES,
         "microseconds", lambda c, s: microseconds(s)),
        ("A step of a cell, without and with the gradients of state and weights", ("cell ",),
         "microseconds", lambda c, s: microseconds(s)),
        ("A training step of five workloads", ("workload ",),
         "microseconds", lambda c, s: microseconds(s)),
        ("The character model, end to end", ("charlm",),
         "thousand characters/s", lambda c, s: f"{c.info['characters'] / s / 1e3:,.1f}"),
    )  # fmt: skip
    for title, topics, what, unit in tables:
        table = side_table(found, lambda c, t=topics: c.topic.startswith(t), what, unit)
        if table:
            parts += [f"**{title}**", table]
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


def workloads(data: dict, found: list[Comparison], save) -> None:
    """The README's picture: a bar a cell and workload, and a tick for the fastest other peer."""
    import matplotlib.pyplot as plt

    cells = ("RNN", "GRU", "LSTM")
    chosen = {(c.topic, c.cell): c for c in found if c.topic.startswith("workload ")}
    topics = list(dict.fromkeys(topic for topic, _ in chosen))
    if not topics:
        return
    figure, axis = plt.subplots(figsize=(8.5, 1.2 + 0.85 * len(topics)), layout="constrained")
    names, furthest = [], 1.0
    for group, topic in enumerate(topics):
        shown = [chosen[topic, cell] for cell in cells if (topic, cell) in chosen]
        for c in shown:
            y = group + (cells.index(c.cell) - 1) * 0.26
            end = ratio = c.speedup("module", c.torch)
            axis.barh(y, ratio - 1, 0.24, left=1, color=CELL_COLOURS[c.cell])
            others = [c.speedup(side, c.torch) for side in c.peers if side != c.torch]
            if others:
                tick = max(others)
                axis.plot([tick] * 2, [y - 0.12, y + 0.12], color="black", linewidth=2)
                if ratio < tick < 1.3 * ratio:  # where the text would be
                    end = tick
                furthest = max(furthest, tick)
            axis.text(max(end, 1) * 1.03, y, f"{ratio:.1f}x", va="center", fontsize=9)
            furthest = max(furthest, 1.15 * end)
        c = shown[0]
        more = "\npacked, in both directions" if c.info["packed"] else ""
        names.append(f"{topic.removeprefix('workload ')}\n{c.name}{more}")
    axis.axvline(1, color="grey", linewidth=1)
    axis.set_xscale("log")
    ticks = [n for n in (1, 2, 5, 10, 20, 50) if n <= 1.1 * furthest]
    axis.set_xticks(ticks, ["torch.nn = 1", *(f"{n}x" for n in ticks[1:])])
    axis.minorticks_off()
    axis.set_xlim(right=1.1 * furthest)
    axis.set_yticks(range(len(topics)), names)
    axis.invert_yaxis()
    axis.set_title("A training step, times faster than torch.nn (one CPU thread, float32)")
    axis.grid(alpha=0.3, axis="x")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    handles = [plt.Rectangle((0, 0), 1, 1, color=CELL_COLOURS[cell], label=cell) for cell in cells]
    handles += axis.plot([], [], color="black", linewidth=2, label="the faster of JAX and oneDNN")
    axis.legend(handles=handles, loc="lower right", fontsize=9)
    save(figure, "workloads")


def plots(data: dict, found: list[Comparison], folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "savefig.dpi": 130, "savefig.bbox": "tight"})
    note, cells = environment(data), cells_of(found)
    if not cells:
        return

    def save(figure, name):
        figure.text(0, -0.02, note, fontsize=6, wrap=True, verticalalignment="top")
        figure.savefig(folder / f"{name}.png", metadata={"Software": None})
        plt.close(figure)

    def draw(axis, style, side, points, **more):
        if points:
            label = {"op": "charrnn_fast"}.get(side, side)
            axis.plot(*zip(*points, strict=True), style, color=colour(side), label=label, **more)

    def a_cell_each(height):
        figure, axes = plt.subplots(
            1, len(cells), figsize=(2 + 4 * len(cells), height), sharey=True, squeeze=False
        )
        return figure, list(zip(axes[0], cells, strict=True))

    workloads(data, found, save)

    # Speed-up by shape: a row of plots a cell, as high as its grid.
    shapes = [max(len(of(found, cell, topic)) for topic in TOPICS) for cell in cells]
    figure, axes = plt.subplots(
        len(cells),
        2,
        figsize=(11, 1 + sum(shapes) / 4 + len(cells)),
        sharey="row",
        squeeze=False,
        height_ratios=[rows + 2 for rows in shapes],
        layout="constrained",
    )
    for line, cell in zip(axes, cells, strict=True):
        for axis, topic in zip(line, TOPICS, strict=True):
            chosen = of(found, cell, topic)
            for peer in peers_of(cell):
                ours = "module" if peer.startswith("nn.") else "op"
                points = [
                    (c.speedup(ours, peer), row)
                    for row, c in enumerate(chosen)
                    if peer in c.seconds
                ]
                draw(axis, "o", peer, points)
            axis.axvline(1, color="grey", linewidth=1)
            axis.set_xscale("log")
            axis.set_xticks([1, 2, 5, 10, 20, 50], ["1x", "2x", "5x", "10x", "20x", "50x"])
            axis.set_title(f"{cell}, {topic}: times faster than each peer")
            axis.set_yticks(range(len(chosen)), [f"{c.B} {c.T} {c.I} {c.H}" for c in chosen])
            axis.grid(alpha=0.3)
            axis.legend(fontsize=7)
        line[0].set_ylabel("B T I H")
        line[0].invert_yaxis()
    save(figure, "speedup")

    # Against the roof: the work a step offers at once decides how much of it can be reached.
    figure, axes = a_cell_each(4.5)
    for axis, cell in axes:
        chosen = of(found, cell, "forward+backward")
        for side in ("op", *peers_of(cell)):
            points = [
                (c.B * c.H, c.info["flops"] / c.seconds[side] / 1e9)
                for c in chosen
                if side in c.seconds
            ]
            draw(axis, "o", side, points, alpha=0.8)
        if chosen:
            peak = statistics.median(c.peak() for c in chosen) / 1e9
            axis.axhline(peak, color="grey", label=f"FMA peak, {peak:.0f} GFLOP/s")
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_title(cell)
        axis.set_xlabel("B x H: values computed a step")
        axis.grid(alpha=0.3, which="both")
        axis.legend(fontsize=7)
    axes[0][0].set_ylabel("GFLOP/s, forward and all gradients")
    save(figure, "roofline")

    # Scaling in T.
    figure, axes = a_cell_each(4)
    for axis, cell in axes:
        chosen = sorted(of(found, cell, "scaling in T"), key=lambda c: c.T)
        for side in ("op", *peers_of(cell)):
            points = [(c.T, c.seconds[side] / c.T * 1e6) for c in chosen if side in c.seconds]
            draw(axis, "o-", side, points)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel("T")
        if chosen:
            shape = f"B={chosen[0].B} I={chosen[0].I} H={chosen[0].H}"
            axis.set_title(f"{cell}, {shape}")
            axis.legend(fontsize=7)
        axis.grid(alpha=0.3, which="both")
    axes[0][0].set_ylabel("microseconds a step, forward and all gradients")
    save(figure, "scaling")


def draw(data: dict, found: list[Comparison], results: Path) -> Path:
    """The plots, into the folder beside the results file."""
    folder = results.with_suffix("")
    folder.mkdir(exist_ok=True)
    plots(data, found, folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    results = parser.parse_args().results
    data, found = load(results)
    print(markdown(data, found, str(draw(data, found, results))))


if __name__ == "__main__":
    main()
