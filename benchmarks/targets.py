"""Lists the project's performance targets, each with the figure measured and whether it is met.

    python benchmarks/targets.py benchmarks/results/<machine>.json

A target over several shapes shows its worst one. Exits with 1 when a target is missed. That vanilla
RNN is nowhere slower than at a commit is no row here: `make bench-compare BASE=<commit>` tells.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from results import GATES as CELLS
from results import Comparison, load

DIRECTIONS = ("forward", "forward+backward")


class Table:
    """`limits`, where given, hold what the machine allows at best for some of the values."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, str, str, str, str]] = []
        self.missed: list[tuple[str, str, str, str, str]] = []

    def at_least(self, number, what, values: dict[str, float], wanted, unit="x", limits=None):
        self._add(number, what, values, wanted, unit, limits, min, ">=")

    def at_most(self, number, what, values: dict[str, float], wanted, unit="x"):
        self._add(number, what, values, wanted, unit, None, max, "<=")

    def _add(self, number, what, values, wanted, unit, limits, worst_of, sign):
        target = f"{sign} {wanted:g}{unit}"
        if not values:
            self.rows.append((number, what, target, "-", "not measured"))
            return
        missed = [k for k, v in values.items() if (v < wanted if sign == ">=" else v > wanted)]
        shape = worst_of(values, key=values.get)
        count = f"; {len(values) - len(missed)} of {len(values)} met" if len(values) > 1 else ""
        figure = f"{values[shape]:.3g}{unit} ({shape}{count})"
        self.rows.append((number, what, target, figure, "MISSED" if missed else "met"))
        for k in missed if limits else ():
            row = (number, what, k, f"{values[k]:.3g}{unit}", f"of {limits[k]:.3g}{unit}")
            self.missed.append(row)

    def print(self) -> None:
        print_columns(self.rows)
        met = sum(row[4] == "met" for row in self.rows)
        print(f"\n{met} of {len(self.rows)} met")
        if self.missed:
            print(
                "\nMissed, and what the machine allows at best (Comparison.floor; two FMA loops):\n"
            )
            print_columns(self.missed)


def print_columns(rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        print("  ".join([*cells, row[-1]]))


def of(cells: list[Comparison], cell: str, topic: str) -> list[Comparison]:
    return [c for c in cells if c.cell == cell and c.topic == topic]


def against_peers(table: Table, cells: list[Comparison], machine: dict) -> None:
    means = {"RNN": (1.8, 1.8), "LSTM": (1.25, 1.4), "GRU": (1.3, 1.6)}
    for cell, wanted in means.items():
        for topic, mean in zip(DIRECTIONS, wanted, strict=True):
            ratios, small, limits = {}, {}, {}
            for c in of(cells, cell, topic):
                if not c.peers:
                    continue
                peer = c.best_peer()
                name, ratio = f"{c.name}, {peer}", c.speedup("op", peer)
                ratios[name] = ratio
                limits[name] = c.seconds[peer] / c.floor(machine)
                if c.B <= 4 or c.H <= 64:
                    small[name] = ratio
            what = f"{cell} {topic}, op against the best peer"
            table.at_least("1", what, ratios, 1.0, limits=limits)
            if cell == "RNN":
                what = f"{cell} {topic}, the same at B<=4 or H<=64"
                table.at_least("1", what, small, 2.5, limits=limits)
            roof = {"geometric mean": statistics.geometric_mean(limits.values())} if limits else {}
            values = (
                {"geometric mean": statistics.geometric_mean(ratios.values())} if ratios else {}
            )
            table.at_least("1", f"{cell} {topic}, mean over the grid", values, mean, limits=roof)


def against_module(table: Table, cells: list[Comparison], machine: dict) -> None:
    every = lambda c: True  # noqa: E731
    first = lambda c: (c.B, c.T, c.H) == (1, 100, 128)  # noqa: E731
    wanted = {
        "RNN": (
            ("B=3 T=16 H=12", 15, lambda c: (c.B, c.T, c.H) == (3, 16, 12)),
            ("B=1 T=100 H=128", 12, first),
            ("B=16 H=64", 4, lambda c: (c.B, c.H) == (16, 64)),
            ("B=32 H=128", 2.2, lambda c: (c.B, c.H) == (32, 128)),
            ("H>=256", 1.6, lambda c: c.H >= 256),
        ),
        "LSTM": (("every shape", 1.3, every),),
        "GRU": (
            ("every shape", 1.5, every),
            ("B=1 T=100 H=128", 15, first),
            ("B=4 T=100 H=64", 15, lambda c: (c.B, c.T, c.H) == (4, 100, 64)),
        ),
    }
    means = {"LSTM": 2.0, "GRU": 5.0}
    for cell, rows in wanted.items():
        chosen = of(cells, cell, "forward+backward")
        ratios = {c.name: c.speedup("module", c.torch) for c in chosen}
        limits = {c.name: c.seconds[c.torch] / c.floor(machine) for c in chosen}
        for what, least, wanted_of in rows:
            values = {c.name: ratios[c.name] for c in chosen if wanted_of(c)}
            table.at_least(
                "2", f"{cell} module against nn.{cell}, {what}", values, least, limits=limits
            )
        if cell in means:
            values = (
                {"geometric mean": statistics.geometric_mean(ratios.values())} if ratios else {}
            )
            roof = {"geometric mean": statistics.geometric_mean(limits.values())} if limits else {}
            what = f"{cell} module against nn.{cell}, mean over the grid"
            table.at_least("2", what, values, means[cell], limits=roof)
    for cell in means:
        for side, what in (("module", "packed"), ("module, lengths", "by lengths against packed")):
            chosen = [c for c in of(cells, cell, "packed") if side in c.seconds]
            ratios = [c.speedup(side, c.torch) for c in chosen]
            values = (
                {f"geometric mean of {len(ratios)}": statistics.geometric_mean(ratios)}
                if ratios
                else {}
            )
            table.at_least("2", f"{cell} of taggers, {what}", values, 4.0)
    for cell in wanted:
        steps = of(cells, cell, "cell step")
        ratios = {c.name: c.speedup(f"{cell}Cell", f"nn.{cell}Cell") for c in steps}
        table.at_least("2", f"{cell}Cell against nn.{cell}Cell, every shape", ratios, 1.0)
        if cell in means:
            few = {c.name: ratios[c.name] for c in steps if c.B == 1 and c.H <= 256}
            table.at_least("2", f"{cell}Cell against nn.{cell}Cell, B=1 H<=256", few, 3.0)


def against_limits(table: Table, cells: list[Comparison], machine: dict) -> None:
    large = lambda c: c.H >= 256 and c.B >= 32  # noqa: E731
    middle = lambda c: (c.H, c.B) == (128, 32)  # noqa: E731
    gated = (
        ("H>=256 B>=32", 88, large),
        ("H=128 B=32", 85, middle),
        ("H=64 B=16", 80, lambda c: (c.H, c.B) == (64, 16)),
    )
    wanted = {
        "RNN": (("H>=256 B>=32", 90, large), ("H=128 B=32", 85, middle)),
        "LSTM": gated,
        "GRU": gated,
    }
    for cell, rows in wanted.items():
        for what, share, chosen in rows:
            found = [c for c in of(cells, cell, "forward+backward") if chosen(c)]
            table.at_least(
                "3",
                f"{cell} share of FMA peak, {what}",
                {c.name: 100 * c.share_of_peak() for c in found},
                share,
                "%",
                limits={c.name: 100 * c.roof(machine) for c in found},
            )
    for cell in wanted:
        floors = {
            f"{c.name}: {c.seconds['op'] / c.T * 1e6:.2f} us a step": c.seconds["op"]
            / c.info["floor"]
            for c in of(cells, cell, "reading floor")
            if cell != "RNN" or c.H == 128
        }
        table.at_most("3", f"{cell} forward B=1, of reading W_hh once a step", floors, 1.25)


def threads(table: Table, cells: list[Comparison]) -> None:
    wanted = {
        "RNN": (
            ("B>=16 H>=64", 1.85, lambda c: c.B >= 16 and c.H >= 64),
            ("B=1 H=256", 1.5, lambda c: (c.B, c.H) == (1, 256)),
            ("B=1 H>=512", 1.8, lambda c: c.B == 1 and c.H >= 512),
        ),
        "LSTM": (
            ("B>=16 H>=64", 1.8, lambda c: c.B >= 16 and c.H >= 64),
            ("B=1 H=256", 1.5, lambda c: (c.B, c.H) == (1, 256)),
            ("B=1 H=512", 2.0, lambda c: (c.B, c.H) == (1, 512)),
        ),
    }
    wanted["GRU"] = wanted["LSTM"]
    for cell, rows in wanted.items():
        compared = {
            f"{c.name} {topic}": c
            for topic in DIRECTIONS
            for c in of(cells, cell, f"threads {topic}")
        }
        # Not in older results. Of a sequence alone each core's own L2 may give more than that.
        limits = {
            k: c.info["gain_of_cores"] for k, c in compared.items() if "gain_of_cores" in c.info
        }

        def gains(chosen, compared=compared) -> dict[str, float]:
            return {
                k: c.speedup("2 threads", "1 threads") for k, c in compared.items() if chosen(c)
            }

        for what, least, chosen in rows:
            table.at_least("4", f"{cell} two threads, {what}", gains(chosen), least, limits=limits)
        # Where both run on one thread the ratio is 1 and the noise of a measurement remains.
        table.at_least(
            "4", f"{cell} two threads, never slower (3% noise)", gains(lambda c: True), 0.97
        )
        slowdowns = {
            c.name: c.speedup("op, quiet", "op, one core busy")
            for c in of(cells, cell, "busy neighbour")
        }
        table.at_most("4", f"{cell} one core busy, of the quiet time", slowdowns, 2.5)


def scaling(table: Table, cells: list[Comparison]) -> None:
    # From where the fixed cost of a call is small; then a unit must not cost more as they grow.
    for cell in CELLS:
        for letter, start in (("T", 100), ("B", 16)):
            unit = {
                c.info[letter]: c.seconds["op"] / c.info[letter]
                for c in of(cells, cell, f"scaling in {letter}")
                if c.info[letter] >= start
            }
            growth = {
                f"{letter}={n} beside {letter}={min(unit)}": cost / unit[min(unit)]
                for n, cost in unit.items()
                if n != min(unit)
            }
            table.at_most("5", f"{cell} cost of one more {letter}, growth", growth, 1.25)


def dtypes(table: Table, cells: list[Comparison], machine: dict) -> None:
    if not machine["bf16_gflops"]:
        return
    # Where the core's products of bfloat16 are the faster ones. They are not on every core.
    pays = machine["bf16_gflops"] > 1.5 * machine["fp32_gflops"]
    chosen = [c for c in of(cells, "RNN", "dtypes") if c.H >= 256 and c.B >= 32]
    for prefix, name in (("", "bfloat16"), ("module, ", "autocast bfloat16")) if pays else ():
        side, ours = prefix + name, prefix + "float32"
        ratios = {c.name: c.speedup(side, ours) for c in chosen if {side, ours} <= set(c.seconds)}
        table.at_least("6", f"RNN {side} against our float32", ratios, 1.6)
    side, ours = "bfloat16", "converted from bfloat16"
    for cell in CELLS:
        ratios = {
            c.name: c.speedup(side, ours)
            for c in of(cells, cell, "dtypes")
            if {side, ours} <= set(c.seconds)
        }
        table.at_least("6", f"{cell} {side} against float32 with conversion", ratios, 1.0)


def tokens(table: Table, cells: list[Comparison]) -> None:
    # The op is given the array that is one-hot; whoever has ids makes it in each call.
    for cell in CELLS:
        found = of(cells, cell, "tokens")
        for ours, one_hot in (
            ("op, tokens", "op, one-hot"),
            ("module, tokens", "module, one-hot made"),
        ):
            ratios = {c.name: c.speedup(ours, one_hot) for c in found if one_hot in c.seconds}
            what = f"{cell} {ours} against our {one_hot.split(', ')[1]}"
            table.at_least("7", what, ratios, 1.0)
            if cell == "RNN":
                usual = {
                    c.name: ratios[c.name] for c in found if (c.I, c.H) == (65, 128) and ratios
                }
                table.at_least("7", "the same at V=65 H=128", usual, 1.3)


def memory(table: Table, cells: list[Comparison]) -> None:
    most = {"LSTM": 5.0, "GRU": 4.0}
    for c in cells:
        if not c.topic.startswith("memory"):
            continue
        ours, theirs = c.details["module"], c.details[c.torch]
        held = ours["output_bytes"] + ours["input_bytes"] + ours["weight_bytes"]
        if c.cell in most:
            units = {c.name: (ours["saved_bytes"] - held) / (4 * c.T * c.B * c.H)}
            what = f"{c.cell} saved for backward beside y, x, weights"
            table.at_most("8", what, units, round(1.02 * most[c.cell], 2), " T*B*H")
        else:
            what = f"{c.cell} {c.topic.replace('memory', 'saved for backward, of y + x + weights')}"
            table.at_most("8", what, {c.name: ours["saved_bytes"] / held}, 1.02)
        growth = {c.name: ours["peak_growth_bytes"] / theirs["peak_growth_bytes"]}
        what = f"{c.cell} {c.topic.replace('memory', 'peak RSS growth')}, of {c.torch}'s"
        table.at_most("8", what, growth, 1.0)


def overhead(table: Table, cells: list[Comparison]) -> None:
    for cell in CELLS:
        for grad, wanted in (("no_grad", 1 / 5), ("grad", 1 / 3)):
            ratios = {
                f"{c.seconds['module'] * 1e6:.1f} of {c.seconds[c.torch] * 1e6:.1f} us": c.seconds[
                    "module"
                ]
                / c.seconds[c.torch]
                for c in of(cells, cell, f"overhead {grad}")
            }
            what = f"{cell} call at T=B=H=1, {grad}, of nn.{cell}'s"
            table.at_most("9", what, ratios, round(wanted, 3))


def character_model(table: Table, cells: list[Comparison]) -> None:
    """Steps of training and characters drawn, end to end; see bench_charlm.py."""
    training = {
        "RNN": (("2x128", 2.5), ("1x512", 1.8), ("tutorial", 4.0)),
        "LSTM": (("2x128", 1.5), ("1x512", 1.4), ("tutorial", 4.0)),
        "GRU": (("2x128", 2.3), ("tutorial", 6.0)),
    }
    sampling = {
        "RNN": ((1, 0.7), (64, 1.5)),
        "LSTM": ((1, 0.25), (64, 0.5)),
        "GRU": ((1, 0.33),),
    }
    for cell, sizes in training.items():
        # Results of before the plain loop was measured have the other reference only.
        for theirs, name in (
            (f"nn.{cell}", f"nn.{cell} in our loop"),
            ("plain loop", "a plain PyTorch loop"),
        ):
            for size, wanted in sizes:
                ratios = {
                    c.name: c.speedup("module", theirs)
                    for c in of(cells, cell, f"charlm training {size}")
                    if theirs in c.seconds
                }
                what = f"{cell} training {size}, against {name}"
                table.at_least("charlm", what, ratios, wanted)
        gains = {
            c.name: c.speedup("2 threads", "1 threads")
            for c in of(cells, cell, "charlm training threads")
        }
        table.at_least("charlm", f"{cell} training 2x128, two threads", gains, 1.8)
    for cell, rows in sampling.items():
        for streams, wanted in rows:
            speeds = {
                c.name: c.info["characters"] / c.seconds["module"] / 1e6
                for c in of(cells, cell, "charlm sampling 1x128")
                if streams == c.B
            }
            what = f"{cell} sampling 1x128, {streams} stream{'s' * (streams > 1)}, characters/s"
            table.at_least("charlm", what, speeds, wanted, " million")


def errors(table: Table, cells: list[Comparison]) -> None:
    for cell in CELLS:
        ratios = {}
        for c in cells:
            if c.cell != cell or c.topic not in (*DIRECTIONS, "ISAs"):
                continue
            for side, details in c.details.items():
                ours = side != c.torch if c.topic == "ISAs" else side in ("op", "module")
                if ours and "error" in details:
                    ratio = details["error"] / c.details[c.torch]["error"]
                    ratios[f"{c.name} {c.topic} {side}"] = ratio
        table.at_most("exact", f"{cell} error against float64, of nn.{cell}'s", ratios, 2.0)
    for c in cells:
        if c.topic.startswith("activation"):
            ulp = {"results that are normal": c.details["op"]["max_ulp"]}
            table.at_most("exact", f"{c.topic}, largest error", ulp, 4.0, " ulp")


def main(path: str) -> int:
    data, cells = load(path)
    machine = data["machine_info"]
    limits = machine["limits"]
    print(
        f"{machine['cpu']}, {machine['cores']} cores, {data['datetime'][:16]}, "
        f"{machine['versions']}"
    )
    print(
        f"peak {limits['fp32_gflops']:.0f} GFLOP/s fp32, {limits['bf16_gflops']:.0f} bf16; "
        f"L2 {limits['l2_read_gbytes']:.0f} GB/s; clock {limits['clock_ghz']:.2f} GHz; "
        f"ISA {machine.get('isa')}; {'quick' if machine['quick'] else 'full'} run\n"
    )
    table = Table()
    against_peers(table, cells, limits)
    against_module(table, cells, limits)
    against_limits(table, cells, limits)
    threads(table, cells)
    scaling(table, cells)
    dtypes(table, cells, limits)
    tokens(table, cells)
    memory(table, cells)
    overhead(table, cells)
    character_model(table, cells)
    errors(table, cells)
    table.print()
    return any(row[4] == "MISSED" for row in table.rows)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
