"""Mixed calls for minutes, refused ones among them: memory stays flat.

    python tests/fuzz/soak.py [MINUTES] [SEED]

The same problems and errors go round and round, each time in other forms, dtypes, strides, ISAs
and threads. After a few rounds neither what is resident, nor what the heap holds, nor the tensors
alive, nor the objects that Python counts may grow with the calls.

The environment of `make soak` has Python's objects on the heap, too, and malloc give back what is
freed: PYTHONMALLOC=malloc, MALLOC_ARENA_MAX=1, and MALLOC_TRIM_THRESHOLD_ and
MALLOC_MMAP_THRESHOLD_ at their first values, which malloc raises otherwise.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import differential

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch
from helpers import call_op
from kinds import KINDS, Kind
from torch import Tensor

import charrnn_fast

PROBLEMS = 150
# Bytes a call: less than the smallest object there is. Resident memory also moves with the
# allocator's fragments: that is bounded in all.
HEAP_A_CALL = 2
RESIDENT = 4 << 20

T, B, I, H = 5, 3, 4, 6


def refused(kind: Kind) -> list[Callable[[], Any]]:
    """Calls that raise, each at another depth: module, op, autograd, allocation."""
    rnn = kind.ours(I, H, num_layers=2)
    one = kind.ours(I, H)
    cell = kind.cell(I, H)
    x, ids = torch.randn(T, B, I), torch.full((T, B), I)
    weights = [p.detach() for p in one.parameters()]
    layer = {"input": x, "weights": weights, "mode": kind.modes[0], "has_biases": True}

    def backward_twice() -> None:
        y, _ = one(x)
        y.sum().backward()
        y.sum().backward()

    def written_since() -> None:
        local = kind.ours(I, H)
        y, _ = local(x)
        with torch.no_grad():
            local.weight_hh_l0.add_(1)
        y.sum().backward()

    def interrupted() -> None:
        y, _ = rnn(x.clone().requires_grad_())
        y.register_hook(lambda grad: 1 / 0)
        y.sum().backward()

    return [
        lambda: rnn(x, kind.state(2, B + 1, H)),
        lambda: rnn(x.double()),
        lambda: rnn(ids),
        lambda: rnn(x, None, torch.tensor([T, T + 1, 1])),
        lambda: cell(x[0], kind.state(B, H + 1)),
        lambda: cell(ids[0]),
        lambda: rnn(torch.zeros(()).expand(2**40, 2**10, I)),
        lambda: call_op("rnn_layer", **(layer | {"mode": "PEEPHOLE"})),
        lambda: call_op("rnn_layer", **(layer | {"weights": weights[:3]})),
        lambda: call_op(
            "rnn_layer", **(layer | {"input": x[0], "batch_sizes": torch.tensor([1, 2])})
        ),
        lambda: call_op("rnn_layer_backward", dy=x, y=x, needs=[True] * 6, **layer),
        lambda: charrnn_fast.use_isa("mmx"),
        backward_twice,
        written_since,
        interrupted,
    ]


def resident() -> int:
    """Bytes of this process that are in memory, less what Python and malloc keep of freed ones."""
    gc.collect()  # empties Python's lists of freed tuples, 40,000 of them at most
    getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: 0)(0)
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096


class _Mallinfo2(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def heap() -> int:
    """Bytes that malloc has given out and not got back; 0 where the C library does not say."""
    mallinfo2 = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if mallinfo2 is None:
        return 0
    mallinfo2.restype = _Mallinfo2
    info = mallinfo2()
    return int(info.uordblks + info.hblkhd)


def alive() -> tuple[int, int]:
    """How many tensors there are, and how many objects in all."""
    gc.collect()
    objects = gc.get_objects()
    # type(), as isinstance asks some objects of torch for an attribute they warn about.
    return sum(issubclass(type(thing), Tensor) for thing in objects), len(objects)


Solved = list[tuple[differential.Problem, differential.Results]]


def one_round(rng: random.Random, solved: Solved, errors: list[Callable[[], Any]]) -> int:
    """All problems and errors once; returns the number of calls."""
    for index, (problem, want) in enumerate(solved):
        dtype = rng.choice(problem.dtypes)
        module = problem.kind.ours(problem.width, dtype=dtype, **problem.options)
        torch.set_num_threads(rng.choice([1, 1, 2, 3]))
        with charrnn_fast.use_isa(rng.choice(charrnn_fast.available_isas())):
            got = differential.call_ours(problem, rng, module)
        # Not relu: see differential.run_problem.
        if not problem.has_kink:
            differs = differential.difference(got, want, differential.LIMITS[dtype])
            assert differs is None, f"{problem.about}: {differs}"
        with refusal():
            errors[index % len(errors)]()
    return 2 * len(solved)


@contextlib.contextmanager
def refusal() -> Any:
    """Fails unless the block raises what a refused call may."""
    try:
        yield
    except (RuntimeError, ValueError, IndexError, ZeroDivisionError):
        return
    raise AssertionError("a malformed call was not refused")


def main() -> int:
    minutes = float(sys.argv[1]) if len(sys.argv) > 1 else 10.0
    rng = random.Random(int(sys.argv[2]) if len(sys.argv) > 2 else 0)
    problems = [differential.draw_problem(rng, 1.0) for _ in range(PROBLEMS)]
    solved = [(problem, differential.reference(problem)) for problem in problems]
    errors = [call for kind in KINDS for call in refused(kind)]
    # Python's dictionary of names doubles once, by 2 MB: now, and not while we count.
    names = [sys.intern(f"name {n}") for n in range(100_000)]
    del names
    for _ in range(8):  # threads, caches and the allocator's pools
        one_round(rng, solved, errors)
    tensors, objects = alive()
    before, held = resident(), heap()
    print(f"{before >> 10} KB resident, {tensors} tensors, {objects} objects", flush=True)
    end, calls, told = time.monotonic() + 60 * minutes, 0, time.monotonic()
    while time.monotonic() < end:
        calls += one_round(rng, solved, errors)
        if time.monotonic() - told > 30:
            told = time.monotonic()
            grown, leaked = resident() - before, heap() - held
            print(f"{calls} calls: {grown >> 10:+d} KB resident, {leaked:+d} of heap", flush=True)
    tensors_now, objects_now = alive()
    grown, leaked = resident() - before, heap() - held
    print(
        f"{calls} calls, {minutes:g} minutes: {grown >> 10:+d} KB resident, {leaked:+d} bytes of "
        f"heap ({leaked / calls:.2f} a call), {tensors_now - tensors:+d} tensors, "
        f"{objects_now - objects:+d} objects"
    )
    kept = tensors_now > tensors or objects_now > objects + 100
    return 1 if kept or leaked > HEAP_A_CALL * calls or grown > RESIDENT else 0


if __name__ == "__main__":
    sys.exit(main())
