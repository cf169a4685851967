"""The loss of a model while it is being trained; test_cells.py has that of texts in pieces."""

from __future__ import annotations

from dataclasses import replace

import pytest

from charrnn_fast.charlm import Trainer


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
