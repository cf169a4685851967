"""The model as an ONNX graph of one step: a character and the state in, scores and the state out.

    tokens [B] int64, state [layers, B, H]  ->  logits [B, V], next_state [layers, B, H]

An LSTM has ``cell_state`` and ``next_cell_state`` besides.
The graph's metadata holds the vocabulary (``vocabulary``, as in vocab.json), so the file is enough
to draw text with.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .checkpoint import write_atomic
from .errors import UsageError
from .model import CharRNN
from .vocabulary import Vocabulary

STATES = ("state", "cell_state")
OPSET, IR_VERSION = 17, 8  # what ONNX Runtime has read since 2022


def to_onnx(model: CharRNN, vocabulary: Vocabulary) -> bytes:
    """A serialised ONNX model of one step. UsageError where the package onnx is missing."""
    try:
        from onnx import TensorProto, checker, helper, numpy_helper
    except ImportError:
        raise UsageError("the export needs: pip install onnx") from None

    config = model.config
    layers = Graph(model, helper.make_node)
    x = layers.build()
    layers.node("Gemm", [x, "head.weight", "head.bias"], "logits", transB=1)

    V, H, L = config.vocab_size, config.hidden_size, config.num_layers
    f32, i64 = TensorProto.FLOAT, TensorProto.INT64
    states = STATES[: config.states]
    graph = helper.make_graph(
        layers.nodes,
        "charrnn_step",
        [
            helper.make_tensor_value_info("tokens", i64, ["B"]),
            *(helper.make_tensor_value_info(name, f32, [L, "B", H]) for name in states),
        ],
        [
            helper.make_tensor_value_info("logits", f32, ["B", V]),
            *(helper.make_tensor_value_info(f"next_{name}", f32, [L, "B", H]) for name in states),
        ],
        [numpy_helper.from_array(array, name) for name, array in layers.constants.items()],
    )
    proto = helper.make_model(
        graph,
        producer_name="charrnn_fast",
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
    )
    helper.set_model_props(proto, {"vocabulary": json.dumps(vocabulary.to_json())})
    checker.check_model(proto, full_check=True)
    content: bytes = proto.SerializeToString()
    return content


class Graph:
    """The nodes of one step of a model's layers, each named after what it computes."""

    def __init__(self, model: CharRNN, make_node: Callable[..., Any]) -> None:
        self.config, self.make_node = model.config, make_node
        self.weights = {n: t.detach().cpu().float().numpy() for n, t in model.state_dict().items()}
        self.constants: dict[str, np.ndarray[Any, Any]] = {
            "head.weight": self.weights["head.weight"],
            "head.bias": self.weights["head.bias"],
            "first_axis": np.array([0]),
        }
        self.nodes: list[Any] = []

    def node(self, kind: str, inputs: list[str], *outputs: str, **attributes: Any) -> str:
        self.nodes.append(self.make_node(kind, inputs, list(outputs), **attributes))
        return outputs[0]

    def build(self) -> str:
        """All layers; returns the name of the last one's output."""
        x, ends = "", []
        for i in range(self.config.num_layers):
            before = []
            for name in STATES[: self.config.states]:
                self.constants[f"index{i}"] = np.array(i)
                before.append(self.node("Gather", [name, f"index{i}"], f"{name}{i}", axis=0))
            after = getattr(self, "_" + self.config.cell)(i, x, *before)
            x = after[0]
            ends.append([self.node("Unsqueeze", [a, "first_axis"], f"{a}_row") for a in after])
        for name, rows in zip(STATES, zip(*ends, strict=True), strict=False):
            self.node("Concat", list(rows), f"next_{name}", axis=0)
        return x

    def _rnn(self, i: int, x: str, h: str) -> list[str]:
        total = self.node("Add", [*self._products(i, x, h)], f"s{i}")
        return [self.node(self.config.nonlinearity.capitalize(), [total], f"y{i}")]

    def _lstm(self, i: int, x: str, h: str, c: str) -> list[str]:
        total = self.node("Add", [*self._products(i, x, h)], f"s{i}")
        self.node("Split", [total], *(f"s{i}{gate}" for gate in "ifgo"), axis=1)
        gates = {gate: self.node("Sigmoid", [f"s{i}{gate}"], f"{gate}{i}") for gate in "ifo"}
        gates["g"] = self.node("Tanh", [f"s{i}g"], f"g{i}")
        kept = self.node("Mul", [gates["f"], c], f"kept{i}")
        new = self.node("Mul", [gates["i"], gates["g"]], f"new{i}")
        end = self.node("Add", [kept, new], f"c{i}")
        return [self.node("Mul", [gates["o"], self.node("Tanh", [end], f"t{i}")], f"y{i}"), end]

    def _gru(self, i: int, x: str, h: str) -> list[str]:
        for side, product in zip("ah", self._products(i, x, h), strict=True):
            self.node("Split", [product], *(f"{side}{i}{gate}" for gate in "rzn"), axis=1)
        for gate in "rz":
            total = self.node("Add", [f"a{i}{gate}", f"h{i}{gate}"], f"s{i}{gate}")
            self.node("Sigmoid", [total], f"{gate}{i}")
        reset = self.node("Mul", [f"r{i}", f"h{i}n"], f"reset{i}")
        n = self.node("Tanh", [self.node("Add", [f"a{i}n", reset], f"s{i}n")], f"n{i}")
        part = self.node("Mul", [f"z{i}", self.node("Sub", [h, n], f"from{i}")], f"part{i}")
        return [self.node("Add", [n, part], f"y{i}")]

    def _products(self, i: int, x: str, h: str) -> tuple[str, str]:
        """``x W_ih' + b_ih`` and ``h W_hh' + b_hh``; the first layer's x is a row of a table."""
        w = {
            part: self.weights[f"rnn.{part}_l{i}"]
            for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        }
        names = {part: f"{part}{i}" for part in w}
        if i == 0:  # the product with a one-hot vector, or of an embedding, is a row
            table = w["weight_ih"].T
            if self.config.embedding_size:
                table = self.weights["embedding.weight"] @ table
            w["weight_ih"] = table + w["bias_ih"]
            del w["bias_ih"]
            first = self.node("Gather", [names["weight_ih"], "tokens"], "a0", axis=0)
        else:
            inputs = [x, names["weight_ih"], names["bias_ih"]]
            first = self.node("Gemm", inputs, f"a{i}", transB=1)
        self.constants |= {names[part]: np.ascontiguousarray(array) for part, array in w.items()}
        inputs = [h, names["weight_hh"], names["bias_hh"]]
        return first, self.node("Gemm", inputs, f"h{i}", transB=1)


def export_onnx(model: CharRNN, vocabulary: Vocabulary, path: str | Path) -> None:
    """Writes ``to_onnx`` of a model to a file."""
    write_atomic(Path(path), to_onnx(model, vocabulary))


@torch.no_grad()
def difference_in_onnxruntime(model: CharRNN, path: str | Path, steps: int = 200) -> float:
    """Runs a file of ``export_onnx`` in ONNX Runtime on random characters, feeding the state back.

    Returns the largest absolute difference from the model's own scores. ImportError without it.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    config = model.config
    tokens = torch.randint(
        config.vocab_size, (steps, 3), generator=torch.Generator().manual_seed(0)
    )
    expected, _ = model.to("cpu").eval()(tokens)
    shape = (config.num_layers, 3, config.hidden_size)
    names = STATES[: config.states]
    states = [np.zeros(shape, np.float32) for _ in names]
    largest = 0.0
    for row, scores in zip(tokens.numpy(), expected.numpy(), strict=True):
        inputs = {"tokens": row, **dict(zip(names, states, strict=True))}
        logits, *states = session.run(None, inputs)
        largest = max(largest, float(np.abs(logits - scores).max()))
    return largest
