"""The registered layer ops as torch sees them: opcheck, vmap, autocast, FLOPs, their errors."""

import pytest
import torch
from helpers import layer_results
from layer_calls import (
    GATES,
    LENGTHS,
    MODES,
    OPS,
    RESETS,
    SPLITS,
    STOCK,
    B,
    H,
    I,
    T,
    make,
    rnn_layer,
)
from torch import nn
from torch.func import vmap
from torch.utils.flop_counter import FlopCounterMode


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
