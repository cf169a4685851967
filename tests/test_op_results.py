"""What the layer op returns: against torch's own layers, for any shape, batch and threads."""

import pytest
import torch
from layer_calls import (
    GATES,
    LENGTHS,
    MODES,
    RESETS,
    SPLITS,
    STOCK,
    B,
    H,
    I,
    T,
    layer_of,
    make,
    rnn_layer,
    sum_of,
)
from torch.func import functional_call


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("split", ["plain", "lengths and resets"])
def test_tokens_equal_one_hot(mode, split):
    """Token ids give the outputs and gradients of their one-hot rows, to rounding."""
    _, states, weights = make(mode)
    ids = torch.randint(0, I, (T, B))
    call = layer_of(mode, states, **SPLITS[split])
    results = []
    for x in (ids, torch.nn.functional.one_hot(ids, I).double()):
        outputs = call(x, *states, *weights)
        loss = sum(output.sin().sum() for output in outputs)
        results.append([*outputs, *torch.autograd.grad(loss, [*states, *weights])])
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-13)


def by_pieces(mode, x, states, weights, biases, lengths, resets):
    """torch's own layer, forward direction and back, run on each piece of each sequence alone."""
    each = 4 if biases else 2
    module = STOCK[mode](bias=biases, dtype=x.dtype)
    names = [name for name, _ in module.named_parameters()]
    columns, finals = [], []
    for d in range(len(weights) // each):
        own = dict(zip(names, weights[d * each : (d + 1) * each], strict=True))
        for b in range(B):
            steps = int(lengths[b])
            marks = [t for t in range(1, steps) if resets[t, b]]
            pieces = list(zip([0, *marks], [*marks, steps], strict=True))
            # Which piece hx serves, and which one's state is returned.
            starts, ends = (pieces[-1], pieces[0]) if d else (pieces[0], pieces[-1])
            parts = []
            for begin, end in pieces:
                rows = x[begin:end, b]
                served = (begin, end) == starts and (d == 1 or not resets[0, b])
                state = [s[d : d + 1, b] if served else s[d : d + 1, b] * 0 for s in states]
                state = tuple(state) if len(state) > 1 else state[0]
                y, last = functional_call(module, own, (rows.flip(0) if d else rows, state))
                parts.append(y.flip(0) if d else y)
                if (begin, end) == ends:
                    finals.append(last if isinstance(last, tuple) else (last,))
            columns.append(torch.cat([*parts, parts[0].new_zeros(T - steps, H)]))
    count = len(columns) // B
    y = torch.cat([torch.stack(columns[d * B : (d + 1) * B], 1) for d in range(count)], -1)
    return y, *(torch.stack(state).view(count, B, H) for state in zip(*finals, strict=True))


@pytest.mark.parametrize("mode", STOCK)
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("split", ["plain", "lengths", "resets", "lengths and resets"])
def test_as_torch_runs_the_pieces(isa, mode, directions, biases, split):
    """Lengths and resets split a batch in pieces: each as torch runs it alone, with gradients."""
    x, states, weights = make(mode, directions, biases)
    given = {"lengths": torch.tensor([T] * B), "resets": torch.zeros(T, B).bool()} | SPLITS[split]
    results = []
    for outputs in (
        layer_of(mode, states, biases=biases, cells=False, **SPLITS[split])(x, *states, *weights),
        by_pieces(mode, x, states, weights, biases, **given),
    ):
        loss = sum(output.sin().sum() for output in outputs)
        leaves = [x, *states, *weights]
        results.append([*outputs, *torch.autograd.grad(loss, leaves)])
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("split", SPLITS)
def test_cells_are_the_states_of_every_step(directions, split):
    """`cells` holds c of each step: that of a shorter call's end; zeros past a sequence's end."""
    x, (hx, cx), weights = make("LSTM", directions, requires_grad=False, packed=split == "packed")
    kwargs = SPLITS[split]
    y, h_n, c_n, cells, _ = rnn_layer(x, hx, weights, "LSTM", cx=cx, cells=True, **kwargs)
    without = rnn_layer(x, hx, weights, "LSTM", cx=cx, **kwargs)
    assert torch.equal(y, without[0])
    assert torch.equal(h_n, without[1])
    assert torch.equal(c_n, without[2])
    assert without[3] is None
    assert cells.shape == y.shape
    assert torch.equal(cells == 0, y == 0)
    if split == "plain":
        assert torch.equal(cells[-1, :, :H], c_n[0])
        for n in range(1, T):
            shorter = rnn_layer(x[:n], hx[:1], weights[:4], "LSTM", cx=cx[:1])
            torch.testing.assert_close(cells[n - 1, :, :H], shorter[2][0])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64])
def test_lengths_of_any_integers(mode, dtype):
    """Lengths of any integer dtype, and resets of any strides, give the same bits."""
    x, states, weights = make(mode, requires_grad=False)
    hx, cx = (*states, None)[:2]
    strided = RESETS.t().contiguous().t()
    assert not strided.is_contiguous()
    for resets in (None, RESETS):
        want = rnn_layer(x, hx, weights, mode, cx=cx, lengths=LENGTHS, resets=resets)
        resets = None if resets is None else strided
        got = rnn_layer(x, hx, weights, mode, cx=cx, lengths=LENGTHS.to(dtype), resets=resets)
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (1, 4, 3, 7), (6, 0, 3, 5), (5, 2, 1, 33)], ids=str
)
@pytest.mark.parametrize("split", [False, True])
def test_shapes(isa, mode, shape, split):
    """One step, no sequence, one unit, an odd number of them: shapes and gradients of each."""
    steps, batch, width, hidden = shape
    rows = GATES[mode] * hidden
    x = torch.randn(steps, batch, width, requires_grad=True)
    weights = [
        torch.randn(*size).mul_(0.3).requires_grad_()
        for size in ((rows, width), (rows, hidden), (rows,), (rows,)) * 2
    ]
    resets = torch.rand(steps, batch) < 0.4 if split else None
    y, h_n, c_n, _, _ = rnn_layer(x, None, weights, mode, resets=resets)
    assert y.shape == (steps, batch, 2 * hidden)
    assert h_n.shape == (2, batch, hidden)
    assert c_n is None or c_n.shape == h_n.shape
    grads = torch.autograd.grad(sum_of(y, h_n, c_n), [x, *weights])
    exact = [t.detach().double().requires_grad_() for t in (x, *weights)]
    y, h_n, c_n, _, _ = rnn_layer(exact[0], None, exact[1:], mode, resets=resets)
    expected = torch.autograd.grad(sum_of(y, h_n, c_n), exact)
    for got, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["RNN_TANH", "LSTM", "GRU"])
@pytest.mark.parametrize("T, B, H", [(12, 32, 64), (60, 1, 256), (9, 7, 33)])
@pytest.mark.parametrize("split", [False, True])
def test_same_bits_for_any_batch_and_threads(mode, T, B, H, split):
    """Forward bits do not depend on the batch or the threads, gradient bits not on the threads."""
    torch.manual_seed(1)
    rows = GATES[mode] * H
    x, states = torch.randn(T, B, 16), [torch.randn(1, B, H) for _ in range(2)]
    weights = [
        torch.randn(*size).div_(H**0.5).requires_grad_()
        for size in ((rows, 16), (rows, H), (rows,), (rows,))
    ]
    lengths, resets = torch.randint(1, T + 1, (B,)), torch.rand(T, B) < 0.1

    def call(part):
        given = {"cx": states[1][:, part].contiguous()} if mode == "LSTM" else {}
        if split:
            given |= {"lengths": lengths[part], "resets": resets[:, part]}
        return rnn_layer(x[:, part], states[0][:, part], weights, mode, **given)

    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            y, h_n, c_n, *_ = call(slice(None))
            loss = sum_of(y, h_n.sin(), c_n)
            results.append([y, h_n, *torch.autograd.grad(loss, weights)])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
    alone = call(slice(B // 2, B // 2 + 1))
    assert torch.equal(alone[0][:, 0], results[0][0][:, B // 2])
