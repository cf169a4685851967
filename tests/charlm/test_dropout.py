"""Kinds of dropout: what each takes away, when, and for how long."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from charrnn_fast.charlm import ModelConfig, UsageError, build_model
from charrnn_fast.charlm.dropout import LockedDropout

CONFIG = ModelConfig(11, 12, 3, embedding_size=6)
KINDS = {
    "dropout": {"dropout": 0.5},
    "input": {"input_dropout": 0.5},
    "output": {"output_dropout": 0.5},
    "weight": {"weight_dropout": 0.5},
    "locked": {"dropout": 0.5, "locked_dropout": True},
    "all": {
        "dropout": 0.3,
        "input_dropout": 0.3,
        "output_dropout": 0.1,
        "weight_dropout": 0.5,
        "locked_dropout": True,
    },
}


def test_locked_dropout_is_the_same_at_every_step():
    """Zero, or scaled so that the mean stays; each sequence has a mask of its own."""
    layer = LockedDropout(0.25)
    y = layer(torch.ones(9, 50, 40))
    assert torch.equal(y, y[:1].expand_as(y))
    assert y.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert (y[0] == 0).float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert not torch.equal(y[0, 0], y[0, 1])
    assert torch.equal(layer.eval()(y), y)
    assert repr(layer) == "LockedDropout(p=0.25)"


@pytest.mark.parametrize("kind", KINDS)
def test_it_acts_in_training_only(cell, backend, kind):
    """And there the scores differ from time to time, and the gradient still reaches all weights."""
    config = replace(CONFIG, cell=cell, **KINDS[kind])
    model = build_model(config, backend, seed=1)
    plain = build_model(replace(CONFIG, cell=cell), backend, seed=1)
    tokens = torch.randint(11, (20, 4))
    expected, _ = plain(tokens)
    model.eval()
    torch.testing.assert_close(model(tokens)[0], expected)
    model.train()
    first, second = model(tokens)[0], model(tokens)[0]
    assert not torch.equal(first, second)
    assert not torch.equal(first, expected)
    first.logsumexp(-1).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("kind", KINDS)
def test_backends_drop_the_same(cell, kind):
    """The same seed, the same masks: losses of both backends stay together."""
    results = []
    for backend in ("fast", "torch"):
        model = build_model(replace(CONFIG, cell=cell, **KINDS[kind]), backend, seed=1)
        torch.manual_seed(5)
        logits, state = model(torch.arange(44).reshape(11, 4) % 11)
        logits.logsumexp(-1).sum().backward()
        results.append([logits, *state, *(p.grad for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_layer_by_layer_is_the_whole(cell, backend):
    """What locked dropout and weight dropout run in place of the module, without dropping."""
    model = build_model(replace(CONFIG, cell=cell, weight_dropout=1e-12), backend, seed=1)
    tokens = torch.randint(11, (9, 4))
    _, state = model.eval()(tokens)
    expected = model(tokens, state)
    found = model.train()(tokens, state)
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1])


def test_locked_dropout_between_layers():
    """With one mask for all steps: a unit that is dropped has no influence at any step."""
    config = ModelConfig(5, 4, 2, dropout=0.5, locked_dropout=True, output_dropout=0.0)
    model = build_model(config, "torch", seed=1).train()
    seen = []
    model.layer_dropout.register_forward_hook(lambda module, args, y: seen.append((args[0], y)))
    model(torch.randint(5, (7, 3)))
    (before, after), kept = seen[0], None
    kept = after != 0
    assert torch.equal(kept, kept[:1].expand_as(kept))
    assert not kept.all()
    torch.testing.assert_close(after[kept], 2 * before[kept])


def test_weight_dropout_is_of_recurrent_weights_alone():
    """Where the state is zero nothing changes: the first step is the same, the next one not."""
    config = ModelConfig(5, 8, 1, weight_dropout=0.5)
    model = build_model(config, "torch", seed=1)
    tokens = torch.randint(5, (2, 3))
    expected = model.eval()(tokens)[0]
    found = model.train()(tokens)[0]
    torch.testing.assert_close(found[0], expected[0])
    assert not torch.allclose(found[1], expected[1])


def test_stock_dropout_is_that_of_the_module():
    """Without the further kinds the module's own dropout runs, in one call."""
    model = build_model(replace(CONFIG, dropout=0.5), "torch", seed=1)
    assert (model.rnn.dropout, type(model.dropout)) == (0.5, nn.Dropout)
    assert model._layers == ()


def test_input_dropout_needs_an_embedding():
    with pytest.raises(UsageError, match="needs --embedding-size"):
        ModelConfig(5, 4, 1, input_dropout=0.5)
