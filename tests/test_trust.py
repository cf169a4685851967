"""Agreement on random calls; threads, processes, memory and special values."""

from __future__ import annotations

import multiprocessing
import os
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import charrnn_fast

sys.path.insert(0, str(Path(__file__).parent / "fuzz"))
import differential

sys.path.pop(0)


def step(rnn: nn.RNN, x: Tensor) -> list[Tensor]:
    """Output and gradients of one call, by torch.autograd.grad: nothing shared is written."""
    y, h_n = rnn(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum() + h_n.sum(), list(rnn.parameters()))]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


@pytest.fixture(autouse=True)
def _threads() -> Any:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("block", range(4))
def test_random_calls_agree_with_nn_rnn(block: int) -> None:
    """A short run of the differential fuzzer; `make fuzz` is the long one."""
    found = [differential.run_case(seed) for seed in range(block * 60, block * 60 + 60)]
    assert not [difference for difference in found if difference is not None]


def test_eight_threads_on_one_module_and_on_their_own() -> None:
    """Calls from several Python threads have the bits of calls one after another."""
    torch.manual_seed(0)
    shared = charrnn_fast.RNN(24, 96, num_layers=2, bidirectional=True)
    inputs = [torch.randn(30, 6, 24) for _ in range(8)]
    alone = [step(shared, x) for x in inputs]
    own = [charrnn_fast.RNN(24, 96) for _ in inputs]
    own_alone = [step(rnn, x) for rnn, x in zip(own, inputs, strict=True)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            together = list(pool.map(lambda x: step(shared, x), inputs))
            assert all(map(same, together, alone))
            assert all(map(same, pool.map(step, own, inputs), own_alone))


@pytest.mark.parametrize("isa", charrnn_fast.available_isas())
def test_same_bits_for_every_number_of_threads(isa: str) -> None:
    """Changing torch.set_num_threads between calls, oversubscribed too, changes no bit."""
    torch.manual_seed(1)
    with charrnn_fast.use_isa(isa):
        for batch, hidden in ((64, 32), (2, 200), (7, 130)):
            rnn = charrnn_fast.RNN(16, hidden, bidirectional=True)
            x = torch.randn(25, batch, 16)
            results = []
            for threads in (1, 2, 7, 3, 1):
                torch.set_num_threads(threads)
                results.append(step(rnn, x))
            assert all(same(results[0], other) for other in results[1:])


def test_selecting_isas_while_others_compute() -> None:
    """A call keeps to the ISA that it began with."""
    rnn = charrnn_fast.RNN(16, 64)
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
    queue.put([t.tolist() for t in step(charrnn_fast.RNN(3, 4), torch.ones(5, 2, 3))])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_processes(method: str) -> None:
    """Children compute the same after their parent has used its threads, however they start."""
    torch.set_num_threads(2)
    step(charrnn_fast.RNN(64, 256), torch.randn(50, 16, 64))
    torch.manual_seed(3)
    want = [t.tolist() for t in step(charrnn_fast.RNN(3, 4), torch.ones(5, 2, 3))]
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=_child, args=(queue,))
    child.start()
    got = queue.get(timeout=120)
    child.join(60)
    assert child.exitcode == 0
    assert got == want


def test_nan_and_inf_flow_as_in_nn_rnn() -> None:
    """Special values come out where nn.RNN has them, and stay within their sequence."""
    for value in (float("nan"), float("inf"), float("-inf"), 1e-42, 3e38):
        for nonlinearity in ("tanh", "relu"):
            torch.manual_seed(4)
            ours = charrnn_fast.RNN(5, 17, nonlinearity=nonlinearity)
            theirs = nn.RNN(5, 17, nonlinearity=nonlinearity)
            theirs.load_state_dict(ours.state_dict())
            x = torch.randn(6, 9, 5)
            x[2, 4, 1] = value
            for isa in charrnn_fast.available_isas():
                with charrnn_fast.use_isa(isa):
                    got, want = ours(x)[0], theirs(x)[0]
                torch.testing.assert_close(got, want, equal_nan=True, rtol=1e-4, atol=1e-5)
                others = [b for b in range(9) if b != 4]
                assert got[:, others].isfinite().all()


def test_no_memory_is_kept() -> None:
    """Resident memory is flat over thousands of calls, failing ones among them."""
    rnn = charrnn_fast.RNN(20, 40, num_layers=2)
    x = torch.randn(30, 10, 20)

    def calls(count: int) -> int:
        for i in range(count):
            step(rnn, x)
            if i % 5 == 0:
                with pytest.raises(RuntimeError):
                    rnn(x, torch.zeros(2, 3, 40))
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    before = calls(200)
    # Kilobytes; a leak of one input a call is three times that.
    assert calls(500) - before < 4000


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
