"""The ONNX step model, run in ONNX Runtime beside ours."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from charrnn_fast.charlm import (
    ByteVocabulary,
    ModelConfig,
    SampleOptions,
    UsageError,
    Vocabulary,
    build_model,
    sample,
)
from charrnn_fast.charlm.export import difference_in_onnxruntime, export_onnx
from charrnn_fast.charlm.sample import draw

onnx = pytest.importorskip("onnx", reason="needs: pip install onnx")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs: pip install onnxruntime")

VOCABULARY = Vocabulary("\n abcdefghijklmnopqrstuvwxyz")


def session(path):
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("nonlinearity", ["tanh", "relu", "sigmoid"])
def test_scores_are_the_same(tmp_path, layers, nonlinearity):
    """Over 200 characters, each read with the state of the call before."""
    config = ModelConfig(len(VOCABULARY), 24, layers, nonlinearity, 0.5)
    model = build_model(config, "fast", seed=1)
    export_onnx(model, VOCABULARY, tmp_path / "model.onnx")
    assert difference_in_onnxruntime(model, tmp_path / "model.onnx") < 2e-5


def test_the_comparison_sees_a_difference(tmp_path):
    config = ModelConfig(len(VOCABULARY), 24, 2)
    export_onnx(build_model(config, "fast", seed=1), VOCABULARY, tmp_path / "model.onnx")
    other = build_model(config, "fast", seed=2)
    assert difference_in_onnxruntime(other, tmp_path / "model.onnx") > 0.1


def test_it_writes_the_same_text(tmp_path):
    """With the file alone, the vocabulary from its metadata: thousands of characters."""
    model = build_model(ModelConfig(len(VOCABULARY), 24, 2), "fast", "orthogonal", seed=1)
    with torch.no_grad():
        model.head.weight *= 4
    export_onnx(model, VOCABULARY, tmp_path / "model.onnx")
    onnx_model = session(tmp_path / "model.onnx")
    metadata = onnx_model.get_modelmeta().custom_metadata_map
    vocabulary = Vocabulary.from_json(json.loads(metadata["vocabulary"]))
    assert vocabulary == VOCABULARY
    layers, _, hidden = onnx_model.get_inputs()[1].shape
    assert (layers, hidden) == (2, 24)

    length, options = 3000, SampleOptions(0.8, top_k=9)
    uniforms = torch.rand(length, 1, generator=torch.Generator().manual_seed(7))
    state, tokens, text = np.zeros((layers, 1, hidden), np.float32), vocabulary.encode("a"), ""
    for row in uniforms:
        inputs = {"tokens": tokens.astype(np.int64), "state": state}
        logits, state = onnx_model.run(None, inputs)
        tokens = draw(torch.from_numpy(logits), row, options).numpy()
        text += vocabulary.decode(tokens)
    assert [text] == sample(
        model, vocabulary, "a", length, temperature=0.8, top_k=9, seed=7, streams=1
    )


def test_bytes(tmp_path):
    model = build_model(ModelConfig(256, 8, 1), "torch", seed=1)
    export_onnx(model, ByteVocabulary(), tmp_path / "model.onnx")
    metadata = session(tmp_path / "model.onnx").get_modelmeta().custom_metadata_map
    assert Vocabulary.from_json(json.loads(metadata["vocabulary"])) == ByteVocabulary()


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(UsageError, match="pip install onnx"):
        export_onnx(build_model(ModelConfig(28, 8, 1), "torch"), VOCABULARY, tmp_path / "x")
    assert not list(tmp_path.iterdir())
