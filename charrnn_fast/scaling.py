"""How calls scale with threads on this machine, beside what the model of threads expects.

The plan by which a call is divided (csrc/thread_model.cpp) was measured with two threads only. The
table of ``charrnn-fast bench --threads`` says how it does on a machine with more.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

import charrnn_fast
from charrnn_fast import _C

# A few sequences and many, within a core's cache and beyond it.
SHAPES = ((200, 1, 64, 256), (200, 1, 64, 1024), (100, 64, 64, 128), (100, 64, 64, 512))
CELLS = {"RNN": 0, "LSTM": 3, "GRU": 4}  # as in csrc/kernels/rnn.h


class Scaling(NamedTuple):
    """One cell, size (T, B, I, H) and pass with one number of threads."""

    cell: str
    size: tuple[int, int, int, int]
    backward: bool  # forward and backward, not forward alone
    threads: int
    members: int  # threads that the plan takes, of these
    split: str
    milliseconds: float
    modelled: float  # times as fast as one thread, says the model


def thread_numbers(most: int) -> list[int]:
    """1, 2, 4, ... and ``most`` itself."""
    return sorted({*(2**i for i in range(most.bit_length()) if 2**i <= most), most})


def measure(
    seconds: float,
    most: int,
    shapes: tuple[tuple[int, int, int, int], ...] = SHAPES,
) -> Iterator[Scaling]:
    """Times each cell and size with 1 to ``most`` threads, each for about ``seconds``."""
    before = torch.get_num_threads()
    _, node_cores, l2 = _C.machine()
    try:
        for name, (T, B, I, H) in ((name, shape) for shape in shapes for name in CELLS):
            kind = getattr(charrnn_fast, name, None)
            if kind is None:
                continue
            module = kind(I, H)
            x = torch.randn(T, B, I)
            for backward in (False, True):
                alone = 0.0
                for threads in thread_numbers(most):
                    torch.set_num_threads(threads)
                    sizes = (CELLS[name], T, B, T * B, I, H, 1, backward)
                    members, split, _, cycles = _C.modelled_plan(threads, node_cores, l2, *sizes)
                    alone = alone or cycles
                    taken = _milliseconds(module, x, backward, seconds)
                    size = (T, B, I, H)
                    modelled = alone / cycles
                    yield Scaling(name, size, backward, threads, members, split, taken, modelled)
    finally:
        torch.set_num_threads(before)


def _milliseconds(
    module: torch.nn.Module, x: torch.Tensor, backward: bool, seconds: float
) -> float:
    """The median of one call, over as many as fit into ``seconds``, three at least."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    with torch.set_grad_enabled(backward):
        while len(times) < 4 or time.perf_counter() < end:
            start = time.perf_counter()
            y = module(x)[0]
            if backward:
                torch.autograd.grad(y, list(module.parameters()), torch.ones_like(y))
            times.append(time.perf_counter() - start)
    return median(times[1:]) * 1e3


def machine() -> str:
    """CPU, threads and cache, for the head of the table."""
    threads, _, l2 = _C.machine()
    model = platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    nodes = len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))) or 1
    limit = _C.cgroup_cpus("/sys/fs/cgroup", "/proc/self/cgroup")
    return (
        f"{model}, {nodes} NUMA node{'s' * (nodes > 1)}, L2 {l2 / 2**20:.2g} MB, "
        f"{charrnn_fast.current_isa()}; cgroup: {limit or 'no'} CPUs' limit; "
        f"torch {torch.__version__} uses {torch.get_num_threads()} threads, we {threads}"
    )


def table(rows: list[Scaling]) -> str:
    """A line for each cell, size and pass: times of one thread, then how many times as fast."""
    numbers = sorted({row.threads for row in rows})
    lines = [
        "One thread in ms, then by threads: times as fast (as the model expects; members, split)",
        f"{'':4} {'T x B x I x H':>17} {'':8} {1:>9}" + "".join(f"{n:>22}" for n in numbers[1:]),
    ]
    for first in (row for row in rows if row.threads == 1):
        shape = " x ".join(map(str, first.size))
        line = f"{first.cell:4} {shape:>17} {'both' if first.backward else 'forward':8} "
        line += f"{first.milliseconds:9.3f}"
        for row in rows:
            if row[:3] == first[:3] and row.threads > 1:
                ratio = first.milliseconds / row.milliseconds
                plan = f"({row.modelled:.1f}; {row.members} {row.split})"
                line += f"{ratio:6.2f} {plan:>15}"
        lines.append(line)
    return "\n".join(lines)
