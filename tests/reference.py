"""The networks as their formulas say it, in plain torch: the reference of the tests.

    RNN    h = act(x W_ih' + b_ih + h W_hh' + b_hh)
    LSTM   i, f, g, o = x W_ih' + b_ih + h W_hh' + b_hh
           c = sigmoid(f) c + sigmoid(i) tanh(g),     h = sigmoid(o) tanh(c)
    GRU    r, z, n = x W_ih' + b_ih;  r', z', n' = h W_hh' + b_hh
           h = (1 - z) n + z h   with r = sigmoid(r + r'), z = sigmoid(z + z'), n = tanh(n + r n')

Everything here is differentiable and obvious rather than fast.
"""

import torch
from torch import Tensor
from torch.nn.functional import one_hot


def elman(activation):
    def step(a, b, h):
        return (activation(a + b),)

    return step


def lstm(a, b, h, c):
    i, f, g, o = (a + b).chunk(4)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def gru(a, b, h):
    (r, z, n), (r_, z_, n_) = a.chunk(3), b.chunk(3)
    z = torch.sigmoid(z + z_)
    n = torch.tanh(n + torch.sigmoid(r + r_) * n_)
    return ((1 - z) * n + z * h,)


# The states after a step of what x and h are multiplied to, and of the states before.
STEPS = {
    "RNN_TANH": elman(torch.tanh),
    "RNN_RELU": elman(torch.relu),
    "RNN_SIGMOID": elman(torch.sigmoid),
    "LSTM": lstm,
    "GRU": gru,
}


def stack(
    input,
    hx,
    params,
    mode,
    has_biases,
    num_layers,
    bidirectional,
    lengths=None,
    resets=None,
):
    """The stack of layers over a padded, time-major batch without dropout.

    Args:
        input: ``(T, B, I)``, or int64 ids ``(T, B)``.
        hx: h ``(num_layers * D, B, H)``, of an LSTM ``(h, c)``, or None.
        params: the flat weights in torch.nn's order.
        lengths: list of ints, or None: every sequence has T steps.
        resets: bool ``(T, B)``, or None: where the states are zero before a step.

    Returns:
        ``(output, states, cells)``: states h_n or ``(h_n, c_n)``; output and cells, which an LSTM
        alone has, are zero past each length.
    """
    directions = 2 if bidirectional else 1
    per_direction = 4 if has_biases else 2
    if input.dtype == torch.int64:
        input = one_hot(input, params[0].shape[1]).to(params[0].dtype)
    steps, batch = input.shape[:2]
    lengths = [steps] * batch if lengths is None else [int(n) for n in lengths]
    given = [] if hx is None else list(hx) if isinstance(hx, (tuple, list)) else [hx]
    count = 2 if mode == "LSTM" else 1
    finals = [[] for _ in range(count)]
    for layer in range(num_layers):
        columns = [[[] for _ in range(directions)] for _ in range(count)]
        for direction in range(directions):
            index = layer * directions + direction
            weights = params[index * per_direction : (index + 1) * per_direction]
            for b in range(batch):
                n = lengths[b]
                H = weights[1].shape[1]
                states = [s[index, b] for s in given] or [input.new_zeros(H)] * count
                marks = [False] * n if resets is None else resets[:n, b].tolist()
                found = sequence(input[:n, b], states, weights, mode, marks, bool(direction))
                for k in range(count):
                    pad = found[k].new_zeros(steps - n, H)
                    columns[k][direction].append(torch.cat([found[k], pad]))
                    finals[k].append(found[k][0 if direction else n - 1])
        outputs = [
            torch.cat([torch.stack(ways, 1) for ways in columns[k]], -1) for k in range(count)
        ]
        input = outputs[0]
    states = [torch.stack(f).unflatten(0, (num_layers * directions, batch)) for f in finals]
    if count == 2:
        return outputs[0], tuple(states), outputs[1]
    return outputs[0], states[0], None


def sequence(
    x: Tensor,
    states: list[Tensor],
    weights: list[Tensor],
    mode: str,
    resets: list[bool],
    reverse: bool,
) -> list[Tensor]:
    """The states of every step ``(T, H)`` of one sequence ``(T, I)`` from initial ones ``(H)``.

    A reset at step t cuts the sequence between t - 1 and t, whichever way it runs.
    """
    W_ih, W_hh, *biases = weights
    b_ih, b_hh = biases or (0.0, 0.0)
    order = range(len(x) - 1, -1, -1) if reverse else range(len(x))
    found = {}
    for t in order:
        cut = t + 1 < len(x) and resets[t + 1] if reverse else resets[t]
        if cut:
            states = [torch.zeros_like(state) for state in states]
        states = STEPS[mode](W_ih @ x[t] + b_ih, W_hh @ states[0] + b_hh, *states)
        found[t] = states
    return [torch.stack([found[t][k] for t in range(len(x))]) for k in range(len(states))]
