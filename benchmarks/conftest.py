"""Fixtures of the benchmarks: `side_by_side` measures and records, `quick` tells how much."""

from __future__ import annotations

import copy
import os
import platform
import re
import sys
from pathlib import Path

# One thread for the peers that read the environment; must be set before they are imported.
os.environ.setdefault(
    "XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import pytest
import torch

from . import native, peers
from .common import ALL_CPUS, GRIDS, QUICK_GRIDS, Shape, Side, begin, measure, use_threads


def pytest_addoption(parser):
    group = parser.getgroup("charrnn_fast")
    group.addoption("--quick", action="store_true", help="fewer shapes and rounds")
    group.addoption("--ours-only", action="store_true", help="no JAX, ONNX, oneDNN")


def pytest_configure(config):
    # Before any peer creates its threads, so that they inherit the mask.
    use_threads(1)


def pytest_generate_tests(metafunc):
    """`cell, shape` of a benchmark that names neither itself: the grid."""
    parametrized = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    if "shape" in metafunc.fixturenames and not any("shape" in names for names in parametrized):
        grids = QUICK_GRIDS if metafunc.config.getoption("--quick") else GRIDS
        cases = [(cell, shape) for cell, shapes in grids.items() for shape in shapes]
        metafunc.parametrize("cell, shape", cases, ids=[f"{c}-{s}" for c, s in cases])


@pytest.fixture(autouse=True)
def one_thread():
    """Every benchmark starts on one pinned thread."""
    use_threads(1)
    yield
    use_threads(1)
    torch.set_grad_enabled(True)


@pytest.fixture(scope="session")
def two_cores():
    """Threads that wait for each other cannot be timed on cores that are taken away meanwhile."""
    if len(ALL_CPUS) < 2:
        pytest.skip("needs two cores")
    lost = native.lost_share(ALL_CPUS)
    if lost > 0.05:
        pytest.skip(f"with both cores busy, the host takes {100 * lost:.0f}% of a core's time")


@pytest.fixture(scope="session")
def quick(request) -> bool:
    return request.config.getoption("--quick")


@pytest.fixture
def left_out(quick):
    """left_out(condition) skips what a quick run does without."""

    def skip(condition: bool) -> None:
        if quick and condition:
            pytest.skip("left out of a quick run")

    return skip


@pytest.fixture(scope="session")
def seconds(quick) -> float:
    """Time to spend on one comparison."""
    return 0.3 if quick else 2.0


@pytest.fixture
def installed(request):
    """The peers of a problem that can be built here; missing ones are named once at the end."""

    def build(problem, backward: bool) -> list[Side]:
        sides = []
        for name, make in peers.PEERS.items():
            if request.config.getoption("--ours-only") and name != "torch":
                continue
            try:
                side = make(problem, backward)
            except ImportError as reason:
                request.config.stash.setdefault(MISSING, {})[name] = str(reason)
                continue
            if side is not None:
                sides.append(side)
        return sides

    return build


MISSING = pytest.StashKey[dict]()


def pytest_terminal_summary(terminalreporter, config):
    for name, reason in config.stash.get(MISSING, {}).items():
        terminalreporter.write_line(f"peer left out: {name}: {reason}", yellow=True)


@pytest.fixture
def side_by_side(benchmark, request, seconds):
    """Measures sides in turns and records each as a benchmark of its own, in one group.

    pytest-benchmark measures one function after the other, minutes apart; here all sides of a
    comparison share the same minutes (see common.measure). Its records, tables and JSON are used
    as they are.
    """

    def run(
        topic: str,
        cell: str,
        shape: Shape,
        sides: list[Side],
        threads: int = 1,
        budget: float | None = None,
        round_time: float = 2e-3,
        **info,
    ) -> dict[str, list[float]]:
        benchmark._mode = "side by side"
        if not benchmark.enabled:  # --benchmark-disable: correctness only
            for side in sides:
                begin(side)
                side.run()
            return {}
        times, calls = measure(sides, seconds if budget is None else budget, round_time=round_time)
        group = f"{cell} {topic} {shape}"
        for side in sides:
            record = copy.copy(benchmark)
            record.name = f"{side.name} [{group}]"
            record.fullname = f"{request.node.nodeid}::{side.name}"
            record.group = group
            record.params = None
            record.extra_info = {
                "topic": topic,
                "side": side.name,
                "cell": cell,
                "threads": threads,
                **shape._asdict(),
                **info,
                **side.info,
            }
            stats = record._make_stats(calls[side.name])
            for value in times[side.name]:
                stats.update(value * calls[side.name])
        return times

    return run


def pytest_benchmark_update_machine_info(config, machine_info):
    use_threads(1)
    text = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    model = re.search(r"model name\s*: (.*)", text)
    machine_info.clear()
    machine_info.update(
        cpu=model[1] if model else platform.processor(),
        cores=len(ALL_CPUS),
        system=f"{platform.system()} {platform.release()}",
        machine=platform.machine(),
        python=platform.python_version(),
        limits=native.core_limits(),
        versions=peers.versions(),
        quick=config.getoption("--quick"),
    )
    try:
        import charrnn_fast

        machine_info["charrnn_fast"] = charrnn_fast.build_info()
        machine_info["isa"] = charrnn_fast.current_isa()
        machine_info["isas"] = charrnn_fast.available_isas()
    except ImportError:
        pass


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """Keeps the file small: medians and quartiles are reported, not every round."""
    for record in output_json["benchmarks"]:
        for key in ("data", "options"):
            record["stats"].pop(key, None)
            record.pop(key, None)
