"""Beginning with the weights of another run, on a text that may have other characters."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import checkpoint
from .errors import UsageError
from .model import CharRNN, ModelConfig
from .options import TrainOptions, checked
from .vocabulary import ByteVocabulary, Vocabulary, show

SHAPES = ("cell", "hidden_size", "num_layers", "nonlinearity", "embedding_size")


def started_options(given: dict[str, Any]) -> TrainOptions:
    """Options by name, the rest by default; with ``init_from``, the sizes are those of that run."""
    if given.get("init_from") is not None:
        config, vocabulary, _ = checkpoint.read_settings(
            Path(checked("init_from", given["init_from"]))
        )
        sizes = {name: getattr(config, name) for name in SHAPES}
        given = {**sizes, "bytes": isinstance(vocabulary, ByteVocabulary), **given}
    return TrainOptions(**given)


def known_vocabulary(options: TrainOptions, config: ModelConfig, known: Vocabulary) -> Vocabulary:
    """The vocabulary of a run that begins with the weights of ``init_from``.

    UsageError where its options are not those of such a model.
    """
    for name in (f.name for f in fields(ModelConfig) if f.name in SHAPES):
        if getattr(options, name) != getattr(config, name):
            flag = "--" + name.replace("_", "-")
            raise UsageError(
                f"{flag} is {getattr(config, name)} in {options.init_from}: it cannot be "
                f"{getattr(options, name)} with --init-from"
            )
    if options.bytes != isinstance(known, ByteVocabulary):
        other = "reads bytes: give" if not options.bytes else "reads characters: leave out"
        raise UsageError(f"{options.init_from} {other} --bytes")
    return known


@torch.no_grad()
def adapt(
    model: CharRNN, vocabulary: Vocabulary, weights: dict[str, Tensor], known: Vocabulary
) -> None:
    """Gives a model of ``vocabulary`` the weights of one of ``known``, whose characters are among
    the others. A new character begins as the mean of all that are known, and as unlikely as the
    least likely one."""
    place = {character: i for i, character in enumerate(vocabulary.characters)}
    places = torch.tensor([place[character] for character in known.characters])
    new = torch.ones(len(vocabulary), dtype=torch.bool)
    new[places] = False
    first = "embedding.weight" if model.embedding is not None else "rnn.weight_ih_l0"
    for name, parameter in model.named_parameters():
        own = parameter.detach()
        old = weights[name].to(own)
        if name not in (first, "head.weight", "head.bias"):
            own.copy_(old)
            continue
        # [V, ...] each: a row for a character.
        rows, own = (old.T, own.T) if name == "rnn.weight_ih_l0" else (old, own)
        own[places] = rows
        own[new] = rows.min() if name == "head.bias" else rows.mean(0)


def what_became(vocabulary: Vocabulary, known: Vocabulary, seen: Vocabulary) -> str:
    """One line: how a vocabulary extends ``known``, where the text has the characters ``seen``."""
    new = [c for c in vocabulary.characters if c not in set(known.characters)]
    unseen = len(set(known.characters) - set(seen.characters))
    line = f"{len(known)} characters are known, "
    line += f"{len(new)} are new: {show(new, 5)}" if new else "none is new"
    return line + (f"; {unseen} of those known do not occur in this text" if unseen else "")
