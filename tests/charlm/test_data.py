from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch

from charrnn_fast.charlm import TrainOptions, UsageError, Vocabulary, builtin_text, load_corpus
from charrnn_fast.charlm.data import (
    PAD,
    LineBatches,
    StreamBatches,
    encode_file,
    prepare,
    split,
    to_tensor,
)


def test_builtin_text_is_large_and_always_the_same():
    text = builtin_text()
    assert len(text) > 400_000
    assert text == builtin_text()
    corpus = load_corpus()
    assert corpus.vocabulary.decode(corpus.ids) == text


@pytest.mark.parametrize("content", ["héllo\r\nwörld\n", "\U0001f600ab", "a\u2028b"])
def test_file_is_read_unchanged(tmp_path, content, monkeypatch):
    """Line ends stay as they are, and characters may lie across the pieces of reading."""
    monkeypatch.setattr("charrnn_fast.charlm.data.CHUNK", 3)
    path = tmp_path / "text"
    path.write_bytes(content.encode())
    corpus = load_corpus(path)
    assert corpus.vocabulary.decode(corpus.ids) == content
    assert "".join(map(corpus.vocabulary.decode, encode_file(path, corpus.vocabulary))) == content


def test_byte_order_mark_is_no_character(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(b"\xef\xbb\xbfab")
    assert load_corpus(path).vocabulary.characters == "ab"


def test_bytes_of_any_file(tmp_path):
    path = tmp_path / "binary"
    path.write_bytes(bytes(range(256)))
    corpus = load_corpus(path, byte_mode=True)
    assert corpus.ids.tolist() == list(range(256))
    assert len(corpus.vocabulary) == 256
    assert b"".join(map(bytes, encode_file(path, corpus.vocabulary))) == bytes(range(256))


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b"a", "single character"), (b"abc\xff", "not UTF-8 near byte 3")],
)
def test_texts_that_cannot_be_learnt(tmp_path, content, message):
    path = tmp_path / "text"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        load_corpus(path)


def test_files_that_are_none(tmp_path):
    with pytest.raises(UsageError, match=r"no such file: .*missing"):
        load_corpus(tmp_path / "missing")
    with pytest.raises(UsageError, match="not a regular file"):
        load_corpus(tmp_path)


def test_memory_is_of_the_order_of_the_file(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(b"hello, world! \xc3\xa9" * 1_000_000)
    tracemalloc.start()
    load_corpus(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.5 * path.stat().st_size


def test_split_holds_out_the_end():
    train, held_out = split(np.arange(100, dtype=np.uint8), 0.1)
    assert train.tolist() == list(range(90))
    assert held_out.tolist() == list(range(90, 100))


def test_streams_go_on_where_they_stopped():
    """Every target is the character after its token; stream b runs through its part of the text."""
    ids = np.arange(103, dtype=np.uint8)
    batches = StreamBatches(ids, batch_size=4, seq_length=5)
    assert len(batches) == 5
    tokens = torch.cat([batches.batch(0, i).tokens for i in range(5)])
    targets = torch.cat([batches.batch(0, i).targets for i in range(5)])
    assert tokens.is_contiguous()
    assert tokens.T.tolist() == [list(range(25 * b, 25 * b + 25)) for b in range(4)]
    assert torch.equal(targets, tokens + 1)
    assert [batches.batch(3, i).fresh for i in range(5)] == [True, False, False, False, False]
    assert batches.batch(0, 0).count == 20


def test_short_text_makes_a_smaller_batch():
    assert StreamBatches(np.zeros(33, dtype=np.uint8), 50, 8).batch_size == 4
    with pytest.raises(UsageError, match=r"8 characters .* too few for one sequence of 8"):
        StreamBatches(np.zeros(8, dtype=np.uint8), 50, 8)


def lines_of(text: str, batch_size: int = 2):
    vocabulary = Vocabulary.from_text(text)
    end = vocabulary.characters.index("\n")
    return vocabulary, LineBatches(vocabulary.encode(text), batch_size, end, seed=1)


def test_lines_are_padded_and_masked():
    vocabulary, batches = lines_of("ab\n\nc\n", 2)
    batch = batches.pad(np.array([0, 1]))
    assert vocabulary.decode(batch.tokens[:, 0]) == "\nab"
    assert vocabulary.decode(batch.targets[:, 0]) == "ab\n"
    assert vocabulary.decode(batch.targets[:2, 1]) == "c\n"
    assert batch.targets[2, 1] == PAD
    assert batch.count == 5
    assert batch.fresh


def test_lines_come_once_an_epoch_in_an_order_of_its_own():
    text = "".join(f"{n}\n" for n in range(10, 35))
    vocabulary, batches = lines_of(text, 4)
    epochs = []
    for epoch in (0, 1, 0):
        seen = []
        for index in range(len(batches)):
            targets = batches.batch(epoch, index).targets
            seen += [vocabulary.decode(column) for column in targets.T]
        assert sorted(seen) == text.splitlines(keepends=True)
        epochs.append(seen)
    assert epochs[0] == epochs[2] != epochs[1]


def test_lines_need_lines():
    with pytest.raises(UsageError, match="no line"):
        LineBatches(np.zeros(5, dtype=np.uint8), 2, line_break=0, seed=0)


def test_to_tensor_is_row_major():
    view = np.arange(6, dtype=np.uint16).reshape(3, 2).T
    assert to_tensor(view).stride() == (3, 1)
    assert to_tensor(view).tolist() == view.tolist()


def test_lines_are_not_cut_where_the_text_is_split():
    """The line in which the held-out part would begin is held out as a whole."""
    text = "".join(f"line number {n}\n" for n in range(10, 20))
    vocabulary = Vocabulary.from_text(text)
    options = TrainOptions(lines=True, val_fraction=0.25)
    parts = prepare(options, vocabulary, vocabulary.encode(text))
    assert [len(part.starts) for part in parts] == [7, 3]
    lines = [
        vocabulary.decode(part.ids[start:end])
        for part in parts
        for start, end in zip(part.starts, part.ends, strict=True)
    ]
    assert lines == text.splitlines()
