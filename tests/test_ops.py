"""The registered ops: schema, fake and autograd registration, and derivatives in double."""

import pytest
import torch
from helpers import call_op, layer_results, rounding, rounding_of_product
from torch import nn
from torch.func import functional_call, vmap
from torch.utils.flop_counter import FlopCounterMode

import charrnn_fast
from charrnn_fast import ops

OPS = torch.ops.charrnn_fast
GATES = {"RNN_TANH": 1, "RNN_RELU": 1, "RNN_SIGMOID": 1, "LSTM": 4, "GRU": 3}
MODES = list(GATES)
T, B, I, H = 4, 3, 2, 5

# torch's own layers, and the arguments that make them the mode.
STOCK = {
    "RNN_TANH": lambda **kwargs: nn.RNN(I, H, **kwargs),
    "RNN_RELU": lambda **kwargs: nn.RNN(I, H, nonlinearity="relu", **kwargs),
    "LSTM": lambda **kwargs: nn.LSTM(I, H, **kwargs),
    "GRU": lambda **kwargs: nn.GRU(I, H, **kwargs),
}

LENGTHS = torch.tensor([2, 4, 1])
RESETS = torch.tensor([[0, 1, 0], [1, 0, 1], [0, 1, 0], [1, 1, 0]]).bool()
# What a call may say of where its sequences begin and end.
SPLITS = {
    "plain": {},
    "lengths": {"lengths": LENGTHS},
    "resets": {"resets": RESETS},
    "lengths and resets": {"lengths": LENGTHS, "resets": RESETS},
    "packed": {"batch_sizes": torch.tensor([3, 2, 2, 1])},
}


def rnn_layer(input, hx, weights, mode, has_biases=True, keep=False, **given):
    """The op: ``(y, h_n, c_n, cells, saved)``, with None for what it does not return."""
    given |= {"mode": mode, "has_biases": has_biases, "keep": keep}
    results = call_op("rnn_layer", input=input, hx=hx, weights=weights, **given)
    return layer_results(mode, given.get("cells", False), results)


def sum_of(*results):
    """The sum of all elements of those that there are."""
    return sum(result.sum() for result in results if result is not None)


def make(
    mode,
    directions=1,
    biases=True,
    dtype=torch.float64,
    requires_grad=True,
    packed=False,
    hidden=H,
):
    """Arguments of rnn_layer: input, the states (h and perhaps c), the weights."""
    torch.manual_seed(7)

    def tensor(*shape):
        # Sums well away from 0, where relu has a kink.
        return torch.randn(*shape, dtype=dtype).requires_grad_(requires_grad)

    rows = GATES[mode] * hidden
    weights = []
    for _ in range(directions):
        weights += [tensor(rows, I), tensor(rows, hidden)]
        weights += [tensor(rows), tensor(rows)] if biases else []
    states = [tensor(directions, B, hidden) for _ in range(2 if mode == "LSTM" else 1)]
    return tensor(*((8, I) if packed else (T, B, I))), states, weights


def layer_of(mode, states, *, biases=True, cells=None, **split):
    """A function of the flat list [input, *states, *weights], for the checks of derivatives."""
    count = len(states)
    cells = mode == "LSTM" if cells is None else cells

    def call(input, *rest):
        hx, cx = (*rest[:count], None)[:2]
        results = rnn_layer(
            input,
            hx,
            rest[count:],
            mode,
            biases,
            cx=cx,
            cells=cells,
            **split,
        )
        return [result for result in results[: 3 + cells] if result is not None]

    return call


def is_fused(mode, input, weights, **split):
    why = ops.why_composite(input, None, None, weights, split.get("resets"), mode)
    return why is None


def layer_arguments(mode, states, input, weights, *, biases=True, cells=False, keep=False, **split):
    hx, cx = (*states, None)[:2]
    rows = [split.get(name) for name in ("batch_sizes", "lengths", "resets")]
    return (input, hx, cx, weights, *rows, mode, biases, cells, keep)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("directions", "split"), [(1, "plain"), (2, "lengths and resets"), (2, "packed")]
)
def test_opcheck_of_the_layer(mode, directions, split):
    """torch.library.opcheck passes for rnn_layer with and without gradients."""
    for requires_grad in (False, True):
        x, states, weights = make(
            mode, directions, requires_grad=requires_grad, packed=split == "packed"
        )
        args = layer_arguments(
            mode, states, x, weights, cells=mode == "LSTM", keep=True, **SPLITS[split]
        )
        torch.library.opcheck(OPS.rnn_layer.default, args)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("split", "saved_is_given"), [("plain", True), ("lengths and resets", False)]
)
def test_opcheck_of_the_layer_backward(mode, split, saved_is_given):
    """torch.library.opcheck passes for rnn_layer_backward."""
    x, states, weights = make(mode, requires_grad=False)
    args = layer_arguments(
        mode, states, x, weights, cells=mode == "LSTM", keep=True, **SPLITS[split]
    )
    y, *finals, saved = layer_results(mode, mode == "LSTM", OPS.rnn_layer(*args))
    grads = [None if t is None else torch.randn_like(t) for t in (y, *finals)]
    saved = saved if saved_is_given else None
    needs = [True, True, mode == "LSTM", *[True] * 4]
    backward = OPS.rnn_layer_backward.default
    torch.library.opcheck(backward, (*grads, *args[:4], y, saved, *args[4:9], needs))


@pytest.mark.parametrize("mode", MODES)
def test_opcheck_of_the_stack(mode):
    """torch.library.opcheck passes for rnn: two layers, two directions."""
    rows = GATES[mode] * H
    torch.manual_seed(3)
    params = [
        torch.randn(*size, dtype=torch.float64)
        for width in (I, 2 * H)
        for _ in range(2)
        for size in ((rows, width), (rows, H), (rows,), (rows,))
    ]
    x, state = torch.randn(T, B, I).double(), torch.randn(4, B, H).double()
    has_c = mode == "LSTM"
    states = (state, state.cos() if has_c else None)
    args = (x, *states, params, None, None, RESETS, mode, True, 2, 0.0, False, True, has_c)
    torch.library.opcheck(OPS.rnn.default, args)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("split", SPLITS)
def test_gradcheck(mode, directions, split):
    """First derivatives of every argument agree with finite differences, by the kernels."""
    x, states, weights = make(mode, directions, packed=split == "packed", hidden=3)
    call = layer_of(mode, states, **SPLITS[split])
    before = ops.counters()
    assert torch.autograd.gradcheck(call, (x, *states, *weights))
    after = ops.counters()
    ran, other = ("fused", "composite")[:: 1 if is_fused(mode, x, weights, **SPLITS[split]) else -1]
    assert after[f"backward_{ran}"] > before[f"backward_{ran}"]
    assert after[f"backward_{other}"] == before[f"backward_{other}"]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # PyTorch's own use
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("split", SPLITS)
def test_forward_mode_and_second_derivatives(mode, split):
    """Tangents, and second derivatives, agree with finite differences."""
    x, states, weights = make(mode, packed=split == "packed", hidden=2)
    call, leaves = layer_of(mode, states, **SPLITS[split]), (x, *states, *weights)
    assert torch.autograd.gradcheck(call, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("split", ["plain", "lengths and resets"])
def test_complex(mode, split):
    """Complex tensors run by the formula, with gradients by finite differences."""
    if mode == "RNN_RELU":
        pytest.skip("relu is not defined for complex numbers")
    x, states, weights = make(mode, dtype=torch.complex128)
    call = layer_of(mode, states, **SPLITS[split])
    assert torch.autograd.gradcheck(call, (x, *states, *weights), fast_mode=True)


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
def test_vmap_over_everything(mode):
    """vmap gives the results of a loop, resets and lengths of each element among them."""
    x, states, weights = make(mode, requires_grad=False)
    resets = torch.stack([RESETS, ~RESETS, RESETS.flip(0)])
    lengths = torch.stack([LENGTHS, LENGTHS.flip(0), LENGTHS.roll(1)])
    hx, cx = (*states, None)[:2]
    xs = torch.stack([x, x.sin(), x.cos()])
    results = vmap(
        lambda x, lengths, resets: rnn_layer(
            x, hx, weights, mode, cx=cx, lengths=lengths, resets=resets
        )[:2]
    )(xs, lengths, resets)
    for i in range(3):
        expected = rnn_layer(xs[i], hx, weights, mode, cx=cx, lengths=lengths[i], resets=resets[i])[
            :2
        ]
        torch.testing.assert_close((results[0][i], results[1][i]), expected)


@pytest.mark.parametrize("mode", MODES)
def test_each_gradient_alone(mode):
    """A gradient asked for alone has the bits that it has among all."""
    x, states, weights = make(mode, 2)
    leaves = [x, *states, *weights]
    call = layer_of(mode, states, lengths=LENGTHS)

    def gradients(wanted):
        for tensor in leaves:
            tensor.requires_grad_(any(tensor is w for w in wanted))
        outputs = call(*leaves)
        return torch.autograd.grad(sum(output.sin().sum() for output in outputs), wanted)

    for leaf, expected in zip(leaves, gradients(leaves), strict=True):
        assert torch.equal(gradients([leaf])[0], expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("split", ["plain", "lengths and resets"])
def test_results_may_change_in_place(mode, split):
    """Results share no memory, and may be changed before backward, with the same gradients."""
    x, states, weights = make(mode, 2)
    leaves = [x, *states, *weights]
    call = layer_of(mode, states, **SPLITS[split])
    results = []
    for change in (False, True):
        outputs = call(*leaves)
        assert len({output.untyped_storage().data_ptr() for output in outputs}) == len(outputs)
        assert not any(output._is_view() for output in outputs)
        if change:
            outputs = [output.mul_(2) for output in outputs]
        else:
            outputs = [output * 2 for output in outputs]
        loss = sum(output.sum() for output in outputs)
        results.append(torch.autograd.grad(loss, leaves))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("mode", MODES)
def test_operands_changed_before_backward(mode):
    """What backward reads may not change; a bias, where gates were kept, may."""
    x, states, weights = make(mode)
    leaves = [x, *states, *weights]
    call = layer_of(mode, states)
    for changed in (weights[0], weights[1], states[0]):
        y = call(*leaves)[0]
        with torch.no_grad():
            changed.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
    kept = rnn_layer(x.detach(), None, [w.detach() for w in weights], mode, keep=True)[4]
    y = call(*leaves)[0]
    with torch.no_grad():
        weights[2].mul_(2)
    if kept is not None or GATES[mode] == 1:
        y.sum().backward()
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("split", ["plain", "lengths", "packed"])
def test_saved_is_a_cache(mode, split):
    """Given or not, it gives the same gradients, bit for bit; it needs no gradient itself."""
    packed = split == "packed"
    x, states, weights = make(mode, 2, requires_grad=False, packed=packed)
    hx, cx = (*states, None)[:2]
    args = (x, hx, cx, weights, *(SPLITS[split].get(n) for n in ("batch_sizes", "lengths", "x")))
    y, h_n, c_n, _, saved = layer_results(
        mode, False, OPS.rnn_layer(*args, mode, True, False, True)
    )
    assert (saved is None) == (mode not in ("LSTM", "GRU"))
    assert len(OPS.rnn_layer(*args, mode, True, False, False)) == 2 + (c_n is not None)
    dc_n = None if c_n is None else c_n.sin()
    grads, needs = (y.cos(), h_n.sin(), dc_n, None), [True, True, mode == "LSTM", *[True] * 8]
    results = [
        OPS.rnn_layer_backward(*grads, *args[:4], y, cache, *args[4:], mode, True, needs)
        for cache in (saved, None, y.new_empty(0), y.new_empty(3, 1, dtype=torch.float16))
    ]
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
    leaves = make(mode, packed=packed)
    kept = rnn_layer(leaves[0], None, leaves[2], mode, keep=True, **SPLITS[split])[4]
    assert kept is None or not kept.requires_grad


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


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"mode": "GRU", "cx": torch.zeros(1, B, H)}, ValueError, "cx must be None: GRU has no"),
        ({"mode": "GRU", "cells": True}, ValueError, "cells must be False: GRU has no"),
        ({"cx": torch.zeros(1, B, H + 1)}, RuntimeError, r"cell state of size \[1, 3, 5\]"),
        ({"cx": torch.zeros(1, B, H).double()}, RuntimeError, r"cx dtype \(Double\)"),
        ({"resets": torch.zeros(T, B)}, RuntimeError, "resets must be a bool tensor, got Float"),
        ({"resets": RESETS[:3]}, RuntimeError, r"resets of size \[4, 3\], got \[3, 3\]"),
        ({"lengths": torch.ones(B).bool()}, RuntimeError, "lengths must be a 1-D tensor of int64"),
        (
            {
                "resets": RESETS,
                "batch_sizes": torch.tensor([3, 3, 3, 3]),
                "input": torch.ones(12, I),
            },
            ValueError,
            "resets cannot be given with packed input: pad it, and give lengths=",
        ),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
def test_errors_of_cells(change, error, message):
    """What a cell does not have, and resets and states that do not fit, by name."""
    mode = change.get("mode", "LSTM")
    rows = GATES[mode] * H
    weights = [torch.zeros(rows, I), torch.zeros(rows, H), torch.zeros(rows), torch.zeros(rows)]
    arguments = {
        **{"input": torch.zeros(T, B, I), "hx": None, "cx": None, "weights": weights},
        **{"batch_sizes": None, "lengths": None, "resets": None, "mode": "LSTM"},
        **{"has_biases": True, "cells": False, "keep": True},
    }
    with pytest.raises(error, match=message):
        OPS.rnn_layer(**{**arguments, **change})


def test_calls_by_the_signature_of_0_1_0():
    """They had no cx and resets: the error names the argument, and shows the declaration."""
    x, (hx,), weights = make("RNN_TANH", requires_grad=False)
    y = rnn_layer(x, hx, weights, "RNN_TANH")[0]
    backward = (y, None, x, hx, weights, y, None, None, "RNN_TANH", True, [True] * 6)
    calls = {
        "rnn": ("cx", (x, hx, weights, None, None, "RNN_TANH", True, 1, 0.0, False, False)),
        "rnn_layer": ("cx", (x, hx, weights, None, None, "RNN_TANH", True)),
        "rnn_layer_backward": ("input", backward),
    }
    for name, (argument, arguments) in calls.items():
        with pytest.raises(RuntimeError, match=f"for argument '{argument}'") as caught:
            getattr(OPS, name)(*arguments)
        assert f"Declaration: charrnn_fast::{name}(Tensor" in str(caught.value)
        assert "Tensor? cx" in str(caught.value)


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


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_isa_may_change_before_backward(mode, dtype):
    """What one ISA kept serves another, or is computed again where the other keeps another dtype.

    The gradients are then those of the second ISA, but for the rounding of what was kept.
    """
    x, states, weights = make(mode, 2, dtype=torch.float32)
    leaves = [t.detach().to(dtype).requires_grad_() for t in (x, *states, *weights)]
    call, grads = layer_of(mode, states, lengths=LENGTHS), {}
    isas = charrnn_fast.available_isas()
    for forward, backward in [(a, b) for a in isas for b in isas]:
        with charrnn_fast.use_isa(forward):
            outputs = call(*leaves)
        with charrnn_fast.use_isa(backward), ops.assert_fused():
            rnn_layer(x, None, weights, mode)  # so that something has run forward
            loss = sum(output.float().sin().sum() for output in outputs)
            grads[forward, backward] = torch.autograd.grad(loss, leaves)
    eps = torch.finfo(dtype).eps
    for (_, backward), got in grads.items():
        for a, b in zip(got, grads[backward, backward], strict=True):
            scale = max(1.0, float(b.float().abs().max()))
            torch.testing.assert_close(a, b, rtol=0, atol=32 * eps * scale)


@pytest.mark.parametrize("mode", STOCK)
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("packed", [False, True])
def test_flops_are_what_torch_counts(mode, directions, packed):
    """FlopCounterMode counts the same products as for torch's own layer, forward and backward."""
    x, states, weights = make(mode, directions, packed=packed)
    module = STOCK[mode](bidirectional=directions == 2, dtype=torch.float64)
    sizes = SPLITS["packed"]["batch_sizes"] if packed else None
    counts = []
    for wanted in (True, False):
        leaf = x.detach().requires_grad_(wanted)
        hx, cx = (*(states if wanted else ()), None, None)[:2]
        state = None if hx is None else hx if cx is None else (hx, cx)
        input = nn.utils.rnn.PackedSequence(leaf, sizes) if packed else leaf
        for call in (
            lambda input=input, state=state: module(input, state)[0],
            lambda leaf=leaf, hx=hx, cx=cx: rnn_layer(
                leaf, hx, weights, mode, cx=cx, batch_sizes=sizes
            )[0],
        ):
            with FlopCounterMode(display=False) as counter:
                output = call()
                (output.data if isinstance(output, tuple) else output).sum().backward()
            counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > counts[2] == counts[3]


@pytest.mark.parametrize("mode", MODES)
def test_kept_for_backward(mode):
    """In units of T*B*H beside y: 5 for an LSTM, 4 for a GRU; nothing without gradients."""
    units = {"LSTM": 5, "GRU": 4}.get(mode, 0)
    x, states, weights = make(mode, dtype=torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer_of(mode, states)(x, *states, *weights)[0]
    operands = {t.untyped_storage().data_ptr() for t in (x, *states, *weights, y)}
    beside = [t for t in kept if t.untyped_storage().data_ptr() not in operands]
    assert sum(t.numel() for t in beside) == units * T * B * H
    with torch.no_grad():
        assert rnn_layer(x, None, weights, mode)[4] is None


@pytest.mark.parametrize("mode", MODES)
def test_autocast(mode):
    """Every operand is cast, the cell state among them, and gradients come back in float32."""
    x, states, weights = make(mode, dtype=torch.float32)
    hx, cx = (*states, None)[:2]
    with torch.autocast("cpu", torch.bfloat16):
        results = rnn_layer(x, hx, weights, mode, cx=cx)[: 1 + len(states)]
    low = [[t.detach().bfloat16() for t in list_] for list_ in ([x], states, weights)]
    hx, cx = (*low[1], None)[:2]
    expected = rnn_layer(low[0][0], hx, low[2], mode, cx=cx)[: len(results)]
    assert all(map(torch.equal, results, expected))
    sum(result.float().sum() for result in results).backward()
    assert all(t.grad.dtype == torch.float32 for t in (x, *states, *weights))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_linear(isa, dtype):
    """The op is F.linear, by whatever computes it, and as near to float64 in float32."""
    linear, F = torch.ops.charrnn_fast.linear.default, torch.nn.functional
    x, W, b = (torch.randn(*shape, dtype=dtype) for shape in ((700, 150), (70, 150), (70,)))
    # dW and db are sums over 700 rows of products of random signs, in two orders.
    near = {"atol": rounding(700, dtype, 700**0.5), "rtol": rounding(700, dtype)}
    torch.library.opcheck(linear, (x, W, b), **near)
    torch.library.opcheck(linear, [tensor.clone().requires_grad_() for tensor in (x, W, b)], **near)
    torch.library.opcheck(
        torch.ops.charrnn_fast.linear_backward.default,
        (torch.ones(700, 70, dtype=dtype), x, W),
        **near,
    )
    exact = F.linear(x.double(), W.double(), b.double())
    error, theirs = ((y.double() - exact).abs().max() for y in (linear(x, W, b), F.linear(x, W, b)))
    assert error <= max(2 * theirs, rounding_of_product(x, W).max())
    # What other dtypes run is torch's, whose bits may depend on strides.
    allowed = 0.0 if dtype != torch.bfloat16 else rounding(150, dtype, 150**0.5)
    for y in (linear(x.t().contiguous().t(), W, b), linear(x, W.t().contiguous().t(), b)):
        torch.testing.assert_close(y, linear(x, W, b), rtol=0, atol=allowed)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(linear(x, W, b))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=allowed)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # PyTorch's own use
def test_derivatives_of_linear():
    """First and second ones, tangents, those of each sample; an operand changed before them."""
    linear, F = torch.ops.charrnn_fast.linear.default, torch.nn.functional
    x, W, b = (torch.randn(*shape, dtype=torch.double) for shape in ((2, 6, 4), (3, 4), (3,)))
    wanted = [tensor.requires_grad_() for tensor in (x, W, b)]
    before = charrnn_fast.ops.counters()["backward_fused"]
    assert torch.autograd.gradcheck(linear, wanted)
    assert charrnn_fast.ops.counters()["backward_fused"] > before
    assert torch.autograd.gradcheck(linear, wanted, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(linear, wanted)

    def loss(apply):
        return lambda W, x: apply(x, W, b.detach()).sin().sum()

    grads = [
        torch.func.vmap(torch.func.grad(loss(apply)), (None, 0))(W.detach(), x.detach())
        for apply in (linear, F.linear)
    ]
    torch.testing.assert_close(*grads)
    y = linear(x, W, b)
    with torch.no_grad():
        W.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    y = linear(x.detach(), W, b)
    with torch.no_grad():
        W.mul_(2)  # nothing reads it
    y.sum().backward()
    y = linear(x, W, b)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="a second time"):
        y.sum().backward()


@pytest.mark.parametrize("N, I, weight, bias", [(6, 5, 4, 3), (6, 4, 4, 2), (0, 4, 4, 3)])
def test_linear_of_other_shapes(N, I, weight, bias):
    """What the kernel does not serve, and what is wrong, is as in F.linear."""
    x, W, b = torch.ones(N, I), torch.ones(3, weight), torch.ones(bias)
    found = []
    for apply in (torch.ops.charrnn_fast.linear.default, torch.nn.functional.linear):
        try:
            found.append(apply(x, W, b).shape)
        except RuntimeError as error:
            found.append(str(error))
    assert found[0] == found[1]


@pytest.mark.parametrize("mode", MODES)
def test_backward_takes_rows_of_any_distance(mode):
    """One row of y may stand for all, and rows may lie apart: as their copies."""
    x, _, weights = make(mode, biases=False, requires_grad=False)
    dy, needs = torch.ones(T, B, H).double(), [True, False, False, True, True]
    none = [None] * 3
    for y in (torch.rand(H).double().expand(T, B, H), torch.rand(T, B, 2 * H).double()[..., :H]):
        results = [
            OPS.rnn_layer_backward(
                dy, *none, x, None, None, weights, rows, None, *none, mode, False, needs
            )
            for rows in (y, y.contiguous())
        ]
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)
