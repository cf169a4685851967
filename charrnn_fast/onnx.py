"""What ``torch.onnx.export(dynamo=True)`` writes for our modules: the ONNX ``RNN`` operator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import dropout, embedding

# ONNX names activations as functions, one for each direction.
_ACTIVATIONS = {"RNN_TANH": "Tanh", "RNN_RELU": "Relu", "RNN_SIGMOID": "Sigmoid"}


def rnn_layer(
    input: Tensor,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    lengths: Tensor | None,
    mode: str,
    has_biases: bool,
) -> tuple[Tensor, Tensor]:
    """One layer, as one ``RNN`` node. Token ids pick their one-hot rows by a ``Gather``."""
    per_direction = 4 if has_biases else 2
    D = len(weights) // per_direction
    H, I = weights[0].shape
    if input.dtype == torch.int64:
        input = embedding(input, torch.eye(I, dtype=weights[0].dtype))
    T, B = input.shape[:2]
    bias = None
    if has_biases:
        biases = [torch.cat(list(weights[i + 2 : i + 4])) for i in range(0, 4 * D, 4)]
        bias = torch.stack(biases)
    y, h_n = torch.onnx.ops.symbolic_multi_out(
        "RNN",
        (
            input,
            torch.stack(list(weights[::per_direction])),
            torch.stack(list(weights[1::per_direction])),
            bias,
            None if lengths is None else lengths.to(torch.int32),
            hx,
        ),
        attrs={
            "activations": [_ACTIVATIONS[mode]] * D,
            "direction": "bidirectional" if D == 2 else "forward",
            "hidden_size": H,
        },
        dtypes=(weights[0].dtype, weights[0].dtype),
        shapes=((T, D, B, H), (D, B, H)),
    )
    return y.transpose(1, 2).flatten(2), h_n


def rnn(
    input: Tensor,
    hx: Tensor | None,
    params: Sequence[Tensor],
    lengths: Tensor | None,
    mode: str,
    has_biases: bool,
    num_layers: int,
    p: float,
    train: bool,
    bidirectional: bool,
) -> tuple[Tensor, Tensor]:
    """The stack of layers, as ``csrc/ops.cpp`` has it."""
    D = 2 if bidirectional else 1
    per_layer = D * (4 if has_biases else 2)
    states = []
    for layer in range(num_layers):
        if layer > 0 and p:
            input = dropout(input, p, train)
        h0 = None if hx is None else hx[layer * D : (layer + 1) * D]
        weights = params[layer * per_layer : (layer + 1) * per_layer]
        input, h_n = rnn_layer(input, h0, weights, lengths, mode, has_biases)
        states.append(h_n)
    return input, torch.cat(states)
