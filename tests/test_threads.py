"""Threads and processes: the same bits however the work is divided."""

import resource
import threading

import pytest
import torch
from helpers import NO_STATES, assert_same_bits, call_op, leaf, run
from kinds import each, flat


def test_python_threads(kind):
    """Several Python threads may run one module at once, forward and backward."""
    rnn = kind.ours(3, 40, 2)
    inputs = [torch.randn(20, 4, 3) for _ in range(4)]
    want = [run(rnn, x) for x in inputs]
    got = [None] * 4

    def work(index):
        for _ in range(10):
            got[index] = run(rnn, inputs[index])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for a, b in zip(got, want, strict=True):
        assert_same_bits(a, b)


def backward_of_weights(T, B, H):
    """One call of the kernels whose results are small and whose working memory is not."""
    x, y = torch.zeros(T, B, 8), torch.zeros(T, B, H)
    return lambda: call_op(
        "rnn_layer_backward",
        dy=y,
        input=x,
        weights=[torch.zeros(H, 8), torch.zeros(H, H)],
        y=y,
        mode="RNN_TANH",
        has_biases=False,
        needs=[False, *NO_STATES, True, False],  # of dW_ih, a small result
    )


@pytest.mark.skipif(not hasattr(resource, "RUSAGE_THREAD"), reason="page faults of a thread: Linux")
def test_working_memory_is_kept_by_its_thread_and_freed_with_it():
    """Calls after the first one bring in no fresh pages; threads that have ended hold nothing."""
    torch.set_num_threads(1)

    def faults(calls, call):
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
        for _ in range(calls):
            call()
        return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before

    counts = []
    T, B, H = 100, 64, 256
    pages = T * B * H * 4 // resource.getpagesize()  # of delta

    def work():
        call = backward_of_weights(T, B, H)
        counts.append((faults(1, call), faults(10, call)))

    def threads():
        for _ in range(12):
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    peak = threads()
    if counts[0][0] < pages // 2:
        pytest.skip("the kernel hands out huge pages, which are too few to count")
    assert max(later for _, later in counts) < pages // 2
    assert threads() - peak < 20_000  # kilobytes


@pytest.mark.parametrize(
    "shape", [(50, 64, 20, 128), (60, 3, 20, 320), (30, 7, 5, 96), (200, 1, 16, 64)], ids=str
)
def test_same_bits_for_any_number_of_threads(isa, kind, shape):
    """Results and gradients have the same bits for one thread and for several."""
    T, B, I, H = shape
    rnn = kind.ours(I, H, bidirectional=True)
    x = torch.randn(T, B, I)
    results = []
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        results.append(run(rnn, x))
    for other in results[1:]:
        assert_same_bits(other, results[0])


@pytest.mark.parametrize("B", [5, 40, 150])
def test_same_bits_of_ragged_batches_for_any_number_of_threads(isa, kind, B):
    """Members sum gradients chunk by chunk, or after all steps, but in one order."""
    T, H = 90, 96
    rnn = kind.ours(8, H, bidirectional=True)
    x = torch.randn(T, B, 8)
    lengths = torch.randint(1, T - 3, (B,))  # T itself is not among them
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run(rnn, x, lengths=lengths))
    for other in results[1:]:
        assert_same_bits(other, results[0])


@pytest.mark.parametrize(
    ("H", "dtype"),
    [(50, torch.float32), (50, torch.float64), (136, torch.float32), (300, torch.float32)],
)
def test_same_bits_in_any_batch(isa, kind, H, dtype):
    """A sequence's results do not depend on what else is in the batch, nor does d input.

    Tiles of one or two rows take several panels of weights side by side where as many are left.
    """
    rnn = kind.ours(9, H, 2, dtype=dtype)
    x = torch.randn(11, 20, 9, dtype=dtype)
    hx = kind.state(2, 20, H, dtype=dtype)

    def results(part):
        a, states = leaf(x[:, part]), each(lambda tensor: leaf(tensor[:, part]), hx)
        found = flat(rnn(a, states))
        # The same weights of the loss for a sequence wherever it is.
        sum(tensor.sin().sum() for tensor in found).backward()
        return [*found, a.grad, *[tensor.grad for tensor in flat(states)]]

    whole = results(slice(None))
    for part in (slice(0, 1), slice(7, 8), slice(19, 20), slice(12, 14), slice(3, 9)):
        for got, want in zip(results(part), whole, strict=True):
            assert torch.equal(got, want[:, part])


class Sequences(torch.utils.data.Dataset):
    """Runs the module inside a worker."""

    def __init__(self, module):
        self.module = module

    def __len__(self):
        return 8

    def __getitem__(self, index):
        with torch.no_grad():
            return self.module(torch.full((40, 8, 16), index / 8.0))[0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:This DataLoader will create")
def test_dataloader_workers(kind):
    """The module runs in forked DataLoader workers after it ran, with threads, in the parent."""
    rnn = kind.ours(16, 128)
    dataset = Sequences(rnn)
    want = torch.stack([dataset[i] for i in range(8)])
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=4, num_workers=2, multiprocessing_context="fork"
    )
    assert torch.equal(torch.cat(list(loader)), want)
