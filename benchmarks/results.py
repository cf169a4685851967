"""Reading a results file: the records of one comparison as a Comparison."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

OURS = ("op", "module", "FMA peak")
GATES = {"RNN": 1, "LSTM": 4, "GRU": 3}


@dataclass
class Comparison:
    """Medians in seconds and what else was recorded, by side."""

    topic: str
    info: dict
    seconds: dict[str, float]
    details: dict[str, dict]

    @property
    def cell(self) -> str:
        return self.info.get("cell", "RNN")  # the only one in older results

    @property
    def torch(self) -> str:
        """The side that is torch's module."""
        return f"nn.{self.cell}"

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
        gates, peak = GATES[self.cell], self.peak()
        product = 2 * gates * self.B * self.H  # operations, a step and a column of W_hh or W_ih
        weights = 4 * gates * self.H**2  # bytes of W_hh
        # Measured for [H, H] of some H: the next smaller one is read at least as fast.
        rates = {4 * int(H) ** 2: rate for H, rate in limits.get("matrix_read_gbytes", {}).items()}
        rate = min((rates[size] for size in rates if size <= weights), default=math.inf)
        recurrence = max(product * self.H / peak, weights / (rate * 1e9))
        forward = recurrence + product * self.I / peak
        if not self.topic.endswith("backward"):
            return self.T * forward
        gradients = product * (2 * self.I + self.H) / peak  # dx, dW_ih, dW_hh
        return self.T * (forward + recurrence + gradients)

    def share_of_peak(self, side: str = "op") -> float:
        return self.info["flops"] / self.seconds[side] / self.peak()

    def roof(self, limits: dict) -> float:
        """The share of the peak that a program of `floor` seconds has."""
        return self.info["flops"] / self.floor(limits) / self.peak()


def load(path: str | Path) -> tuple[dict, list[Comparison]]:
    """The file as it is, and its comparisons in order."""
    data = json.loads(Path(path).read_text())
    found: dict[str, Comparison] = {}
    for record in data["benchmarks"]:
        info, side = record["extra_info"], record["extra_info"]["side"]
        comparison = found.setdefault(record["group"], Comparison(info["topic"], {}, {}, {}))
        comparison.seconds[side] = record["stats"]["median"]
        comparison.details[side] = info
        if side != "FMA peak":
            comparison.info.update(info)
    return data, list(found.values())
