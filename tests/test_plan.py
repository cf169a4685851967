"""How calls are divided among threads, on machines that nobody has at hand, and on this one.

``modelled_plan`` answers on paper; what this process may use is tested by running it.
"""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import assert_same, run

import charrnn_fast
from charrnn_fast import _C, cli, scaling

ONE_NODE = 2**31 - 1  # all cores share their last cache, or nothing is known about it
L2 = 2.0**20
ELMAN, LSTM, GRU = 0, 3, 4  # as in csrc/kernels/rnn.h
GATES = {ELMAN: 1, LSTM: 4, GRU: 3}
THREADS = (*range(1, 18), 24, 31, 32, 33, 48, 63, 64, 96, 127, 128)


def plan(threads, cell, T, B, I, H, D=1, backward=False, rows=None, node=ONE_NODE, l2=L2):
    """(members of a team, "batch" or "hidden", both directions at once, modelled cycles)."""
    rows = T * B if rows is None else rows
    return _C.modelled_plan(threads, node, l2, cell, T, B, rows, I, H, D, backward)


def layers():
    """Sizes from a character to a book, every cell, direction and pass."""
    return itertools.product(
        (ELMAN, LSTM, GRU), (1, 20, 200), (1, 3, 8, 65, 256), (1, 128), (1, 48, 256, 1024, 4096),
        (1, 2), (False, True)
    )  # fmt: skip


def test_two_threads_divide_elman_layers_as_they_were_measured():
    """The model was fitted to one and two threads; more threads change nothing there."""
    path = Path(__file__).parent / "plans_of_two_threads.txt"
    lines = [line.split() for line in path.read_text().splitlines() if line[0] != "#"]
    assert len(lines) > 200
    for D, direction, T, B, rows, *words in lines:
        T, B, rows, D, backward = int(T), int(B), int(rows), int(D), direction == "backward"
        for I, word in zip((1, 16, 200, 1024), words, strict=True):
            sizes = (8, 32, 64, 65, 100, 128, 200, 320, 512, 1024, 2048)
            for H, letter in zip(sizes, word, strict=True):
                for threads, want in ((1, "1"), (2, letter)):
                    torch.set_num_threads(threads)
                    used, split, at_once = _C.plan(T, B, rows, I, H, D, "RNN_TANH", backward)
                    found = "1" if used == 1 else "d" if at_once else split[0]
                    assert found == want, (threads, T, B, rows, I, H, D, direction)


def test_more_threads_never_take_longer_and_have_all_something_to_do():
    """For 1 to 128 threads: modelled time falls, each member has rows or a panel of units."""
    for cell, T, B, I, H, D, backward in layers():
        before = float("inf")
        panels = -(-H // (64 if cell == ELMAN else 16))
        for threads in THREADS:
            members, split, at_once, cycles = plan(threads, cell, T, B, I, H, D, backward)
            where = (threads, cell, T, B, I, H, D, backward)
            assert 1 <= members * (2 if at_once else 1) <= threads, where
            assert members <= (B if split == "batch" else panels), where
            assert not at_once or D == 2, where
            assert 0 < cycles <= before, where
            before = cycles


@pytest.mark.parametrize("node", [2, 8, 28, 64])
def test_units_are_not_divided_among_numa_nodes(node):
    """A barrier a step stays within a node; B=1 can only be divided so."""
    for cell, T, B, I, H, D, backward in layers():
        for threads in (16, 64, 128):
            members, split, at_once, _ = plan(threads, cell, T, B, I, H, D, backward, node=node)
            if split == "hidden":
                assert members <= node
            if B == 1:
                assert members * (2 if at_once else 1) <= node * D


def test_many_cores_are_used_where_there_is_work():
    """Large batches take all of 64 cores, small calls one, and a step of one sequence a few."""
    for cell in GATES:
        assert plan(64, cell, 200, 256, 128, 256)[:2] == (64, "batch")
        assert plan(64, cell, 2, 1, 8, 8)[0] == 1
        members, split, _, _ = plan(64, cell, 200, 1, 128, 512)
        assert split == "hidden"
        assert 4 <= members <= 32
    one, many = (plan(n, ELMAN, 200, 256, 128, 256)[3] for n in (1, 64))
    assert many < one / 40


def test_gates_are_work():
    """An LSTM's step is worth threads that an Elman cell's of that size is not."""
    sizes = 100, 1, 16, 128
    used = [plan(16, cell, *sizes)[0] for cell in (ELMAN, GRU, LSTM)]
    assert used[0] < used[1] <= used[2]
    times = [plan(1, cell, *sizes)[3] for cell in (ELMAN, GRU, LSTM)]
    assert times[1] == pytest.approx(3 * times[0])
    assert times[2] == pytest.approx(4 * times[0])


def test_weights_beyond_the_cache_of_a_core_are_divided():
    """32 cores that each read 4 MB a step are slower than those that read a part each."""
    sizes = LSTM, 200, 128, 16, 512
    assert plan(32, *sizes, l2=L2)[1] == "hidden"
    assert plan(32, *sizes, l2=8 * L2)[1] == "batch"


def test_a_plan_takes_little_time():
    """All plans of 128 threads are weighed in far less time than waking one thread takes."""
    code = (
        "import timeit; from charrnn_fast import _C; "
        f"sizes = 128, {ONE_NODE}, {L2}, 3, 99, 256, 9999, 9, 2048, 2, True; "
        "call = lambda: _C.modelled_plan(*sizes); "
        "print(min(timeit.repeat(call, number=100, repeat=5)) / 100)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 200e-6  # some 10 us; this machine may be busy


# --- what this process may use ---


def threads_of(code="", **environment):
    """What torch and charrnn_fast use in a new interpreter that first runs ``code``."""
    script = (
        f"import json, os\n{code}\nimport torch\nfrom charrnn_fast import _C\n"
        "print(json.dumps([torch.get_num_threads(), _C.machine()[0]]))"
    )
    ours = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
    variables = {name: value for name, value in os.environ.items() if name not in ours}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        env={**variables, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("threads", [1, 5])
def test_omp_num_threads(threads):
    """What the environment says is used, unless MKL knows better, which torch asks."""
    assert threads_of(OMP_NUM_THREADS=str(threads), MKL_DYNAMIC="FALSE") == [threads, threads]


def test_set_num_threads():
    """So is what torch is told; a plan of that many runs is never larger."""
    for threads in (1, 3, 17):
        torch.set_num_threads(threads)
        assert _C.machine()[0] == threads or threads == (os.cpu_count() or 1)
        for B, H in ((1, 2048), (500, 64)):
            assert _C.plan(100, B, 100 * B, 64, H, 2, "RNN_TANH", True)[0] <= threads


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="affinity masks: Linux")
def test_affinity_mask():
    """Set before torch is loaded or after: no more threads than CPUs, unless the user says so."""
    one = "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})"
    assert threads_of(one) == [1, 1]
    assert threads_of(f"import charrnn_fast; {one}")[1] == 1
    told = f"import charrnn_fast, torch; torch.set_num_threads(29); {one}"
    assert threads_of(told) == [29, 29]


@pytest.mark.parametrize(
    ("membership", "files", "cpus"),
    [
        ("0::/\n", {"cpu.max": "150000 100000"}, 2),
        ("0::/\n", {"cpu.max": "50000 100000"}, 1),
        ("0::/\n", {"cpu.max": "max 100000"}, 0),
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "400000 100000"}, 4),
        ("0::/a/b\n", {"a/b/cpu.max": "300000 100000", "a/cpu.max": "900000 100000"}, 3),
        ("0::/../other\n", {"cpu.max": "700000 100000"}, 7),
        (
            "9:memory:/m\n4:cpu,cpuacct:/j\n",
            {"cpu/j/cpu.cfs_quota_us": "200000", "cpu/j/cpu.cfs_period_us": "100000"},
            2,
        ),
        (
            "4:cpu:/\n",
            {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"},
            0,
        ),
        ("", {"cpu.max": "100000 100000"}, 0),
        ("nonsense\n0:\n0::\n", {"cpu.max": "nonsense"}, 0),
    ],
)
def test_cgroup_limit(tmp_path, membership, files, cpus):
    """CPU time that a container is given, of either version of cgroups; 0 is no limit."""
    for name, text in files.items():
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    (tmp_path / "cgroup").write_text(membership)
    assert _C.cgroup_cpus(str(tmp_path / "root"), str(tmp_path / "cgroup")) == cpus


@pytest.mark.parametrize("threads", [16, 64])
@pytest.mark.parametrize(
    "sizes", [(12, 70, 24), (6, 1, 1100), (5, 2, 4100)], ids=["batch", "hidden", "wide"]
)
def test_large_teams(threads, sizes):
    """As many threads as a server has cores, on whatever this machine has: the bits of one."""
    T, B, H = sizes
    rnn = charrnn_fast.RNN(8, H)
    x = torch.randn(T, B, 8)
    torch.set_num_threads(1)
    alone = run(rnn, x)
    torch.set_num_threads(threads)
    assert_same(run(rnn, x), alone, rtol=0, atol=0)


def test_the_table_of_threads():
    """`charrnn-fast bench --threads`: each cell, size and pass with each number of threads."""
    assert scaling.thread_numbers(6) == [1, 2, 4, 6]
    assert scaling.thread_numbers(1) == [1]
    rows = list(scaling.measure(0.0, 3, ((20, 2, 8, 16), (30, 1, 8, 400))))
    assert {row.threads for row in rows} == {1, 2, 3}
    assert all(row.milliseconds > 0 and row.members <= row.threads for row in rows)
    lines = scaling.table(rows).splitlines()
    assert len(lines) == 2 + len(rows) / 3
    assert "30 x 1 x 8 x 400" in lines[-1]
    assert f"torch {torch.__version__} uses" in scaling.machine()


def test_bench_threads_without_a_number(monkeypatch, capsys):
    """With a number it stays the option of training."""
    monkeypatch.setattr(scaling, "measure", lambda seconds, most: iter(()))
    cli.main(["bench", "--threads"])
    assert "One thread in ms" in capsys.readouterr().out
    cli.main(["bench", "--threads", "1", "--hidden-size", "8", "--seconds", "0.01"])
    assert "1 threads; characters/s" in capsys.readouterr().out
