"""Two threads beside one, on every shape; and while another process holds one of the cores."""

import multiprocessing
import os
import signal
import statistics
import time

import pytest

from . import peers
from .common import ALL_CPUS, Problem, Shape, check, measure, use_threads

pytestmark = pytest.mark.usefixtures("two_cores")

# One sequence: the hidden units are divided.
SINGLE = [Shape(1, 100, 64, 256), Shape(1, 100, 64, 512), Shape(1, 50, 64, 1024)]
DISTURBED = [Shape(1, 100, 64, 512), Shape(16, 100, 64, 64), Shape(32, 100, 64, 128)]


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
        problem.shape,
        sides,
        budget=seconds / 2,
        flops=problem.shape.flops(backward),
        gain_of_cores=gain_of_cores(),
    )


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
def bench_threads(shape, backward, side_by_side, seconds):
    compare(Problem(shape), backward, side_by_side, seconds)


@pytest.mark.parametrize("single", SINGLE, ids=str)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
def bench_one_sequence(single, backward, side_by_side, seconds):
    compare(Problem(single), backward, side_by_side, seconds)


def _spin(cpu):
    os.sched_setaffinity(0, [cpu])
    while True:
        pass


@pytest.fixture
def neighbour():
    """Another process that holds one core while its `busy` is true."""
    process = multiprocessing.get_context("spawn").Process(
        target=_spin, args=(ALL_CPUS[0],), daemon=True
    )
    process.start()
    time.sleep(1.0)
    os.kill(process.pid, signal.SIGSTOP)

    def busy(yes):
        os.kill(process.pid, signal.SIGCONT if yes else signal.SIGSTOP)
        time.sleep(2e-3)
        use_threads(2)

    yield busy
    process.kill()
    process.join()


@pytest.mark.parametrize("disturbed", DISTURBED, ids=str)
def bench_busy_neighbour(disturbed, neighbour, side_by_side, seconds):
    problem = Problem(disturbed)
    sides = []
    for make, name in ((peers.our_op, "op"), (peers.torch_rnn, "nn.RNN")):
        for busy in (False, True):
            side = make(problem, True)
            side.name = f"{name}, {'one core busy' if busy else 'quiet'}"
            side.prepare = lambda busy=busy: neighbour(busy)
            sides.append(side)
    # Rounds of 20 ms: longer than the scheduler's time slice.
    side_by_side("busy neighbour", disturbed, sides, threads=2, round_time=20e-3)
