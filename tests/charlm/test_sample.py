from __future__ import annotations

import itertools
import types

import pytest
import torch

from charrnn_fast import ops
from charrnn_fast.charlm import (
    ByteVocabulary,
    ModelConfig,
    SampleOptions,
    UsageError,
    Vocabulary,
    build_model,
    sample,
    stream,
)
from charrnn_fast.charlm.sample import draw, step, why_stepwise, write_stream

VOCABULARY = Vocabulary("\n abcdefghijklmnopqrstuvwxyz")


def model_of(backend, scale=4.0):
    """A random model whose choices are far from even."""
    model = build_model(ModelConfig(len(VOCABULARY), 24, 2), backend, "orthogonal", seed=1)
    with torch.no_grad():
        model.head.weight *= scale
    return model


def test_draw_inverts_the_cumulative_distribution():
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().expand(6, 4)
    uniforms = torch.tensor([0.0, 0.09, 0.11, 0.31, 0.61, 0.9999999])
    assert draw(logits, uniforms, SampleOptions()).tolist() == [0, 0, 1, 2, 3, 3]


def test_draw_follows_the_probabilities():
    torch.manual_seed(0)
    logits = torch.randn(8)
    drawn = draw(logits.expand(100_000, 8), torch.rand(100_000), SampleOptions(0.7))
    share = drawn.bincount(minlength=8) / 100_000
    torch.testing.assert_close(share, (logits / 0.7).softmax(0), atol=0.006, rtol=0)


def test_draw_never_takes_what_has_no_weight():
    """The greatest uniform number falls on the last character with weight, not behind it."""
    logits = torch.tensor([[0.0, 0.0, -torch.inf]])
    assert draw(logits, torch.tensor([1.0]), SampleOptions()).item() == 1


def test_greedy():
    assert draw(torch.tensor([[1.0, 3.0, 3.0]]), torch.tensor([0.9]), SampleOptions(0)).item() == 1


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        (SampleOptions(top_k=1), {3}),
        (SampleOptions(top_k=2), {2, 3}),
        (SampleOptions(top_k=9), {0, 1, 2, 3}),
        (SampleOptions(top_p=0.39), {3}),
        (SampleOptions(top_p=0.41), {2, 3}),
        (SampleOptions(top_p=0.71), {1, 2, 3}),
        (SampleOptions(top_k=3, top_p=0.5), {2, 3}),
        (SampleOptions(), {0, 1, 2, 3}),
    ],
)
def test_top_k_and_top_p(options, allowed):
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().expand(1000, 4)
    assert set(draw(logits, torch.linspace(0, 1, 1000), options).tolist()) == allowed


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0}],
)
def test_options_that_make_no_sense(wrong):
    with pytest.raises(UsageError, match="must be"):
        SampleOptions(**wrong)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 0},
        {"top_k": 5},
        {"top_p": 0.8},
        {"top_k": 7, "top_p": 0.9, "temperature": 1.3},
    ],
)
def test_backends_draw_the_same_characters(how):
    """Thousands of characters: scores that differ by rounding do not change a draw."""
    fast, reference = (
        sample(model_of(b), VOCABULARY, "hello", 1000, seed=7, streams=3, **how)
        for b in ("fast", "torch")
    )
    assert fast == reference
    assert len(fast) == 3
    assert all(len(text) == 1000 for text in fast)


@pytest.mark.parametrize("options", [SampleOptions(), SampleOptions(0.8, top_k=10, top_p=0.9)])
def test_backends_differ_as_rarely_as_stated(options):
    """Two draws in a million, says ``sample``: of a quarter of a million, 3 at most.

    After a difference the texts go apart: here both see what the first one has drawn.
    """
    fast, reference = (
        build_model(ModelConfig(65, 128, 2), b, "orthogonal", seed=1).eval()
        for b in ("fast", "torch")
    )
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(65, (256,), generator=generator)
    uniforms = torch.rand(1000, 256, generator=generator)
    with torch.no_grad():
        for model in (fast, reference):
            model.head.weight *= 4
        drawn, _ = step(fast, tokens, None, uniforms, options)
        logits, _ = reference(torch.cat([tokens[None], drawn[:-1]]))
    expected = draw(logits.flatten(0, 1), uniforms.flatten(), options)
    assert (drawn.flatten() != expected).sum() <= 3


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: None, None),
        (lambda model: model.double(), None),
        (lambda model: model.train(), "training mode"),
        (lambda model: model.bfloat16(), "no kernel for torch.bfloat16 on cpu"),
        (lambda model: model.head.register_forward_hook(lambda *_: None), "has hooks"),
        (lambda model: torch.nn.utils.parametrizations.weight_norm(model.head), "not a CharRNN"),
        (lambda model: setattr(model.rnn, "batch_first", True), "batch first"),
    ],
)
def test_step_says_how_it_goes(change, reason):
    """One op serves a plain model in evaluation; for anything else there is a reason."""
    model = model_of("fast").eval()
    change(model)
    with torch.no_grad():
        said = why_stepwise(model)
        assert said is None if reason is None else reason in said
        with torch.autocast("cpu"):
            assert why_stepwise(model)
    assert why_stepwise(model)  # gradients are recorded
    assert "not a CharRNN of a module of charrnn_fast" in why_stepwise(model_of("torch"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_step_draws_the_same_by_op_and_by_loop(dtype, monkeypatch):
    """Both ways give the same characters and states; `step` takes the op, once for all of them."""
    model = model_of("fast").to(dtype).eval()
    tokens, uniforms, options = torch.tensor([3, 9]), torch.rand(500, 2), SampleOptions(0.9, 8, 0.9)
    expected, expected_state = step(model, tokens, None, uniforms, options)  # records gradients
    calls = []
    generate = ops.generate
    monkeypatch.setattr(ops, "generate", lambda *args: calls.append(1) or generate(*args))
    with torch.no_grad():
        drawn, state = step(model, tokens, None, uniforms, options)
    assert calls == [1]
    assert torch.equal(drawn, expected)
    torch.testing.assert_close(state, tuple(part.detach() for part in expected_state))


def test_temperatures_near_zero_are_greedy():
    """Too small to divide by: the limit, the best character."""
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    assert draw(logits, torch.tensor([0.5]), SampleOptions(1e-42)).item() == 1


def test_the_best_character_stays_for_any_top_p():
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    assert draw(logits, torch.tensor([0.999]), SampleOptions(top_p=1e-60)).item() == 1


def test_seed_decides(backend):
    model = model_of(backend)
    texts = [sample(model, VOCABULARY, "a", 50, seed=s)[0] for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert sample(model, VOCABULARY, "a", 50) != sample(model, VOCABULARY, "a", 50)


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_text_does_not_depend_on_the_chunk(backend, chunk):
    model = model_of(backend)
    whole = torch.cat(list(stream(model, VOCABULARY, "ab", 64, seed=3, streams=2)))
    pieces = torch.cat(list(stream(model, VOCABULARY, "ab", 64, seed=3, streams=2, chunk=chunk)))
    assert torch.equal(whole, pieces)


def test_streams_differ_and_the_first_one_is_like_alone(backend):
    texts = sample(model_of(backend), VOCABULARY, "a", 50, seed=1, streams=4)
    assert len(set(texts)) == 4


def test_without_length_it_goes_on():
    pieces = stream(model_of("torch"), VOCABULARY, "a", seed=1, chunk=10)
    assert sum(len(p) for p in itertools.islice(pieces, 5)) == 50


def test_unknown_characters_of_a_prompt():
    model = model_of("torch")
    with pytest.raises(UsageError, match=r"'É' \(U\+00C9\)"):
        sample(model, VOCABULARY, "É", 5)
    assert sample(model, VOCABULARY, "aÉ", 5, seed=1, on_unknown="skip") == sample(
        model, VOCABULARY, "a", 5, seed=1
    )
    assert sample(model, VOCABULARY, "aÉ", 5, seed=1, on_unknown="replace") == sample(
        model, VOCABULARY, "a ", 5, seed=1
    )


def test_stop_string():
    whole = sample(model_of("torch"), VOCABULARY, "a", 300, seed=1)[0]
    stop = whole[37:40]
    short = sample(model_of("torch"), VOCABULARY, "a", 300, seed=1, stop=stop)[0]
    assert short == whole[: whole.index(stop)]


@pytest.mark.parametrize("chunk", [1, 2, 5, 300])
def test_stop_string_while_streaming(chunk, capsys):
    """What is printed ends before the stop string, wherever the pieces end."""
    model = model_of("torch")
    whole = sample(model, VOCABULARY, "a", 300, seed=1)[0]
    stop = whole[37:40]
    pieces = stream(model, VOCABULARY, "a", 300, seed=1, chunk=chunk)
    text = write_stream(pieces, VOCABULARY, stop)
    assert text == whole[: whole.index(stop)] == capsys.readouterr().out


def test_stop_string_that_never_comes(capsys):
    pieces = stream(model_of("torch"), VOCABULARY, "a", 30, seed=1, chunk=7)
    text = write_stream(pieces, VOCABULARY, "ZZZ")
    assert len(text) == 30
    assert capsys.readouterr().out == text


def test_bytes():
    """In byte mode any prompt is known, and the text is always valid."""
    model = build_model(ModelConfig(256, 8, 1), "torch", seed=1)
    text = sample(model, ByteVocabulary(), "é\U0001f600", 64, seed=1)[0]
    assert text.encode()


def test_model_keeps_its_mode():
    model = model_of("torch").train()
    sample(model, VOCABULARY, "a", 3)
    assert model.training


def test_bytes_stay_what_they_are_where_asked_for():
    """Also those that are no UTF-8, and one that begins a character at the end of a text."""
    model, vocabulary = build_model(ModelConfig(256, 8, 1), "torch", seed=1), ByteVocabulary()
    ids = torch.cat(list(stream(model, vocabulary, "a", 300, seed=1)))[:, 0]
    for length in range(1, 300, 7):
        expected = bytes(ids[:length].tolist())
        (text,) = sample(model, vocabulary, "a", length, seed=1, errors="surrogateescape")
        assert text.encode("utf-8", "surrogateescape") == expected
        assert sample(model, vocabulary, "a", length, seed=1) == [expected.decode(errors="replace")]


def test_the_end_of_a_stream_of_bytes(capsys):
    """A character that is cut off by the end appears as one that is damaged."""
    assert write_stream(iter([torch.tensor([[97], [0xC3]])]), ByteVocabulary()) == "a\ufffd"
    assert capsys.readouterr().out == "a\ufffd"


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_seeds_that_no_generator_takes(seed):
    with pytest.raises(UsageError, match="the seed must be "):
        sample(model_of("torch"), VOCABULARY, "a", 3, seed=seed)


def test_random_numbers_of_others_stay_the_same():
    """With a seed and without, drawing leaves PyTorch's own generator alone."""
    model = model_of("torch")
    before = torch.get_rng_state()
    for seed in (1, None):
        sample(model, VOCABULARY, "a", 3, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)


def test_text_is_shown_as_it_is_drawn(monkeypatch):
    """Before the next piece is drawn, the last one has left every buffer."""
    shown, waiting = [], []
    terminal = types.SimpleNamespace(write=waiting.append)
    terminal.flush = lambda: (shown.extend(waiting), waiting.clear())
    monkeypatch.setattr("sys.stdout", terminal)

    def pieces():
        for n, letter in enumerate("abc"):
            assert "".join(shown) == "abc"[:n]
            yield torch.from_numpy(VOCABULARY.encode(letter).astype("int64"))[:, None]

    assert write_stream(pieces(), VOCABULARY) == "abc"


def test_without_a_prompt_a_line_begins():
    vocabulary = Vocabulary("\t\n abcdefghijklmnopqrstuvwxyz"[: len(VOCABULARY)])
    texts = [sample(model_of("torch"), vocabulary, p, 50, seed=1) for p in ("", "\n", "\t")]
    assert texts[0] == texts[1] != texts[2]
