"""explain: path, reason, instruction set and threads are those of the call."""

import re
import subprocess
import sys

import pytest
import torch
from kinds import KINDS
from torch.nn.utils.rnn import pack_sequence

import charrnn_fast
from charrnn_fast import explain
from charrnn_fast.ops import counters

X = torch.zeros(4, 2, 3)


# Calls of a module (3, 5), and of a cell, with the path they take and a word of the reason.
CALLS = {
    "float32": (lambda k: (k.ours(3, 5), X), True, "serve"),
    "float64": (lambda k: (k.ours(3, 5, dtype=torch.float64), X.double()), True, "serve"),
    "ids": (lambda k: (k.ours(3, 5), torch.zeros(4, 2).long()), True, "serve"),
    "packed": (lambda k: (k.ours(3, 5), pack_sequence([X[:, 0]])), True, "serve"),
    "one sequence": (lambda k: (k.ours(3, 5), X[:, 0]), True, "serve"),
    "states": (lambda k: (k.ours(3, 5), X, k.state(1, 2, 5)), True, "serve"),
    "lengths": (lambda k: (k.ours(3, 5), X, None, torch.tensor([4, 2])), True, "serve"),
    "cell": (lambda k: (k.cell(3, 5), X[0]), True, "serve"),
    "cell with states": (lambda k: (k.cell(3, 5), X[0], k.state(2, 5)), True, "serve"),
    "meta": (
        lambda k: (k.ours(3, 5, device="meta"), X.to("meta")),
        False,
        "device is not the CPU",
    ),
    "torch.nn's": (lambda k: (k.stock(3, 5), X), False, "torch.nn.modules.rnn."),
    "torch.nn's cell": (lambda k: (k.stock_cell(3, 5), X[0]), False, "torch.nn.modules.rnn."),
}


@pytest.mark.parametrize("call", CALLS)
def test_path(kind, call):
    """The path is the one that the counters see afterwards."""
    make, fused, reason = CALLS[call]
    module, *args = make(kind)
    explanation = explain(module, *args)
    assert explanation.fused is fused
    assert explanation.path == ("fused" if fused else "composite")
    assert reason in explanation.reason
    assert str(explanation).startswith(explanation.path)
    before = counters()
    module(*args)
    assert (counters()["forward_fused"] > before["forward_fused"]) is fused


def test_subclass_of_tensor(kind):
    """A tensor subclass is named as the reason."""

    class Tagged(torch.Tensor):
        pass

    explanation = explain(kind.ours(3, 5), X.as_subclass(Tagged))
    assert not explanation.fused
    assert "subclass" in explanation.reason


def test_isa(isa, kind):
    """The instruction set is the one in use."""
    assert explain(kind.ours(3, 5), X).isa == isa


def test_plans():
    """A plan for each layer; one thread for little work, several for much, never more than set."""
    rnn = charrnn_fast.RNN(64, 256, 2, bidirectional=True, batch_first=True)
    x = torch.zeros(64, 100, 64)
    torch.set_num_threads(2)
    explanation = explain(rnn, x)
    assert len(explanation.forward) == len(explanation.backward) == 2
    assert explanation.threads == 2
    assert "layer 1: forward 2 threads" in str(explanation)
    torch.set_num_threads(1)
    one = explain(rnn, x)
    assert one.threads == 1
    assert all(plan.split is None and not plan.at_once for plan in one.forward)
    torch.set_num_threads(4)
    assert explain(charrnn_fast.RNN(3, 5), X).threads == 1
    # A step loads all its weights, whatever the number of rows.
    assert explain(charrnn_fast.RNNCell(64, 1024), torch.randn(1, 64)).forward[0].threads > 1
    assert explain(charrnn_fast.RNNCell(64, 512), torch.randn(1, 64)).forward[0].threads == 1


@pytest.mark.parametrize(
    ("shape", "threads", "plan"),
    [
        ((200, 1, 64), 1, "1 thread"),
        ((200, 1, 64), 2, "2 threads, both directions at once"),
        ((200, 1, 64), 4, "2 threads, both directions at once"),  # too small for a team each
        ((100, 64, 128), 2, "2 threads, both directions at once"),
        ((100, 64, 128), 4, "4 threads, split by batch, both directions at once"),
        ((100, 1, 1024), 4, "4 threads, split by hidden, both directions at once"),
        ((100, 96, 512), 3, "3 threads, split by batch"),  # one direction each would leave one idle
        ((2, 1, 8), 4, "1 thread"),  # not worth waking anybody
        ((5, 0, 64), 4, "1 thread"),
    ],
)
def test_both_directions_at_once(shape, threads, plan):
    """Each direction has its threads, unless one after the other by all threads takes less."""
    T, B, H = shape
    torch.set_num_threads(threads)
    explanation = explain(charrnn_fast.RNN(16, H, bidirectional=True), torch.empty(T, B, 16))
    assert str(explanation.forward[0]) == str(explanation.backward[0]) == plan
    one_way = explain(charrnn_fast.RNN(16, H), torch.empty(T, B, 16))
    assert not one_way.forward[0].at_once


def test_backward_of_small_layers():
    """Few rows are worth a second thread only where it need not read those of the first."""
    torch.set_num_threads(2)
    for T, threads in ((60, 1), (100, 2)):
        explanation = explain(charrnn_fast.RNN(64, 64), torch.empty(T, 4, 64))
        assert explanation.backward[0].threads == threads


@pytest.mark.parametrize(
    ("kind", "shape", "bidirectional"),
    [
        (KINDS[0], (100, 64, 64, 128), False),
        (KINDS[0], (4, 2, 3, 5), False),
        (KINDS[0], (200, 1, 16, 64), True),
        *[(kind, (60, 1, 64, 512), False) for kind in KINDS],
    ],
    ids=str,
)
def test_threads_that_really_run(kind, shape, bidirectional):
    """A process has torch's number of threads where explain() says that a call uses several.

    Those beyond the call's own only pass through: the runtime would end them, and torch's next
    region would have to start them anew.
    """
    T, B, I, H = shape
    code = f"""
import os, torch, charrnn_fast
torch.set_num_threads(3)
rnn = charrnn_fast.{kind}({I}, {H}, bidirectional={bidirectional})
x = torch.empty({T}, {B}, {I})
said = charrnn_fast.explain(rnn, x).forward[0].threads
before = len(os.listdir("/proc/self/task"))
with torch.no_grad():
    rnn(x)
print(said, len(os.listdir("/proc/self/task")) - before + 1)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    said, ran = map(int, done.stdout.split())
    assert ran == (3 if said > 1 else 1)


REFUSED = {
    "double": lambda x: (x.double(),),
    "another width": lambda x: (torch.zeros(*x.shape[:-1], 7),),
    "too many dimensions": lambda x: (x[None, None],),
    "integers": lambda x: (x[None].int(),),
}


@pytest.mark.parametrize("is_cell", [False, True])
@pytest.mark.parametrize("call", REFUSED)
def test_what_the_call_refuses(kind, is_cell, call):
    """explain raises what the call raises."""
    module = (kind.cell if is_cell else kind.ours)(3, 5)
    args = REFUSED[call](X[0] if is_cell else X)
    with pytest.raises((RuntimeError, ValueError)) as refusal:
        module(*args)
    with pytest.raises(type(refusal.value), match=re.escape(str(refusal.value))):
        explain(module, *args)


def test_no_steps_and_wrong_resets(kind):
    """So it does for a sequence of no steps, and for resets that do not fit."""
    module = kind.ours(3, 5)
    with pytest.raises(RuntimeError, match="larger than 0"):
        explain(module, X[:0])
    with pytest.raises(RuntimeError, match=r"resets of size \[4, 2\], got \[2, 4\]"):
        explain(module, X, resets=torch.zeros(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"resets must be of dtype torch.bool, got torch.int64"):
        explain(module, X, resets=torch.zeros(4, 2).long())


def test_projections():
    """proj_size is torch.nn's own path: explain says so, and what torch.nn lacks is refused."""
    lstm = charrnn_fast.LSTM(3, 5, proj_size=2)
    assert not explain(lstm, X).fused
    assert "proj_size" in explain(lstm, X).reason
    for keywords in ({"lengths": torch.tensor([4, 1])}, {"resets": X[..., 0] > 0}):
        with pytest.raises(NotImplementedError, match="proj_size"):
            lstm(X, **keywords)
    with pytest.raises(NotImplementedError, match="return_cell_states"):
        lstm(X, return_cell_states=True)
