"""Calls of the op rnn_layer that several test files make: small sizes, every mode and split."""

import torch
from helpers import call_op, layer_results
from torch import nn

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
