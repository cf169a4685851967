"""Two threads beside one, on every shape; and while another process holds one of the cores."""

import multiprocessing
import os
import signal
import statistics
import time

import pytest

from . import peers
from .common import ALL_CPUS, CELLS, Shape, check, measure, problem_of, use_threads

pytestmark = pytest.mark.usefixtures("two_cores")

# One sequence: the hidden units are divided. Grids of the other cells have such shapes.
SINGLE = [Shape(1, 100, 64, 256), Shape(1, 100, 64, 512), Shape(1, 50, 64, 1024)]
DISTURBED = [Shape(16, 100, 64, 64), Shape(32, 100, 64, 128)]
DISTURBED_CASES = [
    ("RNN", Shape(1, 100, 64, 512)),
    *((cell, shape) for cell in CELLS for shape in DISTURBED),
]


def with_threads(side, threads):
    side.prepare = lambda: use_threads(threads)
    side.info["threads"] = threads
    return side


def gain_of_cores():
    """What a second core adds to an FMA loop now. In turns with our op it would disturb it."""
    time.sleep(0.02)  # those of the side before spin for some milliseconds
    sides = [with_threads(peers.fma_of_threads(threads), threads) for threads in (1, 2)]
    one, two = (statistics.median(times) for times in measure(sides, 0.2)[0].values())
    return one / two


def compare(problem, backward, side_by_side, seconds):
    sides = [with_threads(peers.our_op(problem, backward), n) for n in (1, 2)]
    for side in sides:
        side.name = f"{side.info['threads']} threads"
        check(side, problem.reference(backward), 1e-3)
    kind = "forward+backward" if backward else "forward"
    side_by_side(
        f"threads {kind}",
        problem.cell,
        problem.shape,
        sides,
        budget=seconds / 4,
        flops=problem.flops(backward),
        gain_of_cores=gain_of_cores(),
    )


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
def bench_threads(cell, shape, backward, side_by_side, seconds):
    compare(problem_of(cell, shape), backward, side_by_side, seconds)


@pytest.mark.parametrize("single", SINGLE, ids=str)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
def bench_one_sequence(single, backward, side_by_side, seconds, left_out):
    left_out(single.H != 512)
    compare(problem_of("RNN", single), backward, side_by_side, seconds)


def _spin(cpu):
    os.sched_setaffinity(0, [cpu])
    while True:
        pass


@pytest.fixture
def neighbour():
    """Another process, made at the first call, that holds one core while its `busy` is true."""
    process = multiprocessing.get_context("spawn").Process(
        target=_spin, args=(ALL_CPUS[0],), daemon=True
    )

    def busy(yes):
        if process.pid is None:
            process.start()
            time.sleep(1.0)
        os.kill(process.pid, signal.SIGCONT if yes else signal.SIGSTOP)
        time.sleep(2e-3)
        use_threads(2)

    yield busy
    if process.pid is not None:
        process.kill()
        process.join()


@pytest.mark.parametrize(("cell", "disturbed"), DISTURBED_CASES)
def bench_busy_neighbour(cell, disturbed, neighbour, side_by_side, seconds, left_out):
    left_out(cell != "RNN" or disturbed != DISTURBED[0])
    problem = problem_of(cell, disturbed)
    sides = []
    for make, name in ((peers.our_op, "op"), (peers.torch_module, problem.torch_name)):
        for busy in (False, True):
            side = make(problem, True)
            side.name = f"{name}, {'one core busy' if busy else 'quiet'}"
            side.prepare = lambda busy=busy: neighbour(busy)
            sides.append(side)
    # Rounds of 20 ms: longer than the scheduler's time slice.
    side_by_side(
        "busy neighbour", cell, disturbed, sides, threads=2, budget=seconds / 2, round_time=20e-3
    )
