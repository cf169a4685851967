"""The Elman network as its formula says it, in plain torch: the reference of the tests.

    h_t = act(x_t W_ih' + b_ih + h_{t-1} W_hh' + b_hh)

Everything here is differentiable and obvious rather than fast.
"""

import torch
from torch import Tensor
from torch.nn.functional import one_hot

ACTIVATIONS = {
    "RNN_TANH": torch.tanh,
    "RNN_RELU": torch.relu,
    "RNN_SIGMOID": torch.sigmoid,
}


def elman(input, hx, params, mode, has_biases, num_layers, bidirectional, lengths=None):
    """The stack of layers over a padded, time-major batch without dropout.

    Args:
        input: ``(T, B, I)``, or int64 ids ``(T, B)``.
        hx: ``(num_layers * D, B, H)`` or None.
        params: the flat weights in nn.RNN's order.
        lengths: list of ints, or None: every sequence has T steps.

    Returns:
        ``(output, h_n)``; output is zero past each length.
    """
    directions = 2 if bidirectional else 1
    per_direction = 4 if has_biases else 2
    if input.dtype == torch.int64:
        input = one_hot(input, params[0].shape[1]).to(params[0].dtype)
    steps, batch = input.shape[:2]
    lengths = [steps] * batch if lengths is None else [int(n) for n in lengths]
    finals = []
    for layer in range(num_layers):
        outputs = []
        for direction in range(directions):
            index = layer * directions + direction
            weights = params[index * per_direction : (index + 1) * per_direction]
            columns = []
            for b in range(batch):
                x = input[: lengths[b], b]
                h0 = x.new_zeros(weights[1].shape[0]) if hx is None else hx[index, b]
                states = sequence(x.flip(0) if direction else x, h0, weights, mode)
                finals.append(states[-1])
                states = states.flip(0) if direction else states
                pad = states.new_zeros(steps - lengths[b], states.shape[1])
                columns.append(torch.cat([states, pad]))
            outputs.append(torch.stack(columns, 1))
        input = torch.cat(outputs, -1)
    h_n = torch.stack(finals).unflatten(0, (num_layers * directions, batch))
    return input, h_n


def sequence(x: Tensor, h: Tensor, weights: list[Tensor], mode: str) -> Tensor:
    """All states of one sequence ``(T, I)`` from its initial state ``(H)``: ``(T, H)``."""
    W_ih, W_hh, *biases = weights
    states = []
    for x_t in x:
        total = W_ih @ x_t + W_hh @ h
        for bias in biases:
            total = total + bias
        h = ACTIVATIONS[mode](total)
        states.append(h)
    return torch.stack(states)
