"""Agreement on random calls; threads, processes, memory and special values."""

from __future__ import annotations

import ctypes
import ctypes.util
import itertools
import multiprocessing
import os
import platform
import random
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import KINDS, VARIANTS, Kind, flat
from torch import Tensor, nn

import charrnn_fast

sys.path.insert(0, str(Path(__file__).parent / "fuzz"))
import differential
import generation

sys.path.pop(0)


def step(rnn: nn.RNNBase, x: Tensor) -> list[Tensor]:
    """Results and gradients of one call, by torch.autograd.grad: nothing shared is written."""
    results = flat(rnn(x))
    loss = sum(result.square().sum() for result in results)
    return [*(r.detach() for r in results), *torch.autograd.grad(loss, list(rnn.parameters()))]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


@pytest.fixture(autouse=True)
def _threads() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_random_calls_agree_with_nn_rnn() -> None:
    """A short run of the differential fuzzer; `make fuzz` is the long one."""
    assert not [found for seed in range(400) for found in differential.run_seed(seed)]


def test_random_calls_of_generate_agree_with_its_loop() -> None:
    """A short run of the fuzzer of `generate`, in float64 and float32."""
    results = [generation.run_seed(seed) for seed in range(120)]
    assert not [found for found, _, _ in results if found]
    # Rounding decides one draw in a million.
    assert sum(differing for _, _, differing in results) <= 1


@settings(max_examples=90, deadline=None, database=None)
@given(st.randoms(), st.sampled_from(KINDS))
def test_drawn_calls_agree_with_nn_rnn(rng: random.Random, kind: Kind) -> None:
    """The same calls, drawn by hypothesis, which reduces a failing one to a small one."""
    assert not differential.run_problem(rng, calls=1, only=kind)


SPOILT = [
    (kind, name)
    for kind in KINDS
    for name in (
        *("y", "dx", "dhx", "dweight_ih_l0", "dweight_hh_l0", "dbias_ih_l0", "dbias_hh_l0"),
        *kind.states,
        *(["dcx"] if kind.has_cell_state else []),
    )
]


@pytest.mark.parametrize(("kind", "spoilt"), SPOILT, ids=str)
def test_the_fuzzer_notices_a_wrong_number(
    kind: Kind, spoilt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One element that is a thousandth off is found, in each kind of result."""

    def spoil(*args: Any) -> dict[str, Tensor]:
        results = call_ours(*args)
        if spoilt in results:
            results[spoilt] = results[spoilt].clone()
            results[spoilt].view(-1)[-1] += 1e-3 * max(1.0, float(results[spoilt].abs().max()))
        return results

    call_ours = differential.call_ours
    monkeypatch.setattr(differential, "call_ours", spoil)
    seeds = range(20)
    assert any(spoilt in found for seed in seeds for found in differential.run_seed(seed, kind))


def test_eight_threads_on_one_module_and_on_their_own(kind: Kind) -> None:
    """Calls from several Python threads have the bits of calls one after another."""
    torch.manual_seed(0)
    shared = kind.ours(24, 96, num_layers=2, bidirectional=True)
    inputs = [torch.randn(30, 6, 24) for _ in range(8)]
    alone = [step(shared, x) for x in inputs]
    own = [kind.ours(24, 96) for _ in inputs]
    own_alone = [step(rnn, x) for rnn, x in zip(own, inputs, strict=True)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            together = list(pool.map(lambda x: step(shared, x), inputs))
            assert all(map(same, together, alone))
            assert all(map(same, pool.map(step, own, inputs), own_alone))


def test_same_bits_for_every_number_of_threads(isa: str, kind: Kind) -> None:
    """Changing torch.set_num_threads between calls, oversubscribed too, changes no bit."""
    torch.manual_seed(1)
    for batch, hidden in ((64, 32), (2, 200), (7, 130)):
        rnn = kind.ours(16, hidden, bidirectional=True)
        x = torch.randn(25, batch, 16)
        results = []
        for threads in (1, 2, 7, 3, 1):
            torch.set_num_threads(threads)
            results.append(step(rnn, x))
        assert all(same(results[0], other) for other in results[1:])


def test_selecting_isas_while_others_compute(kind: Kind) -> None:
    """A call keeps to the ISA that it began with."""
    rnn = kind.ours(16, 64)
    x = torch.randn(20, 8, 16)
    want = step(rnn, x)
    before = charrnn_fast.current_isa()
    with ThreadPoolExecutor(3) as pool:
        calls = [pool.submit(step, rnn, x) for _ in range(100)]
        for i in range(300):
            isas = charrnn_fast.available_isas()
            charrnn_fast.use_isa(isas[i % len(isas)])
        for call in calls:
            for a, b in zip(call.result(), want, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    charrnn_fast.use_isa(before)


def _child(queue: Any) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(3)
    queue.put([t.tolist() for k in KINDS for t in step(k.ours(3, 4), torch.ones(5, 2, 3))])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_processes(method: str) -> None:
    """Children compute the same after their parent has used its threads, however they start."""
    torch.set_num_threads(2)
    for kind in KINDS:
        step(kind.ours(64, 256), torch.randn(50, 16, 64))
    torch.manual_seed(3)
    want = [t.tolist() for k in KINDS for t in step(k.ours(3, 4), torch.ones(5, 2, 3))]
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=_child, args=(queue,))
    child.start()
    got = queue.get(timeout=300)
    child.join(300)
    assert child.exitcode == 0
    assert got == want


@pytest.mark.parametrize(("kind", "variant"), VARIANTS, ids=str)
def test_nan_and_inf_flow_as_in_nn_rnn(kind: Kind, variant: dict[str, Any]) -> None:
    """Special values come out where torch.nn has them, and stay within their sequence."""
    for value in (float("nan"), float("inf"), float("-inf"), 1e-42, 3e38):
        torch.manual_seed(4)
        theirs, ours = kind.pair(5, 17, **variant)
        x = torch.randn(6, 9, 5)
        x[2, 4, 1] = value
        for isa in charrnn_fast.available_isas():
            with charrnn_fast.use_isa(isa):
                results = flat(ours(x))
            for got, want in zip(results, flat(theirs(x)), strict=True):
                torch.testing.assert_close(got, want, equal_nan=True, rtol=1e-4, atol=1e-5)
                others = [b for b in range(9) if b != 4]
                assert got[:, others].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("T", [1, 3])
def test_special_weights_flow_as_in_nn_rnn(
    kind: Kind, T: int, value: float, dtype: torch.dtype
) -> None:
    """Of weights, too; a state that is not given is a state of zeros, which W_hh multiplies."""
    H = 150
    for weight, row, column in (("hh", 3, 1), ("hh", -1, -1), ("ih", 2, 4)):
        for bidirectional in (False, True):
            theirs, ours = kind.pair(5, H, bidirectional=bidirectional, dtype=dtype)
            with torch.no_grad():
                last = [p for name, p in ours.named_parameters() if f"weight_{weight}" in name][-1]
                last[row, column] = value
            theirs.load_state_dict(ours.state_dict())
            x = torch.randn(T, 2, 5, dtype=dtype)
            theirs.zero_grad()
            want = finite_of(theirs, x)
            for isa in charrnn_fast.available_isas():
                ours.zero_grad()
                with charrnn_fast.use_isa(isa):
                    assert all(map(torch.equal, finite_of(ours, x), want))


def finite_of(module: nn.RNNBase, x: Tensor) -> list[Tensor]:
    """Where results and gradients are finite, and where results are NaN."""
    results = flat(module(x))
    results[0][-1].sum().backward()
    found = [*(r.isfinite() for r in results), *(r.isnan() for r in results)]
    return [*found, *(p.grad.isfinite() for p in module.parameters())]


def test_no_memory_is_kept() -> None:
    """Resident memory is flat over thousands of calls, failing ones among them."""
    networks = [(kind, kind.ours(20, 40, num_layers=2)) for kind in KINDS]
    x = torch.randn(30, 10, 20)

    def calls(count: int) -> int:
        for i in range(count):
            kind, rnn = networks[i % len(networks)]
            step(rnn, x)
            if i % 5 == 0:
                with pytest.raises(RuntimeError):
                    rnn(x, kind.state(2, 3, 40))
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    peaks = [calls(200)] + [calls(300) for _ in range(3)]
    # Kilobytes; a leak of one input a call is three times that. An allocator may grow once.
    assert min(b - a for a, b in itertools.pairwise(peaks)) < 2400


def test_an_unknown_isa_in_the_environment_is_one_sentence() -> None:
    """CHARRNN_FAST_ISA names what to choose from."""
    code = "import charrnn_fast, torch; charrnn_fast.RNN(2, 3)(torch.ones(2, 2, 2))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "CHARRNN_FAST_ISA": "mmx"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "CHARRNN_FAST_ISA=mmx is not a known ISA; choose one of: " in done.stderr
    assert "baseline" in done.stderr


def run_python(code: str, **environment: str) -> str:
    """What a new interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_same_bits_for_every_omp_num_threads_and_on_one_core() -> None:
    """OMP_NUM_THREADS of 1, 2 and 7, and seven threads that share a single core."""
    code = """
import hashlib, os, torch, charrnn_fast
if "ONE_CORE" in os.environ:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
torch.manual_seed(0)
total = hashlib.sha256()
for name in os.environ["NAMES"].split():
    for batch, hidden in ((64, 32), (2, 200)):
        rnn = getattr(charrnn_fast, name)(16, hidden, bidirectional=True)
        y, _ = rnn(torch.randn(25, batch, 16))
        y.square().sum().backward()
        for tensor in (y.detach(), *(p.grad for p in rnn.parameters())):
            total.update(tensor.numpy().tobytes())
print(total.hexdigest())
"""
    names = " ".join(map(str, KINDS))
    want = run_python(code, NAMES=names, OMP_NUM_THREADS="1")
    assert run_python(code, NAMES=names, OMP_NUM_THREADS="2") == want
    assert run_python(code, NAMES=names, OMP_NUM_THREADS="7") == want
    assert run_python(code, NAMES=names, OMP_NUM_THREADS="7", ONE_CORE="1") == want


class _Calls(torch.utils.data.Dataset[Tensor]):
    """Items that are results of a module that the parent has used."""

    def __init__(self, rnn: nn.RNNBase, inputs: Tensor) -> None:
        self.rnn, self.inputs = rnn, inputs

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> Tensor:
        with torch.no_grad():
            return self.rnn(self.inputs[index])[0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:This DataLoader will create")
def test_dataloader_workers(kind: Kind) -> None:
    """Workers that were forked after the parent's threads had run get the parent's bits."""
    torch.set_num_threads(2)
    calls = _Calls(kind.ours(16, 128), torch.randn(6, 40, 16, 16))
    want = torch.stack([calls[i] for i in range(6)])
    loader = torch.utils.data.DataLoader(calls, batch_size=3, num_workers=2)
    assert torch.equal(torch.cat(list(loader)), want)


def test_autograd_from_several_threads_adds_up(kind: Kind) -> None:
    """Backward passes of one graph's parts, at once, leave the sum of all in .grad."""
    rnn = kind.ours(8, 64)
    inputs = [torch.randn(20, 4, 8) for _ in range(8)]
    alone = [step(rnn, x)[1 + len(kind.states) :] for x in inputs]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda x: sum(t.square().sum() for t in flat(rnn(x))).backward(), inputs))
    for parameter, parts in zip(rnn.parameters(), zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(parameter.grad, torch.stack(parts).sum(0), rtol=1e-5, atol=1e-4)


def floating_point_modes() -> tuple[int, int]:
    """MXCSR without its flags, and the x87 control word: rounding, flushing, traps."""
    environment = (ctypes.c_uint8 * 32)()
    assert ctypes.CDLL(None).fegetenv(environment) == 0
    mxcsr = int.from_bytes(bytes(environment[28:32]), "little")
    return mxcsr & ~0x3F, int.from_bytes(bytes(environment[:2]), "little")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the layout of fenv_t on x86-64")
@pytest.mark.parametrize("flush", [False, True])
def test_floating_point_modes_and_flags_are_left_alone(flush: bool, isa: str, kind: Kind) -> None:
    """No mode changes, whichever is set; sound input raises no invalid, overflow or division."""
    rnn = kind.ours(16, 70, bidirectional=True)
    x = 3 * torch.randn(20, 9, 16)
    libm = ctypes.CDLL(ctypes.util.find_library("m"))
    torch.set_num_threads(1)
    torch.set_flush_denormal(flush)
    try:
        before = floating_point_modes()
        libm.feclearexcept(0x3D)
        y, _ = rnn(x)
        (dx,) = torch.autograd.grad(y, rnn.weight_hh_l0, y)
        # On x86: invalid 1, division by zero 4, overflow 8.
        assert libm.fetestexcept(0x0D) == 0
        assert floating_point_modes() == before
        assert dx.isfinite().all()
    finally:
        torch.set_flush_denormal(False)


def test_denormals_flow_as_in_nn_rnn(isa: str) -> None:
    """States below the smallest normal number are kept, and flushed where torch is told to."""
    ours = charrnn_fast.RNN(3, 20, nonlinearity="relu")
    theirs = nn.RNN(3, 20, nonlinearity="relu")
    with torch.no_grad():
        for p in ours.parameters():
            p.abs_()
        ours.bias_ih_l0.zero_()
        ours.bias_hh_l0.zero_()
    theirs.load_state_dict(ours.state_dict())
    x = torch.rand(5, 4, 3) * 2e-40
    y, want = ours(x)[0], theirs(x)[0]
    assert (y > 0).all()
    assert y.max() < torch.finfo(torch.float32).tiny
    torch.testing.assert_close(y, want, rtol=0, atol=2e-43)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    try:
        assert (ours(x)[0] == 0).all()
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.skipif(
    "libasan" in os.environ.get("LD_PRELOAD", ""), reason="ASan takes terabytes of addresses itself"
)
def test_failed_allocations_raise_and_leak_nothing(kind: Kind) -> None:
    """Out of memory at any of a call's allocations is an exception, and the next call is sound."""
    code = """
import os, resource, torch, charrnn_fast
torch.set_num_threads(1)
kind = getattr(charrnn_fast, os.environ["NAME"])
rnn = kind(64, 256, num_layers=2, bidirectional=True)
x = torch.randn(60, 16, 64, requires_grad=True)
small = torch.randn(3, 2, 64)
def step(x):
    y, _ = rnn(x)
    return torch.autograd.grad(y.sum(), [x, *rnn.parameters()])
want = step(x)[0]
def used():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * 4096
failures, successes, base = 0, 0, used()
for extra in range(0, 60 << 20, 2 << 20):
    resource.setrlimit(resource.RLIMIT_AS, (used() + extra, resource.RLIM_INFINITY))
    try:
        got = step(x)
        successes += 1
        assert torch.equal(got[0], want)
        del got
    except (RuntimeError, MemoryError) as error:
        failures += 1
        assert str(error) or isinstance(error, MemoryError)
        del error
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    rnn(small)
assert torch.equal(step(x)[0], want)
print(failures, successes, used() - base)
"""
    # Every tensor of size has a mapping of its own, which ends with it: what is left is a leak.
    # glibc would keep freed memory for later, as much as it happens to be in pieces.
    printed = run_python(code, NAME=kind.name, MALLOC_MMAP_THRESHOLD_="65536")
    failures, successes, left = map(int, printed.split())
    assert failures > 5
    assert successes > 0
    assert left < 6 << 20  # one output of a layer


@pytest.mark.slow
def test_more_than_two_to_the_31_elements() -> None:
    """T*B*H beyond 32 bits: the last sequences have the bits that they have alone. Takes 10 GB."""
    if os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 12 << 30:
        pytest.skip("wants 12 GB of free memory")
    T, B, H = 33, 2**20, 63
    assert T * B * H > 2**31
    rnn = charrnn_fast.RNN(1, H)
    x = torch.randn(T, B, 1)
    with torch.no_grad():
        y, h_n = rnn(x)
        for b in (0, B // 2, B - 1):
            alone, last = rnn(x[:, b : b + 1].clone())
            assert torch.equal(y[:, b], alone[:, 0])
            assert torch.equal(h_n[:, b], last[:, 0])
