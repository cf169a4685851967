"""The loss of a model: the same in pieces, by streams and while it is being trained."""

from __future__ import annotations

from dataclasses import replace

import pytest

from charrnn_fast.charlm import Trainer, evaluate
from charrnn_fast.charlm.evaluate import evaluate_stream


def test_streaming_evaluation_is_exact(trained, backend):
    """In pieces or at once, by streams of one: the same loss."""
    ids = trained.held_out
    whole = evaluate(trained.model, ids, streams=1, seq_length=10_000)
    pieces, count = evaluate_stream(trained.model, [ids[:100], ids[100:101], ids[101:]])
    assert count == len(ids) - 1
    assert pieces == pytest.approx(whole, rel=1e-5)
    assert evaluate(trained.model, ids, streams=1, seq_length=13) == pytest.approx(whole, rel=1e-5)
    assert evaluate(trained.model, ids, streams=4, seq_length=16) == pytest.approx(whole, rel=0.2)


@pytest.mark.parametrize("lines", [False, True])
def test_evaluation_knows_no_dropout(options, lines):
    """Also of a model that is being trained, which goes on in its mode."""
    trainer = Trainer(replace(options, dropout=0.9, lines=lines), say=None)
    trainer.model.train()
    while_training = trainer.evaluate()
    assert trainer.model.training
    trainer.model.eval()
    assert while_training == trainer.evaluate()
    assert not trainer.model.training
