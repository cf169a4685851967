from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from charrnn_fast.charlm import ByteVocabulary, UsageError, Vocabulary


def test_order_is_that_of_code_points():
    """Ids do not depend on the order in which characters are met."""
    assert Vocabulary("hello").characters == "ehlo"
    assert Vocabulary("olleh") == Vocabulary.from_text("hello" * 1000) == Vocabulary("hello")
    assert Vocabulary("hello").encode("hole").tolist() == [1, 3, 2, 0]


@given(st.text(min_size=1))
def test_decode_undoes_encode(text):
    vocabulary = Vocabulary.from_text(text)
    assert vocabulary.decode(vocabulary.encode(text)) == text
    assert len(vocabulary) == len(set(text))


@given(st.text())
def test_bytes_decode_undoes_encode(text):
    vocabulary = ByteVocabulary()
    ids = vocabulary.encode(text)
    assert ids.tolist() == list(text.encode()) if text.isascii() else len(ids) > len(text)
    assert vocabulary.decode(ids) == text


@pytest.mark.parametrize(("size", "dtype"), [(256, "uint8"), (257, "uint16"), (65537, "uint32")])
def test_ids_take_the_smallest_type(size, dtype):
    vocabulary = Vocabulary(map(chr, range(0x10000, 0x10000 + size)))
    ids = vocabulary.encode(vocabulary.characters)
    assert ids.dtype == dtype
    assert (ids == np.arange(size)).all()


def test_unknown_characters_are_named():
    with pytest.raises(UsageError, match=r"'z' \(U\+007A\), 'é' \(U\+00E9\).*skip or replace"):
        Vocabulary("abc ").encode("abzébz")


def test_unknown_characters_beyond_the_table():
    """A code point far above the greatest known one is unknown, not an index error."""
    with pytest.raises(UsageError, match="U\\+1F600"):
        Vocabulary("abc").encode("a\U0001f600")


def test_unknown_characters_skipped_or_replaced():
    vocabulary = Vocabulary("ab ")
    assert vocabulary.decode(vocabulary.encode("axbé", "skip")) == "ab"
    assert vocabulary.decode(vocabulary.encode("axbé", "replace")) == "a b "
    assert Vocabulary("bc").decode(Vocabulary("bc").encode("cx", "replace")) == "cb"
    with pytest.raises(UsageError, match="on_unknown"):
        vocabulary.encode("a", "ignore")


def test_long_texts_are_encoded_across_chunks(monkeypatch):
    monkeypatch.setattr("charrnn_fast.charlm.vocabulary.CHUNK", 7)
    text = "abcdefgh é" * 11
    vocabulary = Vocabulary.from_text(text)
    assert vocabulary.decode(vocabulary.encode(text)) == text


def test_encoding_has_no_loop_over_characters():
    """A long text takes no more lines of Python than one that is a thousandth of it."""

    def lines_run(text):
        count = 0

        def trace(frame, event, argument):
            nonlocal count
            frame.f_trace_opcodes = True
            count += 1
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            Vocabulary.from_text(text).encode(text)
        finally:
            sys.settrace(before)
        return count

    text = "hello, world! é" * 100
    assert lines_run(text * 1000) < 1.1 * lines_run(text) + 1000


def test_decode_checks_ids():
    with pytest.raises(IndexError):
        Vocabulary("ab").decode([0, 2])
    with pytest.raises(IndexError):
        Vocabulary("ab").decode([-1])


def test_decoder_waits_for_the_rest_of_a_character():
    decoder = ByteVocabulary().decoder()
    assert decoder([0xC3]) == ""
    assert decoder([0xA9, 0x61]) == "éa"
    assert decoder([0xC3], final=True) == "\ufffd"


@pytest.mark.parametrize("vocabulary", [Vocabulary("aé\n\u2028\U0001f600"), ByteVocabulary()])
def test_json_round_trip(vocabulary):
    assert Vocabulary.from_json(vocabulary.to_json()) == vocabulary


@pytest.mark.parametrize("value", [[], {}, {"kind": "words"}, {"kind": "characters"}, None])
def test_json_that_is_no_vocabulary(value):
    with pytest.raises(UsageError, match="no vocabulary"):
        Vocabulary.from_json(value)


def test_empty_vocabulary():
    with pytest.raises(UsageError, match="at least one"):
        Vocabulary("")
