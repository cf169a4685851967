"""Times this tree and another commit in turns: for the before and after of a change.

    python benchmarks/compare.py [--cell C] [--seconds S] [--threads N] BASE [SHAPE ...]

A shape is B,T,I,H, such as 32,100,64,128; a cell RNN, LSTM or GRU, where BASE has it. BASE is
checked out into a git worktree under build/ and built there. Two builds do not fit into one
process, so each side is a worker process; they take turns, round by round, pinned to one core
unless there are several threads. Both are driven by this tree's harness: only charrnn_fast differs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def built(base: str) -> Path:
    """The worktree of a commit, with its extension built in place."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    commit = git("rev-parse", "--short=12", f"{base}^{{commit}}")
    tree = ROOT / "build" / "compare" / commit
    if not tree.exists():
        git("worktree", "prune")
        git("worktree", "add", "--detach", str(tree), commit)
    build(tree)
    return tree


def build(tree: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    result = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    if result.returncode:
        sys.exit(result.stdout + result.stderr)


class Worker:
    """A process that imports charrnn_fast from `tree` and answers timing requests."""

    def __init__(self, tree: Path, threads: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--work-in", str(tree), "--threads", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, **request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit("a worker ended early")
        return json.loads(answer)


def work(tree: str, threads: int) -> None:
    """Reads requests from stdin, answers with seconds a call: what a Worker's process runs."""
    sys.path[0] = str(ROOT)
    sys.path.insert(0, tree)
    import charrnn_fast

    assert Path(charrnn_fast.__file__).resolve().is_relative_to(Path(tree).resolve())
    sys.path.remove(tree)  # the harness is this tree's, whatever the other one has
    from benchmarks import common, peers

    common.use_threads(threads)
    sides = {}
    for line in sys.stdin:
        request = json.loads(line)
        key = (request["cell"], tuple(request["shape"]), request["backward"])
        if key not in sides:
            problem = common.problem_of(request["cell"], common.Shape(*request["shape"]))
            sides[key] = peers.our_op(problem, request["backward"])
            common.check(sides[key], problem.reference(request["backward"]), 1e-3)
        run = sides[key].run
        if threads > 1:
            time.sleep(0.02)  # until the threads of the other side no longer spin
            ready = time.perf_counter() + 0.02  # and those of this one do
            while time.perf_counter() < ready:
                run()
        run()
        print(json.dumps(common.time_calls(run, request["calls"])), flush=True)


def compare(base: str, cell: str, shapes, seconds: float, threads: int) -> None:
    workers = {"before": Worker(built(base), threads), "after": Worker(ROOT, threads)}
    print(f"{'shape':>24} {'':16} {'before':>10} {'after':>10}  speed-up  (10%..90% of rounds)")
    for shape in shapes:
        for backward in (False, True):
            what = {"cell": cell, "shape": shape, "backward": backward}
            once = max(min(w.ask(**what, calls=1) for _ in range(3)) for w in workers.values())
            calls = max(1, round(2e-3 / once))
            times: dict[str, list[float]] = {name: [] for name in workers}
            end = time.perf_counter() + seconds
            while len(times["before"]) < 9 or time.perf_counter() < end:
                turn = list(workers) if len(times["before"]) % 2 else list(workers)[::-1]
                for name in turn:
                    times[name].append(workers[name].ask(**what, calls=calls))
            before, after = (statistics.median(times[name]) * 1e6 for name in workers)
            pairs = zip(times["before"], times["after"], strict=True)
            ratios = statistics.quantiles([b / a for b, a in pairs], n=10)
            print(
                f"{shape!s:>24} {'forward+backward' if backward else 'forward':16} "
                f"{before:8.1f}us {after:8.1f}us {before / after:7.2f}x  "
                f"({ratios[0]:.2f}..{ratios[-1]:.2f})",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", nargs="?", help="a commit, tag or branch")
    parser.add_argument("shapes", nargs="*", help="B,T,I,H; the grid of the suite by default")
    parser.add_argument("--cell", default="RNN", choices=["RNN", "LSTM", "GRU"])
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each comparison")
    parser.add_argument("--threads", type=int, default=1, help="of each side")
    parser.add_argument("--work-in", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work_in:
        work(arguments.work_in, arguments.threads)
        return
    if not arguments.base:
        parser.error("which commit to compare with?")
    sys.path.insert(0, str(ROOT))
    from benchmarks.common import QUICK_GRIDS, Shape

    shapes = [Shape(*map(int, text.split(","))) for text in arguments.shapes]
    shapes = shapes or QUICK_GRIDS[arguments.cell]
    compare(arguments.base, arguments.cell, shapes, arguments.seconds, arguments.threads)


if __name__ == "__main__":
    main()
