"""The character model end to end: training steps and sampling, with our module and with nn.RNN.

The text is the built-in one, or the file that CHARRNN_FAST_BENCH_TEXT names.
"""

import os

import pytest
import torch

from .common import Shape, Side, use_threads

SIDES = {"fast": "module", "torch": "nn.RNN"}
TEXT = os.environ.get("CHARRNN_FAST_BENCH_TEXT")
# The size of the usual first tutorial: 15 different characters.
SENTENCES = "hey how are you good i am fine " * 40
SIZES = {
    "2x128": {"num_layers": 2, "hidden_size": 128},
    "1x512": {"num_layers": 1, "hidden_size": 512},
    "tutorial": {"num_layers": 1, "hidden_size": 12, "batch_size": 3, "seq_length": 16},
}


@pytest.fixture
def trainer_of(tmp_path):
    """A Trainer of one of SIZES, and the losses of its first five steps."""
    from charrnn_fast.charlm import Trainer, TrainOptions

    def make(size, backend):
        text = TEXT
        if size == "tutorial":
            text = str(tmp_path / "sentences.txt")
            (tmp_path / "sentences.txt").write_text(SENTENCES)
        folder = str(tmp_path / f"run-{len(list(tmp_path.iterdir()))}")
        options = TrainOptions(text=text, out_dir=folder, backend=backend, **SIZES[size])
        trainer = Trainer(options, say=None)
        return trainer, torch.stack([trainer.train_step() for _ in range(5)])

    return make


def shape_of(trainer) -> Shape:
    options = trainer.options
    size = (options.batch_size, options.seq_length, len(trainer.vocabulary), options.hidden_size)
    return Shape(*size)


@pytest.mark.parametrize("size", SIZES)
def bench_training(size, trainer_of, side_by_side):
    """Both sides with one loop, one optimizer (fused AdamW) and one text: the module differs."""
    sides, losses = [], {}
    for backend, name in SIDES.items():
        trainer, losses[name] = trainer_of(size, backend)
        sides.append(Side(name, trainer.train_step, grad=True))
    torch.testing.assert_close(losses["module"], losses["nn.RNN"], rtol=1e-4, atol=0)
    shape = shape_of(trainer)
    side_by_side(f"charlm training {size}", shape, sides, characters=shape.B * shape.T)


@pytest.mark.usefixtures("two_cores")
def bench_training_threads(trainer_of, side_by_side):
    """Two threads beside one; the losses are the same bits."""
    sides, losses = [], []
    for threads in (1, 2):
        use_threads(threads)
        trainer, loss = trainer_of("2x128", "fast")
        losses.append(loss)
        prepare = lambda threads=threads: use_threads(threads)  # noqa: E731
        name = f"{threads} threads"
        sides.append(Side(name, trainer.train_step, None, prepare, True, {"threads": threads}))
    assert torch.equal(*losses)
    shape = shape_of(trainer)
    side_by_side("charlm training threads", shape, sides, characters=shape.B * shape.T)


@pytest.mark.parametrize("streams", [1, 64])
@pytest.mark.parametrize("layers", [1, 2])
def bench_sampling(layers, streams, side_by_side):
    """Characters drawn by `step`: one call of our op, or one of the model for each character."""
    from charrnn_fast.charlm import ModelConfig, SampleOptions, build_model
    from charrnn_fast.charlm.sample import step, why_stepwise

    V, H, N = 65, 128, 2000 if streams == 1 else 200
    torch.manual_seed(0)
    tokens, uniforms = torch.randint(0, V, (streams,)), torch.rand(N, streams)
    sides, drawn = [], {}
    for backend, name in SIDES.items():
        model = build_model(ModelConfig(V, H, layers), backend, "orthogonal", seed=0).eval()

        def run(model=model):
            return step(model, tokens, None, uniforms, SampleOptions())[0]

        with torch.no_grad():
            assert (why_stepwise(model) is None) == (backend == "fast")
            drawn[name] = run()
        sides.append(Side(name, run))
    assert torch.equal(drawn["module"], drawn["nn.RNN"])
    shape = Shape(streams, N, V, H)
    side_by_side(f"charlm sampling {layers}x{H}", shape, sides, characters=N * streams)
