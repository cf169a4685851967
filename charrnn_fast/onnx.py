"""What ``torch.onnx.export(dynamo=True)`` writes for our modules: ONNX's recurrent operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import dropout, embedding


class _Operator(NamedTuple):
    name: str
    gates: tuple[int, ...]  # ONNX's gates, each by its place among torch's
    attributes: dict[str, Any]  # lists are for one direction
    states: int  # h, or h and c


_OPERATORS = {
    "RNN_TANH": _Operator("RNN", (0,), {"activations": ["Tanh"]}, 1),
    "RNN_RELU": _Operator("RNN", (0,), {"activations": ["Relu"]}, 1),
    "RNN_SIGMOID": _Operator("RNN", (0,), {"activations": ["Sigmoid"]}, 1),
    # torch: i f g o; ONNX: i o f c.
    "LSTM": _Operator("LSTM", (0, 3, 1, 2), {}, 2),
    # torch: r z n; ONNX: z r h, with r after the product as torch has it.
    "GRU": _Operator("GRU", (1, 0, 2), {"linear_before_reset": 1}, 1),
}


def _rnn_layer(
    input: Tensor,
    states: list[Tensor | None],
    weights: Sequence[Tensor],
    lengths: Tensor | None,
    operator: _Operator,
    has_biases: bool,
) -> list[Tensor]:
    """Output and final states of one layer: one node."""
    per_direction = 4 if has_biases else 2
    D = len(weights) // per_direction
    H = weights[1].shape[1]
    T, B = input.shape[:2]

    def reordered(weight: Tensor) -> Tensor:
        # By slices, which the exporter folds into constants.
        gates = [weight[gate * H : (gate + 1) * H] for gate in operator.gates]
        return torch.cat(gates) if len(gates) > 1 else weight

    weights = [reordered(weight) for weight in weights]
    bias = None
    if has_biases:
        bias = torch.stack([torch.cat(list(weights[i + 2 : i + 4])) for i in range(0, 4 * D, 4)])
    attributes = {k: v * D if isinstance(v, list) else v for k, v in operator.attributes.items()}
    dtype = weights[0].dtype
    y, *after = torch.onnx.ops.symbolic_multi_out(
        operator.name,
        (
            input,
            torch.stack(list(weights[::per_direction])),
            torch.stack(list(weights[1::per_direction])),
            bias,
            None if lengths is None else lengths.to(torch.int32),
            *states[: operator.states],
        ),
        attrs={
            **attributes,
            "direction": "bidirectional" if D == 2 else "forward",
            "hidden_size": H,
        },
        dtypes=(dtype,) * (1 + operator.states),
        shapes=((T, D, B, H), *[(D, B, H)] * operator.states),
    )
    return [y.transpose(1, 2).flatten(2), *after]


def rnn(
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    params: Sequence[Tensor],
    lengths: Tensor | None,
    resets: Tensor | None,
    mode: str,
    has_biases: bool,
    num_layers: int,
    p: float,
    train: bool,
    bidirectional: bool,
    cells: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The stack of layers, as ``csrc/ops.cpp`` has it. Token ids pick one-hot rows by a ``Gather``.

    Raises:
        NotImplementedError: ONNX's operators have neither resets nor the cell states of each step.
    """
    for name, asked in (("resets", resets is not None), ("return_cell_states", cells)):
        if asked:
            raise NotImplementedError(f"ONNX's {_OPERATORS[mode].name} operator has no {name}")
    D = 2 if bidirectional else 1
    per_layer = D * (4 if has_biases else 2)
    if input.dtype == torch.int64:
        input = embedding(input, torch.eye(params[0].shape[1], dtype=params[0].dtype))
    states: list[list[Tensor]] = []
    for layer in range(num_layers):
        if layer > 0 and p:
            input = dropout(input, p, train)
        own = slice(layer * D, (layer + 1) * D)
        input, *after = _rnn_layer(
            input,
            [None if state is None else state[own] for state in (hx, cx)],
            params[layer * per_layer : (layer + 1) * per_layer],
            lengths,
            _OPERATORS[mode],
            has_biases,
        )
        states.append(after)
    none = input.new_empty(0)
    h_n, c_n = ([torch.cat(list(state)) for state in zip(*states, strict=True)] + [none])[:2]
    return input, h_n, c_n, none
