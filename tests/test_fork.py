"""Children of fork() compute after their parent has used its threads, which a child has not got.

Every case is large enough for two threads, and runs in a process of its own with a time limit: what
goes wrong here hangs. Nothing else of torch is called on the child's first thread that could want
its threads, as torch itself would wait there for ever; results go home as bytes.
"""

import os
import subprocess
import sys

import pytest
import torch

import charrnn_fast

PRELUDE = """
import ctypes, hashlib, os, sys, threading
import torch, charrnn_fast
from charrnn_fast import ops

def digest(tensors):
    total = hashlib.sha256()
    for tensor in tensors:
        assert tensor.is_contiguous()
        total.update(ctypes.string_at(tensor.data_ptr(), tensor.nbytes))
    return total.hexdigest()

torch.manual_seed(0)
torch.set_num_threads(2)
rnn = charrnn_fast.RNN(64, 256)
two = charrnn_fast.RNN(64, 256, bidirectional=True)
x = torch.randn(100, 32, 64)
dy = torch.randn(100, 32, 256)
leaf = x.clone().requires_grad_()
lengths = torch.randint(1, 100, (32,))
h16 = charrnn_fast.RNN(64, 256, dtype=torch.float16)
x16 = x.half()
weight, bias = torch.randn(256, 256), torch.randn(256)
dlinear = torch.randn(100, 32, 256)

def forward():
    with torch.no_grad():
        return list(rnn(x))

def backward():
    y, h_n = rnn(leaf)
    return torch.autograd.grad([y], [leaf, *rnn.parameters()], [dy])

def both_directions():
    with torch.no_grad():
        return list(two(x))

def ragged():  # the gaps are filled with zeros by ATen
    with torch.no_grad():
        return list(rnn(x, lengths=lengths))

def converted():  # to float32 and back by ATen
    with torch.no_grad():
        return list(h16(x16))

def linear():
    y = torch.ops.charrnn_fast.linear(dy, weight, bias)
    return [y, *torch.ops.charrnn_fast.linear_backward(dlinear, dy, weight)]

tokens, uniforms = torch.zeros(32, dtype=torch.int64), torch.rand(300, 32)
generator = charrnn_fast.RNN(64, 256)
head = torch.randn(64, 256)
def generate():
    params = [p.detach() for p in generator.parameters()]
    op = torch.ops.charrnn_fast.generate
    return list(op(tokens, None, None, params, head, None, uniforms, "RNN_TANH", True))

CALLS = (forward, backward, both_directions, ragged, converted, linear, generate)
def results():
    return " ".join(digest(call()) for call in CALLS)
def tasks():
    return len(os.listdir("/proc/self/task"))
"""


def run(code: str, **environment: str) -> str:
    """What a new interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PRELUDE + code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_calls_want_two_threads():
    """Else the cases below would hold for any library."""
    torch.set_num_threads(2)
    x = torch.empty(100, 32, 64)
    for two in (False, True):
        said = charrnn_fast.explain(charrnn_fast.RNN(64, 256, bidirectional=two), x)
        assert said.forward[0].threads == said.backward[0].threads == 2


def test_os_fork():
    """Every op, in a child, in a child of it, and in the parent afterwards."""
    code = """
want = results()
def child(depth):
    pid = os.fork()
    if pid:
        assert os.waitpid(pid, 0)[1] == 0
        return
    try:
        assert results() == want
        if depth:
            child(depth - 1)
        assert results() == want
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)
child(1)
assert results() == want
print("done")
"""
    assert run(code) == "done\n"


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="threads are counted in /proc")
def test_a_child_still_has_threads():
    """It computes with two threads of its own, and torch's number of them stays."""
    code = """
forward()
reading, writing = os.pipe()
if os.fork() == 0:
    before = tasks()
    forward()
    os.write(writing, f"{before} {tasks()} {torch.get_num_threads()}".encode())
    os._exit(0)
print(os.read(reading, 100).decode())
"""
    assert run(code).split() == ["1", "3", "2"]  # the one that leads, and the one beside it


def test_threads_of_a_child():
    """Those that a child starts have pools of their own from the beginning."""
    code = """
want = results()
pid = os.fork()
if pid == 0:
    torch.set_num_threads(2)  # torch makes another thread pool anew, which no two threads may do
    found = []
    workers = [threading.Thread(target=lambda: found.append(results())) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    os._exit(0 if found == [want, want] and results() == want else 1)
print(os.waitpid(pid, 0)[1])
"""
    assert run(code) == "0\n"


def test_multiprocessing_fork():
    """Two processes at once, of the method that was Linux's default before Python 3.14."""
    code = """
import multiprocessing
want = results()
context = multiprocessing.get_context("fork")
queue = context.Queue()
children = [context.Process(target=lambda: queue.put(results())) for _ in range(2)]
for child in children:
    child.start()
assert [queue.get(timeout=120) for _ in children] == [want, want]
for child in children:
    child.join(60)
    assert child.exitcode == 0
print("done")
"""
    assert run(code) == "done\n"


@pytest.mark.parametrize("threads", [0, 2])
def test_dataloader_workers(threads):
    """With the one thread that a worker is given, and with two that its user asks for."""
    code = """
class Calls(torch.utils.data.Dataset):
    def __len__(self):
        return 4
    def __getitem__(self, index):
        return digest(forward()) + str(torch.get_num_threads())
want = digest(forward())
def more(worker):
    if THREADS:
        torch.set_num_threads(THREADS)
loader = torch.utils.data.DataLoader(
    Calls(), batch_size=None, num_workers=2, multiprocessing_context="fork", worker_init_fn=more)
assert list(loader) == [want + str(THREADS or 1)] * 4
print("done")
""".replace("THREADS", str(threads))
    assert run(code) == "done\n"
