"""The character model end to end: training steps and sampling, with our module and with torch's.

The text is the built-in one, or the file that CHARRNN_FAST_BENCH_TEXT names.
"""

import os

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from . import peers
from .common import CELLS, Shape, Side, use_threads

TEXT = os.environ.get("CHARRNN_FAST_BENCH_TEXT")
# The size of the usual first tutorial: 15 different characters.
SENTENCES = "hey how are you good i am fine " * 40
PLAIN = {"embedding_size": 0, "dropout": 0.0, "batch_size": 50, "seq_length": 50}
SIZES = {
    "2x128": {**PLAIN, "num_layers": 2, "hidden_size": 128},
    "1x512": {**PLAIN, "num_layers": 1, "hidden_size": 512},
    "tutorial": {**PLAIN, "num_layers": 1, "hidden_size": 12, "batch_size": 3, "seq_length": 16},
}
CASES = [(cell, size) for cell in CELLS for size in SIZES if (cell, size) != ("GRU", "1x512")]

# Seconds of a turn: some steps in a row, as in training. In a turn of one step all that it reads
# was pushed out of the caches by the other sides, and its threads were asleep.
TURN = 0.05


@pytest.fixture
def trainer_of(tmp_path):
    """A Trainer of one of SIZES, and the losses of its first steps."""
    from charrnn_fast.charlm import Trainer, TrainOptions

    def make(cell, size, backend, steps=5):
        text = TEXT
        if size == "tutorial":
            text = str(tmp_path / "sentences.txt")
            (tmp_path / "sentences.txt").write_text(SENTENCES)
        folder = str(tmp_path / f"run-{len(list(tmp_path.iterdir()))}")
        sizes = {"cell": cell.lower(), **SIZES[size]}
        options = TrainOptions(text=text, out_dir=folder, backend=backend, **sizes)
        trainer = Trainer(options, say=None)
        return trainer, torch.tensor([trainer.train_step() for _ in range(steps)])

    return make


def sides_of(cell):
    """The name of a backend's side."""
    return {"fast": "module", "torch": f"nn.{cell}"}


def shape_of(trainer) -> Shape:
    options = trainer.options
    size = (options.batch_size, options.seq_length, len(trainer.vocabulary), options.hidden_size)
    return Shape(*size)


def plain_loop(cell, trainer):
    """The training of `trainer` as one writes it with nothing but PyTorch: a step, a call.

    One-hot, torch's module, nn.Linear, cross-entropy, clipping and fused AdamW, each as documented
    there.
    """
    from charrnn_fast.charlm.options import learning_rate

    options, V = trainer.options, len(trainer.vocabulary)
    rnn = getattr(nn, cell)(V, options.hidden_size, options.num_layers)
    head = nn.Linear(options.hidden_size, V)
    parameters = [*rnn.parameters(), *head.parameters()]
    for parameter, value in zip(parameters, trainer.model.parameters(), strict=True):
        parameter.data.copy_(value)
    optimizer = torch.optim.AdamW(
        parameters, weight_decay=options.weight_decay, fused=True, lr=options.learning_rate
    )
    batches, count, state = trainer.batches, 0, None

    def step():
        nonlocal count, state
        batch = batches.batch(*divmod(count, len(batches)))
        y, state = rnn(F.one_hot(batch.tokens, V).float(), None if batch.fresh else state)
        state = tuple(s.detach() for s in state) if cell == "LSTM" else state.detach()
        loss = F.cross_entropy(head(y).flatten(0, 1), batch.targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, options.grad_clip)
        optimizer.param_groups[0]["lr"] = learning_rate(options, count, trainer.total_steps)
        optimizer.step()
        count += 1
        return loss.detach()

    return step


@pytest.mark.parametrize(("cell", "size"), CASES)
def bench_training(cell, size, trainer_of, side_by_side, left_out):
    """Our module and torch's in one loop with one optimizer and one text, and a plain loop."""
    left_out(cell != "RNN" and size == "1x512")
    sides, losses = [], {}
    for backend, name in sides_of(cell).items():
        trainer, losses[name] = trainer_of(cell, size, backend)
        ran = {"backward_fused"}  # the head's, of both
        if backend == "fast":
            ran.add("forward_fused")
        sides.append(Side(name, peers.counted(trainer.train_step, *ran), grad=True))
    step = plain_loop(cell, trainer_of(cell, size, "torch", steps=0)[0])
    losses["plain loop"] = torch.stack([step() for _ in range(5)])
    sides.append(Side("plain loop", step, grad=True))
    for name in (f"nn.{cell}", "plain loop"):
        torch.testing.assert_close(losses["module"], losses[name], rtol=1e-4, atol=0)
    shape = shape_of(trainer)
    info = {"characters": shape.B * shape.T}
    side_by_side(f"charlm training {size}", cell, shape, sides, round_time=TURN, **info)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.usefixtures("two_cores")
def bench_training_threads(cell, trainer_of, side_by_side, left_out):
    """Two threads beside one; the losses are the same bits."""
    left_out(cell != "RNN")
    sides, losses = [], []
    for threads in (1, 2):
        use_threads(threads)
        trainer, loss = trainer_of(cell, "2x128", "fast")
        losses.append(loss)
        prepare = lambda threads=threads: use_threads(threads)  # noqa: E731
        name = f"{threads} threads"
        run = peers.fused(trainer.train_step, True)
        sides.append(Side(name, run, None, prepare, True, {"threads": threads}))
    assert torch.equal(*losses)
    shape = shape_of(trainer)
    info = {"characters": shape.B * shape.T}
    side_by_side("charlm training threads", cell, shape, sides, round_time=TURN, **info)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("streams", [1, 64])
@pytest.mark.parametrize("layers", [1, 2])
def bench_sampling(cell, layers, streams, side_by_side, seconds, left_out):
    """Characters drawn by `step`: one call of our op, or one of the model for each character."""
    from charrnn_fast.charlm import ModelConfig, SampleOptions, build_model
    from charrnn_fast.charlm.sample import step, why_stepwise

    left_out(cell != "RNN")
    if cell != "RNN" and layers > 1:
        pytest.skip("one layer tells")
    V, H, N = 65, 128, 2000 if streams == 1 else 200
    torch.manual_seed(0)
    tokens, uniforms = torch.randint(0, V, (streams,)), torch.rand(N, streams)
    sides, drawn = [], {}
    for backend, name in sides_of(cell).items():
        config = ModelConfig(V, H, layers, cell=cell.lower())
        model = build_model(config, backend, "orthogonal", seed=0).eval()

        def run(model=model):
            return step(model, tokens, None, uniforms, SampleOptions())[0]

        with torch.no_grad():
            assert (why_stepwise(model) is None) == (backend == "fast")
            drawn[name] = run()
        sides.append(Side(name, run))
    assert torch.equal(drawn["module"], drawn[f"nn.{cell}"])
    shape, topic = Shape(streams, N, V, H), f"charlm sampling {layers}x{H}"
    side_by_side(topic, cell, shape, sides, budget=seconds / 2, characters=N * streams)
