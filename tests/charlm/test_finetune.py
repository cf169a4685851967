"""Runs that begin with the weights of another one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs import tensors_of, weights

from charrnn_fast.charlm import Trainer, UsageError, evaluate, from_pretrained, load_corpus, train
from charrnn_fast.cli import main

OTHER = "the lazy fox and the slow brown dog, é and ß!\n" * 60


@pytest.fixture
def other(tmp_path) -> Path:
    path = tmp_path / "other.txt"
    path.write_text(OTHER, encoding="utf-8")
    return path


@pytest.mark.parametrize("embedding", [0, 5])
def test_scores_of_known_characters_stay(options, cell, other, embedding):
    """Before the first step the model reads a text it knows as the one it comes from does, and new
    characters are no likelier than the least likely known one."""
    source = train(options, cell=cell, embedding_size=embedding, max_epochs=1, say=None)
    lines: list[str] = []
    trainer = Trainer(
        replace(source.options, text=str(other), init_from=source.folder, seed=9,
                out_dir=options.out_dir + "-2"),
        say=lines.append,
    )  # fmt: skip
    old, new = from_pretrained(source.folder), trainer.model.eval()
    assert set(trainer.vocabulary.characters) == set(old.vocabulary.characters) | set(",éß!")
    text = "the quick brown fox\n"
    tokens, other_tokens = (
        torch.from_numpy(v.encode(text).astype("int64"))[:, None]
        for v in (old.vocabulary, trainer.vocabulary)
    )
    places = torch.tensor(
        [trainer.vocabulary.characters.index(c) for c in old.vocabulary.characters]
    )
    expected, found = old.model(tokens)[0], new(other_tokens)[0]
    torch.testing.assert_close(found[..., places], expected)
    unknown = [i for i in range(len(trainer.vocabulary)) if i not in places]
    bias = new.head.bias
    assert (bias[unknown] == bias[places].min()).all()
    assert lines[-1] == (
        f"begins with the weights of {source.folder}: 28 characters are known, 4 are new: "
        "'!' (U+0021), ',' (U+002C), 'ß' (U+00DF), 'é' (U+00E9); 9 of those known do not occur in "
        "this text"
    )


def test_it_learns_faster_than_from_nothing(options, trained, other):
    common = {"text": str(other), "max_iters": 15, "say": None}
    anew = train(options, out_dir=options.out_dir + "-anew", **common)
    tuned = train(options, out_dir=options.out_dir + "-tuned", init_from=trained.folder, **common)
    assert tuned.progress.best_loss < anew.progress.best_loss - 0.1


def test_sizes_are_those_of_the_run(options, other, tmp_path):
    """Without naming them again; another one is refused, and so are bytes for characters."""
    source = train(options, hidden_size=12, num_layers=1, max_epochs=1, say=None)
    small = {"text": other, "batch_size": 4, "seq_length": 8, "max_iters": 3, "say": None}
    start = {"init_from": source.folder, "out_dir": tmp_path / "tuned"}
    tuned = train(**start, **small)
    assert (tuned.config.hidden_size, tuned.config.num_layers) == (12, 1)
    with pytest.raises(UsageError, match="--hidden-size is 12 in .*: it cannot be 13"):
        train(**start, **small, hidden_size=13, overwrite=True)
    with pytest.raises(UsageError, match="reads characters: leave out --bytes"):
        train(**start, **small, bytes=True, overwrite=True)
    with pytest.raises(UsageError, match="are both"):
        train(**{**start, "out_dir": source.folder}, **small, overwrite=True)
    with pytest.raises(UsageError, match="no such run"):
        train(**{**start, "init_from": tmp_path / "none"}, **small, overwrite=True)
    assert from_pretrained(tmp_path / "tuned").model.config == tuned.config


@pytest.mark.parametrize("stop", [1, 7])
def test_it_resumes_as_if_never_stopped(options, trained, other, stop):
    """Before the first checkpoint and after it, with a vocabulary that the text alone has not."""
    options = replace(options, text=str(other), init_from=trained.folder, save_interval=5)
    folders = [options.out_dir + "-whole", options.out_dir + "-cut"]
    train(options, out_dir=folders[0], say=None)

    def cut(loss, left=[stop]):  # noqa: B006
        left[0] -= 1
        if not left[0]:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        Trainer(replace(options, out_dir=folders[1]), say=None, on_loss=cut).run()
    train(out_dir=folders[1], resume=True, say=None)
    for name in ("model.safetensors", "last.safetensors"):
        a, b = (tensors_of(weights(folder, name)) for folder in folders)
        assert a == b


def test_commands(options, trained, other, tmp_path, capsys):
    """The line about the vocabulary; then the held-out part is read with that of the run."""
    out = str(tmp_path / "tuned")
    command = ["train", str(other), "--init-from", str(trained.folder), "--out-dir", out]
    assert main([*command, "--max-iters", "5", "--batch-size", "4", "--seq-length", "8"]) == 0
    assert "28 characters are known, 4 are new" in capsys.readouterr().out
    assert main(["eval", out]) == 0
    pretrained = from_pretrained(out)
    ids = load_corpus(other, known=pretrained.vocabulary).ids
    loss = evaluate(pretrained.model, ids[-(len(ids) // 10) :])
    assert float(capsys.readouterr().out.split()[2]) == pytest.approx(loss, abs=2e-3)


def test_bytes(options, other):
    """All are known from the beginning."""
    source = train(options, bytes=True, max_iters=2, say=None)
    lines: list[str] = []
    train(
        init_from=source.folder, text=other, max_iters=2, batch_size=4, seq_length=8,
        out_dir=options.out_dir + "-2", say=lines.append,
    )  # fmt: skip
    assert "256 characters are known, none is new; 2" in lines[0]
