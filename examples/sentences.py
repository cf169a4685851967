"""A first recurrent network: learn three sentences, then complete their beginnings.

    python examples/sentences.py                # rnn, lstm and gru beside each other
    python examples/sentences.py --pad-in-loss  # let the padding count in the loss

This follows a well-known exercise step by step: characters to numbers, targets one character ahead
of the inputs, one recurrent layer of 12 units, Adam, 100 epochs. It does so with each cell on both
backends, which must write the same characters. What usually goes wrong in it:

- The order of the characters comes from a set, so it differs from run to run. Here it is sorted.
- The number of layers is stored as ``layer`` and read as ``n_layers``, which does not exist. Here
  nobody makes the first hidden state: a recurrent module does that itself.
- Targets pass through floats on their way to being class numbers. Here they stay integers.
- Sentences are padded with spaces, and the model is made to learn the padding. Here padded targets
  are left out of the loss; --pad-in-loss brings them back.
- A character that no sentence has ends in a KeyError. Here the error names it and says what to do.
- To draw one character the whole text so far is read again. Here the hidden state is carried along;
  ``complete_by_rereading`` is the slow way, and the program checks that both write the same.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
import torch.nn.functional as F

from charrnn_fast.charlm import CharRNN, ModelConfig, Vocabulary, build_model, sample
from charrnn_fast.charlm.data import PAD
from charrnn_fast.charlm.model import Backend, Cell

SENTENCES = ["hello how are you", "i am fine", "how are you doing"]
STARTS = ["hello", "hello i am"]
CELLS: tuple[Cell, ...] = ("rnn", "lstm", "gru")
BACKENDS: tuple[Backend, ...] = ("fast", "torch")
LENGTH = 23  # characters of a completed text, its beginning included


def make_batch(vocabulary: Vocabulary, pad_in_loss: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and targets, ``[T, B]`` each: the sentences padded with spaces, one step apart."""
    longest = max(map(len, SENTENCES))
    padded = [vocabulary.encode(sentence.ljust(longest)) for sentence in SENTENCES]
    ids = torch.from_numpy(np.stack(padded, axis=1).astype(np.int64))
    tokens, targets = ids[:-1], ids[1:].clone()
    if not pad_in_loss:
        for column, sentence in enumerate(SENTENCES):
            targets[len(sentence) - 1 :, column] = PAD
    return tokens, targets


def train(
    cell: Cell, backend: Backend, vocabulary: Vocabulary, pad_in_loss: bool
) -> tuple[CharRNN, list[float]]:
    """The trained model, and the loss of every tenth epoch."""
    config = ModelConfig(len(vocabulary), hidden_size=12, num_layers=1, cell=cell)
    model = build_model(config, backend, seed=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    tokens, targets = make_batch(vocabulary, pad_in_loss)
    losses = []
    for epoch in range(1, 101):
        logits, _ = model(tokens)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=PAD)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if epoch % 10 == 0:
            losses.append(loss.item())
    return model.eval(), losses


def complete(model: CharRNN, vocabulary: Vocabulary, start: str) -> str:
    """The most probable text, with the hidden state carried from character to character."""
    return start + sample(model, vocabulary, start, LENGTH - len(start), temperature=0)[0]


@torch.no_grad()
def complete_by_rereading(model: CharRNN, vocabulary: Vocabulary, start: str) -> str:
    """The same, reading all of the text again for every character."""
    text = start
    while len(text) < LENGTH:
        tokens = torch.from_numpy(vocabulary.encode(text).astype(np.int64))
        logits, _ = model(tokens[:, None])
        text += vocabulary.decode(logits[-1, 0].argmax())
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description="Learns three sentences with both backends.")
    parser.add_argument("--pad-in-loss", action="store_true", help="learn the padding as well")
    pad_in_loss = parser.parse_args().pad_in_loss
    vocabulary = Vocabulary("".join(SENTENCES))
    losses, completions = {}, {}
    for cell in CELLS:
        texts = {}
        for backend in BACKENDS:
            model, losses[cell, backend] = train(cell, backend, vocabulary, pad_in_loss)
            texts[backend] = [complete(model, vocabulary, start) for start in STARTS]
            if texts[backend] != [complete_by_rereading(model, vocabulary, s) for s in STARTS]:
                raise SystemExit(f"{cell}: reading the text again gives other characters")
        if texts["fast"] != texts["torch"]:
            raise SystemExit(f"{cell}: the backends wrote different characters")
        completions[cell] = texts["fast"]

    print("loss       " + "".join(f"{cell:>20}" for cell in CELLS))
    print("           " + "".join(f"{backend:>10}" for _ in CELLS for backend in BACKENDS))
    for n in range(10):
        row = "".join(f"{losses[c, b][n]:10.4f}" for c in CELLS for b in BACKENDS)
        print(f"epoch {10 * (n + 1):5}{row}")
    for n, start in enumerate(STARTS):
        print(f"after {start!r}:")
        for cell in CELLS:
            print(f"  {cell:5}{completions[cell][n]!r}")
    print("both backends, carrying the state or reading again: the same characters")


if __name__ == "__main__":
    main()
