"""Reading a results file: the records of one comparison as a Cell."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

OURS = ("op", "module", "FMA peak")


@dataclass
class Cell:
    """One comparison: medians in seconds and what else was recorded, by side."""

    topic: str
    info: dict
    seconds: dict[str, float]
    details: dict[str, dict]

    @property
    def B(self) -> int:
        return self.info["B"]

    @property
    def T(self) -> int:
        return self.info["T"]

    @property
    def I(self) -> int:  # noqa: E743
        return self.info["I"]

    @property
    def H(self) -> int:
        return self.info["H"]

    @property
    def name(self) -> str:
        return f"B={self.B} T={self.T} I={self.I} H={self.H}"

    @property
    def peers(self) -> dict[str, float]:
        return {side: s for side, s in self.seconds.items() if side not in OURS}

    def speedup(self, ours: str, theirs: str) -> float:
        return self.seconds[theirs] / self.seconds[ours]

    def best_peer(self) -> str:
        return min(self.peers, key=self.peers.get)

    def peak(self) -> float:
        """FLOP/s of the register-only loop, timed in turns with the rest."""
        return self.details["FMA peak"]["flops"] / self.seconds["FMA peak"]

    def floor(self, limits: dict) -> float:
        """Seconds that no program stays below on this core, by what machine_info says it can do.

        All products at the FMA peak; but a step of the recurrence takes no less, forward and once
        more backward, than to read W_hh. Activations and packing are not counted.
        """
        steps, peak = self.T, self.peak()
        product = 2 * self.B * self.H  # operations, a step and a row of W_hh' or W_ih'
        # Measured for some sizes: the next smaller one is read at least as fast.
        rates = {int(H): rate for H, rate in limits.get("matrix_read_gbytes", {}).items()}
        rate = min((rates[H] for H in rates if H <= self.H), default=math.inf)
        recurrence = max(product * self.H / peak, 4 * self.H**2 / (rate * 1e9))
        forward = recurrence + product * self.I / peak
        if not self.topic.endswith("backward"):
            return steps * forward
        gradients = product * (2 * self.I + self.H) / peak  # dx, dW_ih, dW_hh
        return steps * (forward + recurrence + gradients)

    def share_of_peak(self, side: str = "op") -> float:
        return self.info["flops"] / self.seconds[side] / self.peak()


def load(path: str | Path) -> tuple[dict, list[Cell]]:
    """The file as it is, and its cells in order."""
    data = json.loads(Path(path).read_text())
    cells: dict[str, Cell] = {}
    for record in data["benchmarks"]:
        info, side = record["extra_info"], record["extra_info"]["side"]
        cell = cells.setdefault(record["group"], Cell(info["topic"], {}, {}, {}))
        cell.seconds[side] = record["stats"]["median"]
        cell.details[side] = info
        if side != "FMA peak":
            cell.info.update(info)
    return data, list(cells.values())
