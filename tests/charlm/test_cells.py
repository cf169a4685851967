"""Everything that a model is used for, with each cell and, where that matters, each backend."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from runs import assert_resumes_as_if_never_stopped, metrics, weights
from safetensors.torch import load_file
from torch import nn

from charrnn_fast.charlm import (
    ByteVocabulary,
    ModelConfig,
    SampleOptions,
    Trainer,
    TrainOptions,
    UsageError,
    Vocabulary,
    build_model,
    evaluate,
    from_pretrained,
    sample,
    save_pretrained,
    train,
)
from charrnn_fast.charlm.checkpoint import weight_shapes
from charrnn_fast.charlm.evaluate import evaluate_stream
from charrnn_fast.charlm.model import rnn_class
from charrnn_fast.charlm.sample import step
from charrnn_fast.cli import main

VOCABULARY = Vocabulary("\n abcdefghijklmnopqrstuvwxyz")
STOCK = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}


def model_of(cell, backend, scale=4.0, **changes):
    """A random model whose choices are far from even."""
    config = ModelConfig(len(VOCABULARY), 24, 2, cell=cell, **changes)
    model = build_model(config, backend, "orthogonal", seed=1, forget_bias=1.0)
    with torch.no_grad():
        model.head.weight *= scale
    return model


@pytest.fixture
def options(options, cell) -> TrainOptions:
    return replace(options, cell=cell)


def test_module_is_that_of_torch(cell, backend):
    """A subclass of torch's, or torch's own; by the seed, the same weights in both."""
    assert issubclass(rnn_class(backend, cell), STOCK[cell])
    model, reference = model_of(cell, backend), model_of(cell, "torch")
    assert type(reference.rnn) is STOCK[cell]
    for (name, a), (other, b) in zip(
        model.state_dict().items(), reference.state_dict().items(), strict=True
    ):
        assert name == other
        assert torch.equal(a, b)


@pytest.mark.parametrize("embedding", [0, 7])
def test_backends_agree(cell, embedding):
    """Scores, states and gradients."""
    tokens, results = torch.randint(len(VOCABULARY), (13, 3)), []
    for backend in ("fast", "torch"):
        model = model_of(cell, backend, embedding_size=embedding)
        state = tuple(torch.full((2, 3, 24), 0.1 * n) for n in range(1, 1 + model.config.states))
        logits, state = model(tokens, state)
        (logits.logsumexp(-1).sum() + sum(part.sum() for part in state)).backward()
        results.append([logits, *state, *(p.grad for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_carrying_the_state_is_reading_on(cell, backend):
    model = model_of(cell, backend)
    tokens = torch.randint(len(VOCABULARY), (9, 3))
    whole, end = model(tokens)
    first, state = model(tokens[:4])
    second, state = model(tokens[4:], state)
    torch.testing.assert_close(torch.cat([first, second]), whole)
    torch.testing.assert_close(state, end)
    assert len(state) == (2 if cell == "lstm" else 1)


def test_only_reading(cell, backend, monkeypatch):
    """In pieces and without scores: the state of the whole."""
    model = model_of(cell, backend)
    tokens = torch.randint(len(VOCABULARY), (50, 2))
    expected = tuple(part.detach() for part in model(tokens)[1])
    monkeypatch.setattr("charrnn_fast.charlm.model.NUMBERS", 2 * 7 * len(VOCABULARY))
    monkeypatch.setattr(type(model.head), "forward", None)
    torch.testing.assert_close(model.read(tokens), expected)


def test_shapes_are_those_of_the_module(cell):
    for more in ({}, {"embedding_size": 6}, {"num_layers": 1}):
        config = replace(ModelConfig(3, 5, 2, cell=cell), **more)
        model = build_model(config, "torch")
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        assert dict(weight_shapes(config)) == expected
        assert config.weights == sum(p.numel() for p in model.parameters())


def test_orthogonal_weights_are_orthogonal_gate_by_gate(cell):
    for gate in model_of(cell, "torch").rnn.weight_hh_l1.split(24):
        torch.testing.assert_close(gate @ gate.T, torch.eye(24))


def test_weights_of_one_hot_inputs_begin_larger(cell):
    """Those of the first layer, where there is no embedding; in every gate, and no other weight."""
    for embedding in (0, 3):
        config = ModelConfig(5, 4, 2, cell=cell, embedding_size=embedding)
        plain = build_model(config, "torch", seed=1).state_dict()
        for name, value in build_model(config, "torch", seed=1, input_scale=8.0).named_parameters():
            larger = name == "rnn.weight_ih_l0" and not embedding
            assert torch.equal(value, plain[name] * (8 if larger else 1)), name


def test_forget_gates_begin_open():
    """Where the two biases of an LSTM's forget gate add up to what was asked for; elsewhere not."""
    rnn = build_model(ModelConfig(5, 4, 2, cell="lstm"), "torch", seed=1, forget_bias=1.5).rnn
    plain = build_model(ModelConfig(5, 4, 2, cell="lstm"), "torch", seed=1).rnn
    for layer in (0, 1):
        both = [getattr(rnn, f"bias_{side}_l{layer}") for side in ("ih", "hh")]
        assert (both[0] + both[1])[4:8].tolist() == [1.5] * 4
        for mine, side in zip(both, ("ih", "hh"), strict=True):
            other = getattr(plain, f"bias_{side}_l{layer}")
            assert torch.equal(mine[:4], other[:4])
            assert torch.equal(mine[8:], other[8:])


@pytest.mark.parametrize("changes", [{}, {"lines": True}, {"bytes": True}])
def test_it_learns(options, backend, changes):
    options = replace(options, backend=backend, max_epochs=6, learning_rate=3e-2, **changes)
    trainer = train(options, say=None)
    losses = [row["train_loss"] for row in metrics(trainer.folder) if "train_loss" in row]
    assert losses[-1] < 0.85 * losses[0]
    assert trainer.progress.finished


def test_backends_train_alike(options):
    """Same weights at the start, same data: losses agree step by step, and so does the text."""
    losses: dict[str, list[torch.Tensor]] = {"fast": [], "torch": []}
    trainers = [
        Trainer(replace(options, backend=b, out_dir=f"{options.out_dir}-{b}"), say=None,
                on_loss=v.append)
        for b, v in losses.items()
    ]  # fmt: skip
    for trainer in trainers:
        trainer.run()
    a, b = (torch.stack(values) for values in losses.values())
    torch.testing.assert_close(a, b, rtol=1e-3, atol=0)
    torch.testing.assert_close(a[:20], b[:20], rtol=1e-4, atol=0)
    texts = [sample(t.model, t.vocabulary, "the ", 200, seed=1) for t in trainers]
    assert texts[0] == texts[1]


def test_first_step_is_plain_pytorch(options, cell):
    """One step of the trainer is the textbook's: one-hot, torch's module, cross-entropy, Adam."""
    trainer = Trainer(replace(options, backend="fast", warmup_iters=0, grad_clip=0.0), say=None)
    plain, V = nn.Module(), len(trainer.vocabulary)
    plain.rnn, plain.head = STOCK[cell](V, 16, 2), nn.Linear(16, V)
    plain.load_state_dict({k: v.clone() for k, v in trainer.model.state_dict().items()})
    optimizer = torch.optim.Adam(plain.parameters(), lr=options.learning_rate)
    batch = trainer.batches.batch(0, 0)
    y, _ = plain.rnn(nn.functional.one_hot(batch.tokens, V).float())
    loss = nn.functional.cross_entropy(plain.head(y).flatten(0, 1), batch.targets.flatten())
    loss.backward()
    optimizer.step()
    torch.testing.assert_close(trainer.train_step(), loss.detach())
    for a, b in zip(trainer.model.parameters(), plain.parameters(), strict=True):
        tight = {"rtol": 1e-4, "atol": 1e-5} if cell == "rnn" else {"rtol": 1e-3, "atol": 2e-5}
        torch.testing.assert_close(a, b, **tight)


@pytest.mark.parametrize(
    "changes",
    [
        {"save_interval": 3},
        {"lines": True},
        {
            "embedding_size": 8,
            "input_dropout": 0.1,
            "dropout": 0.2,
            "output_dropout": 0.3,
            "weight_dropout": 0.2,
            "locked_dropout": True,
            "average": 0.9,
            "beta2": 0.99,
        },
    ],
)
@pytest.mark.parametrize("stop", [1, 13])
def test_resumed_run_is_as_if_never_stopped(options, changes, stop):
    """A run that an exception ends at some step goes on to the same bits, the carried c of an LSTM
    and an average of weights among them."""
    options = replace(options, **{"max_epochs": 2, "save_interval": 4, **changes})
    assert_resumes_as_if_never_stopped(options, stop)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_same_run_for_any_number_of_threads(options, threads):
    options = replace(options, hidden_size=64, batch_size=32, max_iters=4, embedding_size=16)
    runs = []
    for count in {1, threads}:
        folder = f"{options.out_dir}-{count}"
        train(options, threads=count, out_dir=folder, say=None)
        runs.append((weights(folder), metrics(folder)))
    assert all(run == runs[0] for run in runs)


@pytest.mark.parametrize("how", [{}, {"temperature": 0}, {"top_k": 7, "top_p": 0.9}])
def test_backends_draw_the_same_characters(cell, how):
    fast, reference = (
        sample(model_of(cell, b), VOCABULARY, "hello", 500, seed=7, streams=3, **how)
        for b in ("fast", "torch")
    )
    assert fast == reference
    assert [len(text) for text in fast] == [500] * 3


@pytest.mark.parametrize("embedding", [0, 7])
def test_step_draws_the_same_by_op_and_by_loop(cell, embedding):
    """With the state of a text before: the op, where there is one, and the loop."""
    model = model_of(cell, "fast", embedding_size=embedding).eval()
    state = model.read(torch.randint(len(VOCABULARY), (9, 2)))
    tokens, uniforms, options = torch.tensor([3, 9]), torch.rand(300, 2), SampleOptions(0.9, 8, 0.9)
    expected, expected_end = step(model, tokens, state, uniforms, options)  # records gradients
    with torch.no_grad():
        drawn, end = step(model, tokens, state, uniforms, options)
    assert torch.equal(drawn, expected)
    torch.testing.assert_close(end, tuple(part.detach() for part in expected_end))


def test_state_is_carried(cell, backend):
    """Reading the whole text again for every character gives the same ones."""
    model = model_of(cell, backend)
    carried = sample(model, VOCABULARY, "hello", 40, temperature=0)[0]
    text = "hello"
    for _ in range(40):
        logits, _ = model(torch.from_numpy(VOCABULARY.encode(text).astype("int64"))[:, None])
        text += VOCABULARY.decode(logits[-1, 0].argmax())
    assert text == "hello" + carried


def test_streaming_evaluation_is_exact(options, backend):
    """In pieces or at once: the same loss; by streams from zero states: nearly."""
    trainer = train(replace(options, backend=backend, max_epochs=1), say=None)
    ids = trainer.held_out
    whole = evaluate(trainer.model, ids, streams=1, seq_length=10_000)
    pieces, count = evaluate_stream(trainer.model, [ids[:100], ids[100:101], ids[101:]])
    assert count == len(ids) - 1
    assert pieces == pytest.approx(whole, rel=1e-5)
    assert evaluate(trainer.model, ids, streams=1, seq_length=13) == pytest.approx(whole, rel=1e-5)
    assert evaluate(trainer.model, ids, streams=4, seq_length=16) == pytest.approx(whole, rel=0.2)


def test_every_setting_comes_back(tmp_path, cell, backend):
    config = ModelConfig(
        256, 5, 3, dropout=0.25, cell=cell, embedding_size=3, input_dropout=0.5,
        output_dropout=0.0, weight_dropout=0.125, locked_dropout=True,
    )  # fmt: skip
    save_pretrained(tmp_path, build_model(config, backend, seed=1), ByteVocabulary())
    model, vocabulary, _ = from_pretrained(tmp_path, backend)
    assert vocabulary == ByteVocabulary()
    assert model.config == config
    assert isinstance(model.rnn, STOCK[cell])


def test_weights_load_into_plain_modules(tmp_path, cell):
    """No part of this package is needed to use the weights."""
    save_pretrained(tmp_path, model_of(cell, "torch", embedding_size=5), VOCABULARY)
    plain = nn.Module()
    plain.embedding = nn.Embedding(28, 5)
    plain.rnn, plain.head = STOCK[cell](5, 24, 2), nn.Linear(24, 28)
    plain.load_state_dict(load_file(tmp_path / "model.safetensors"))
    tokens = torch.randint(28, (7, 2))
    scores = plain.head(plain.rnn(plain.embedding(tokens))[0])
    torch.testing.assert_close(scores, from_pretrained(tmp_path, "torch").model(tokens)[0])


@pytest.mark.parametrize("version", [1, 2])
def test_what_was_saved_before_there_were_cells(options, trained, version):
    """Neither the model nor the options name a cell: both are of rnn, and the run goes on."""
    path = Path(trained.folder) / "config.json"
    if options.cell != "rnn":
        return
    settings = json.loads(path.read_text())
    known = ("vocab_size", "hidden_size", "num_layers", "nonlinearity", "dropout")
    settings["model"] = {name: settings["model"][name] for name in known}
    new = set(asdict(trained.config)) - set(known)
    new.add("input_scale")
    settings["training"] = {k: v for k, v in settings["training"].items() if k not in new}
    settings["format_version"] = version
    path.write_text(json.dumps(settings))
    assert from_pretrained(trained.folder).model.config == trained.config
    longer = train(out_dir=trained.folder, resume=True, max_epochs=3, say=None)
    assert longer.config.cell == "rnn"
    assert longer.options.input_scale == 1


@pytest.mark.parametrize("embedding", [0, 7])
def test_export(tmp_path, cell, embedding):
    pytest.importorskip("onnxruntime")
    from charrnn_fast.charlm.export import difference_in_onnxruntime, export_onnx

    model = model_of(cell, "fast", embedding_size=embedding)
    export_onnx(model, VOCABULARY, tmp_path / "model.onnx")
    assert difference_in_onnxruntime(model, tmp_path / "model.onnx") < 1e-4


def test_commands(cell, text, tmp_path, capsys):
    """Train by either name of the option, sample, evaluate, report, export and bench; each says
    which cell it is about."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("onnxruntime")
    small = ["--hidden-size", "8", "--batch-size", "4", "--seq-length", "8", "--max-iters", "20"]
    folder = str(tmp_path / "run")
    assert main(["train", str(text), "--model", cell, "--out-dir", folder, *small]) == 0
    assert f"{cell} 2 x 8: " in capsys.readouterr().out
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    assert settings["model"]["cell"] == settings["training"]["cell"] == cell
    assert main(["train", "--resume", folder, "--max-iters", "25"]) == 0
    texts = []
    for backend in ("fast", "torch"):
        capsys.readouterr()
        assert main(["sample", folder, "--seed", "1", "--backend", backend]) == 0
        texts.append(capsys.readouterr().out)
        assert main(["eval", folder, "--backend", backend]) == 0
    assert texts[0] == texts[1]
    assert main(["report", folder]) == main(["export", folder]) == 0
    assert f"{cell} 2 x 8" in (tmp_path / "run" / "report.html").read_text()
    capsys.readouterr()
    assert main(["bench", str(text), "--cell", cell, "--seconds", "0.05", *small]) == 0
    shown = capsys.readouterr().out
    assert f"{cell} 2 x 8" in shown
    assert f"torch.nn.{cell.upper()}" in shown
    assert main(["demo", "--cell", cell, "--max-iters", "3", "--out-dir", folder + "-demo"]) == 0
    shown = capsys.readouterr().out
    assert f"times torch.nn.{cell.upper()}" in shown
    assert "drift apart" in shown


def test_option_of_another_cell(options):
    other = {"rnn": {"forget_bias": 2.0}, "gru": {"forget_bias": 0.0}, "lstm": {}}[options.cell]
    if options.cell != "rnn":
        other = other or {"nonlinearity": "relu"}
    with pytest.raises(UsageError, match="is for --cell (rnn|lstm)"):
        replace(options, **other)


GRADIENTS = """
import torch
from charrnn_fast.charlm import Trainer, TrainOptions
trainer = Trainer({options!r}, say=None)
for _ in range(3):
    trainer.train_step()
torch.save([p.grad for p in trainer.model.parameters()], "{folder}/grads-%d" % trainer.group.rank)
trainer.leave_group()
"""


def test_two_processes_have_the_gradients_of_one(options, tmp_path):
    """Also with the modules of single layers that locked dropout needs."""
    if options.cell != "rnn":
        options = replace(options, locked_dropout=True, dropout=1e-9)
    options = replace(options, grad_clip=0.0)
    one = Trainer(replace(options, out_dir=options.out_dir + "-one"), say=None)
    for _ in range(3):
        one.train_step()
    script = tmp_path / "script.py"
    script.write_text(GRADIENTS.format(options=options, folder=tmp_path))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    done = subprocess.run([*command, str(script)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"grads-{n}", weights_only=True) for n in (0, 1))
    for parameter, a, b in zip(one.model.parameters(), first, second, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, parameter.grad, rtol=1e-4, atol=1e-6)
