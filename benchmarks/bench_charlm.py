"""The character model end to end: training steps and sampling, with our module and with nn.RNN."""

import pytest
import torch

from .common import Shape, Side

SIDES = {"fast": "module", "torch": "nn.RNN"}


@pytest.mark.parametrize(("layers", "hidden"), [(2, 128), (1, 512)], ids=["2x128", "1x512"])
def bench_training(layers, hidden, tmp_path, side_by_side):
    from charrnn_fast.charlm import Trainer, TrainOptions

    sides, losses = [], {}
    for backend, name in SIDES.items():
        options = TrainOptions(
            out_dir=str(tmp_path / backend), backend=backend, hidden_size=hidden, num_layers=layers
        )
        trainer = Trainer(options, say=None)
        losses[name] = torch.stack([trainer.train_step() for _ in range(5)])
        sides.append(Side(name, trainer.train_step, grad=True))
    torch.testing.assert_close(losses["module"], losses["nn.RNN"], rtol=1e-4, atol=0)
    shape = Shape(options.batch_size, options.seq_length, len(trainer.vocabulary), hidden)
    side_by_side(f"charlm training {layers}x{hidden}", shape, sides, characters=shape.B * shape.T)


@pytest.mark.parametrize("streams", [1, 16])
def bench_sampling(streams, side_by_side):
    from charrnn_fast.charlm import (
        ModelConfig,
        Vocabulary,
        build_model,
        builtin_text,
        stream,
    )

    vocabulary = Vocabulary.from_text(builtin_text())
    length, sides, drawn = 100, [], {}
    for backend, name in SIDES.items():
        model = build_model(ModelConfig(len(vocabulary)), backend, seed=0)

        def run(model=model):
            return list(stream(model, vocabulary, "The ", length, seed=0, streams=streams))

        drawn[name] = torch.cat(run())
        sides.append(Side(name, run))
    assert torch.equal(drawn["module"], drawn["nn.RNN"])
    shape = Shape(streams, length, len(vocabulary), 128)
    side_by_side("charlm sampling 2x128", shape, sides, characters=streams * length)
