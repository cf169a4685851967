"""The main job from end to end: train, measure, save, sample, and compare with torch's module."""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from .model import Cell, bits
from .options import DEFAULT_CELL, TrainOptions
from .sample import sample
from .train import Trainer

COMPARED = 100  # steps whose losses must agree; later ones drift apart, as rounding errors do
AGREEMENT = 1e-4  # relative


def demo(
    out_dir: str | None = None,
    max_epochs: int = 5,
    max_iters: int = 0,
    cell: Cell = DEFAULT_CELL,
) -> None:
    """Trains both backends on the built-in text and prints them side by side."""
    name = f"torch.nn.{cell.upper()}"
    root = Path(out_dir or tempfile.mkdtemp(prefix="charrnn-fast-demo-"))
    options = TrainOptions(
        max_epochs=max_epochs, max_iters=max_iters, cell=cell, out_dir=str(root / "fast")
    )
    print(f"1. Training charrnn_fast.{cell.upper()} on Python's own documentation ({root})")
    fast, fast_losses = train(options)
    fast_val = fast.progress.val_loss
    print(f"   held out: {bits(fast_val):.4f} bits/character ({fast_val:.4f} nats)")

    print("2. A sample, temperature 0.8")
    text = sample(fast.model, fast.vocabulary, "The ", 300, temperature=0.8, seed=1)[0]
    print("\n".join("   | " + line for line in ("The " + text).splitlines()))

    print(f"3. The same steps with {name}: same initial weights, same data")
    reference, torch_losses = train(replace(options, backend="torch", out_dir=str(root / "torch")))
    torch_val = reference.progress.val_loss
    fast_speed, torch_speed = speed(fast), speed(reference)

    n = min(COMPARED, len(fast_losses))
    error = ((fast_losses - torch_losses).abs() / torch_losses.abs())[:n].max().item()
    print(f"\n{'':32} {'charrnn_fast':>14} {name:>14}")
    print(f"{'characters/s, training':32} {fast_speed:14,.0f} {torch_speed:14,.0f}")
    print(f"{'held out, bits/character':32} {bits(fast_val):14.4f} {bits(torch_val):14.4f}")
    print(f"{'loss of the last step, nats':32} {fast_losses[-1]:14.4f} {torch_losses[-1]:14.4f}")
    print(f"speed: {fast_speed / torch_speed:.2f} times {name}, "
          f"{torch.get_num_threads()} threads of {os.cpu_count()} cores")  # fmt: skip
    verdict = "agree" if error <= AGREEMENT else "DO NOT AGREE"
    print(f"losses {verdict}: largest relative difference {error:.1e} "
          f"over the first {n} steps (at most {AGREEMENT:.0e})")  # fmt: skip
    print(f"The model is in {options.out_dir}; try: {fast.home.command('sample')}")
    print("Rounding makes any two runs drift apart after some hundred steps: which of the two has "
          "the lower held-out loss is chance, not quality.")  # fmt: skip
    if error > AGREEMENT:
        raise RuntimeError("the two backends do not agree")


def train(options: TrainOptions) -> tuple[Trainer, torch.Tensor]:
    """A finished training and the loss of each of its steps."""
    losses: list[torch.Tensor] = []
    trainer = Trainer(options, say=None, on_loss=losses.append)
    trainer.run()
    return trainer, torch.stack(losses)


def speed(trainer: Trainer) -> float:
    """Characters a second while training."""
    return trainer.progress.step * trainer.chars_per_step / trainer.progress.seconds
