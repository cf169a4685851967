"""The model as an ONNX graph that reads one character a call, its state going in and coming out.

    tokens [B] int64, state [layers, B, H]  ->  logits [B, V], next_state [layers, B, H]

The graph's metadata holds the vocabulary (``vocabulary``, as in vocab.json), so the file is enough
to draw text with.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .checkpoint import config_of, write_atomic
from .errors import UsageError
from .model import CharRNN
from .vocabulary import Vocabulary

OPSET, IR_VERSION = 17, 8  # what ONNX Runtime has read since 2022


def to_onnx(model: CharRNN, vocabulary: Vocabulary) -> bytes:
    """A serialised ONNX model of one step. UsageError where the package onnx is missing."""
    try:
        from onnx import TensorProto, checker, helper, numpy_helper
    except ImportError:
        raise UsageError("the export needs: pip install onnx") from None

    config = config_of(model)
    weights = {n: t.detach().cpu().float().numpy() for n, t in model.state_dict().items()}
    constants: dict[str, np.ndarray[Any, Any]] = {
        "head.weight": weights["head.weight"],
        "head.bias": weights["head.bias"],
    }
    nodes, states, x = [], [], ""
    for i in range(config.num_layers):
        w = {part: weights[f"rnn.{part}_l{i}"] for part in ("weight_ih", "weight_hh")}
        bias = weights[f"rnn.bias_ih_l{i}"] + weights[f"rnn.bias_hh_l{i}"]
        constants |= {f"index{i}": np.array(i), f"bias{i}": bias, f"W_hh{i}": w["weight_hh"]}
        nodes.append(helper.make_node("Gather", ["state", f"index{i}"], [f"h{i}"], axis=0))
        if i == 0:  # the product with a one-hot vector is a row
            constants["W_ih0"] = np.ascontiguousarray(w["weight_ih"].T)
            nodes.append(helper.make_node("Gather", ["W_ih0", "tokens"], ["a0"], axis=0))
        else:
            constants[f"W_ih{i}"] = w["weight_ih"]
            nodes.append(helper.make_node("Gemm", [x, f"W_ih{i}"], [f"a{i}"], transB=1))
        recurrent = [f"h{i}", f"W_hh{i}", f"bias{i}"]
        nodes.append(helper.make_node("Gemm", recurrent, [f"r{i}"], transB=1))
        nodes.append(helper.make_node("Add", [f"a{i}", f"r{i}"], [f"s{i}"]))
        x = f"y{i}"
        nodes.append(helper.make_node(config.nonlinearity.capitalize(), [f"s{i}"], [x]))
        constants["first_axis"] = np.array([0])
        nodes.append(helper.make_node("Unsqueeze", [x, "first_axis"], [f"n{i}"]))
        states.append(f"n{i}")
    nodes.append(helper.make_node("Concat", states, ["next_state"], axis=0))
    nodes.append(helper.make_node("Gemm", [x, "head.weight", "head.bias"], ["logits"], transB=1))

    V, H, layers = config.vocab_size, config.hidden_size, config.num_layers
    f32, i64 = TensorProto.FLOAT, TensorProto.INT64
    graph = helper.make_graph(
        nodes,
        "charrnn_step",
        [
            helper.make_tensor_value_info("tokens", i64, ["B"]),
            helper.make_tensor_value_info("state", f32, [layers, "B", H]),
        ],
        [
            helper.make_tensor_value_info("logits", f32, ["B", V]),
            helper.make_tensor_value_info("next_state", f32, [layers, "B", H]),
        ],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
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


def export_onnx(model: CharRNN, vocabulary: Vocabulary, path: str | Path) -> None:
    """Writes ``to_onnx`` of a model to a file."""
    write_atomic(Path(path), to_onnx(model, vocabulary))


@torch.no_grad()
def difference_in_onnxruntime(model: CharRNN, path: str | Path, steps: int = 200) -> float:
    """Runs a file of ``export_onnx`` in ONNX Runtime over random characters, the state going round.

    Returns the largest absolute difference from the model's own scores. ImportError without it.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    config = config_of(model)
    tokens = torch.randint(
        config.vocab_size, (steps, 3), generator=torch.Generator().manual_seed(0)
    )
    expected, _ = model.to("cpu").eval()(tokens)
    state = np.zeros((config.num_layers, 3, config.hidden_size), np.float32)
    largest = 0.0
    for row, scores in zip(tokens.numpy(), expected.numpy(), strict=True):
        logits, state = session.run(None, {"tokens": row, "state": state})
        largest = max(largest, float(np.abs(logits - scores).max()))
    return largest
