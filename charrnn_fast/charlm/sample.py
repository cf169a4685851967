"""Drawing text from a model, one character at a time, with the state carried along."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch
from torch import Tensor, nn

import charrnn_fast
from charrnn_fast import ops

from . import checks
from .data import to_tensor
from .head import Head
from .model import READ, Cell, CharRNN, State
from .options import check_seed
from .vocabulary import OnUnknown, Vocabulary

MOST_STREAMS = 1 << 20  # at once


@dataclass(frozen=True)
class SampleOptions:
    """How the next character is drawn from the scores.

    The draw inverts the cumulative distribution at a uniform number from a ``torch.Generator``, so
    that any implementation of the same model draws the same text.

    Args:
        temperature: divides the scores; 0 always takes the best one.
        top_k: keeps the k best, and ties with the last of them; 0: all.
        top_p: keeps the fewest characters, best first, whose probabilities reach p; 1: all.

    Raises:
        UsageError: a value is out of its range.

    Example:
        >>> from charrnn_fast.charlm import SampleOptions
        >>> SampleOptions(temperature=0.8, top_k=5)
        SampleOptions(temperature=0.8, top_k=5, top_p=1.0)
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        plain = {
            "temperature": checks.real("--temperature", self.temperature),
            "top_k": checks.whole("--top-k", self.top_k),
            "top_p": checks.real("--top-p", self.top_p, 0.0, 1.0, open=True, closed=True),
        }
        for name, value in plain.items():
            object.__setattr__(self, name, value)


def draw(logits: Tensor, uniforms: Tensor, options: SampleOptions) -> Tensor:
    """One id for each row of ``logits [S, V]``, by a uniform number of [0, 1) each ``[S]``."""
    if options.temperature < torch.finfo(logits.dtype).tiny:
        return logits.argmax(-1)
    if 0 < options.top_k < logits.shape[-1]:
        least = logits.topk(options.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    best = logits.max(-1, keepdim=True).values
    weights = ((logits - best) / options.temperature).exp()
    if options.top_p < 1:
        falling, order = weights.sort(dim=-1, descending=True, stable=True)
        reached = falling.cumsum(-1)
        before = reached.roll(1, -1)
        before[:, 0] = -1  # the best one stays, however small p is
        falling = falling.masked_fill(before >= options.top_p * reached[:, -1:], 0)
        weights = weights.scatter(-1, order, falling)
    total = weights.cumsum(-1)
    chosen = (total <= uniforms[:, None] * total[:, -1:]).sum(-1)
    # Rounding may put u * total at total itself: the last character that has any weight is meant.
    last = weights.shape[-1] - 1 - (weights > 0).flip(-1).int().argmax(-1)
    return torch.minimum(chosen, last)


def step(
    model: CharRNN,
    tokens: Tensor,
    state: State | None,
    uniforms: Tensor,
    options: SampleOptions,
) -> tuple[Tensor, State]:
    """Draws N characters for S streams: ``uniforms [N, S]`` to ids ``[N, S]`` and the state.

    ``tokens [S]`` are the last characters so far, not yet seen by the model whose state is given.
    The returned state has not seen the last row drawn, so that calls can follow one another.

    One op does all of it unless ``why_stepwise`` says otherwise; the loop here is its reference.
    """
    if why_stepwise(model) is None:
        return generate(model, tokens, state, uniforms, options)
    rows = []
    for row in uniforms:
        logits, state = model(tokens[None], state)
        tokens = draw(logits[0], row, options)
        rows.append(tokens)
    assert state is not None
    return torch.stack(rows), state


def generate(
    model: CharRNN,
    tokens: Tensor,
    state: State | None,
    uniforms: Tensor,
    options: SampleOptions,
) -> tuple[Tensor, State]:
    """``step`` by one op, for a model that ``why_stepwise`` has no word against."""
    weights = list(model.rnn._current_weights())  # type: ignore[operator]
    if model.embedding is not None:
        # The op reads ids as one-hot vectors: W_ih of those is the product with the embedding.
        weights[0] = weights[0] @ model.embedding.weight.T
    begin = (None, None) if state is None else (*state, None)[:2]
    drawn, *end = ops.generate(
        tokens,
        begin[0],
        begin[1],
        weights,
        model.head.weight,
        model.head.bias,
        uniforms,
        model.rnn.mode,
        model.rnn.bias,
        options.temperature,
        options.top_k,
        options.top_p,
    )
    return drawn, tuple(end[: model.config.states])


def why_stepwise(model: CharRNN) -> str | None:
    """Why ``step`` calls the model for every character; None where one op does it all."""
    parts, weights = list(model.modules()), list(model.parameters())
    modules = [getattr(charrnn_fast, cell.upper()) for cell in get_args(Cell)]
    if type(model) is not CharRNN or type(model.rnn) not in modules or type(model.head) is not Head:
        return "the model is not a CharRNN of a module of charrnn_fast"
    if model.rnn.bidirectional or model.rnn.batch_first:
        return "the recurrent module is bidirectional or has the batch first"
    if any(part.training for part in parts):
        return "the model is in training mode"
    if any(part._forward_hooks or part._forward_pre_hooks for part in parts):
        return "a module has hooks"
    if torch.is_grad_enabled():
        return "gradients are recorded"
    if any(type(weight) is not nn.Parameter for weight in weights):
        return "a weight is no plain tensor"
    if not ops.generates(weights[0], model.rnn.mode):
        return f"there is no kernel for {weights[0].dtype} on {weights[0].device.type}"
    if torch.is_autocast_enabled(weights[0].device.type):
        return "autocast is on"
    return None


def start_token(vocabulary: Vocabulary) -> int:
    """What stands before the first character when there is no prompt: a line break if known."""
    return max(vocabulary.characters.find("\n"), 0)


@torch.no_grad()
def stream(
    model: CharRNN,
    vocabulary: Vocabulary,
    prompt: str = "",
    length: int | None = None,
    options: SampleOptions | None = None,
    *,
    seed: int | None = None,
    streams: int = 1,
    on_unknown: OnUnknown = "error",
    chunk: int = 256,
) -> Iterator[Tensor]:
    """Continues ``prompt``, and yields the ids ``[n, streams]`` as they are drawn.

    Args:
        model: of ``vocabulary``; it is put into evaluation mode meanwhile.
        vocabulary: encodes the prompt.
        prompt: what the model reads first; "": a line break, where the vocabulary has one.
        length: characters to draw; None: without end.
        options: how they are drawn.
        seed: of the draws; None: another one each time.
        streams: continuations that are drawn side by side.
        on_unknown: what becomes of characters of the prompt that are not in the vocabulary, as of
            :meth:`Vocabulary.encode`.
        chunk: characters that are drawn at a time, at most; the text does not depend on it.

    Raises:
        UsageError: a value is out of its range, or a character of the prompt is unknown.

    Example:
        >>> from charrnn_fast.charlm import ModelConfig, Vocabulary, build_model, stream
        >>> vocabulary = Vocabulary.from_text("a banana")
        >>> model = build_model(ModelConfig(len(vocabulary), hidden_size=16), seed=1)
        >>> pieces = stream(model, vocabulary, "a b", length=5, streams=3, chunk=4, seed=1)
        >>> [piece.shape for piece in pieces]
        [torch.Size([4, 3]), torch.Size([1, 3])]
    """
    options = options or SampleOptions()
    streams, chunk = (
        checks.whole("streams", streams, 1, MOST_STREAMS),
        checks.whole("chunk", chunk, 1),
    )
    if length is not None:
        length = checks.whole("length", length)
    device = model.head.weight.device
    generator = torch.Generator()
    if seed is None:
        generator.seed()  # from the system; PyTorch's own random numbers stay as they are
    else:
        generator.manual_seed(check_seed(seed))
    ids = vocabulary.encode(prompt, on_unknown)
    if not len(ids):
        ids = np.array([start_token(vocabulary)], dtype=vocabulary.dtype)
    training = model.training
    model.eval()
    try:
        state: State | None = None
        for start in range(0, len(ids) - 1, READ):
            piece = ids[start : min(start + READ, len(ids) - 1), None]
            state = model.read(to_tensor(piece, device), state)
        if state is not None:
            state = tuple(part.expand(-1, streams, -1).contiguous() for part in state)
        prefix = to_tensor(ids[-1:], device)
        tokens = prefix[-1:].expand(streams)
        done = 0
        while length is None or done < length:
            n = chunk if length is None else min(chunk, length - done)
            uniforms = torch.rand(n, streams, generator=generator).to(device)
            drawn, state = step(model, tokens, state, uniforms, options)
            yield drawn
            tokens, done = drawn[-1], done + n
    finally:
        model.train(training)


def sample(
    model: CharRNN,
    vocabulary: Vocabulary,
    prompt: str = "",
    length: int = 200,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    streams: int = 1,
    stop: str = "",
    on_unknown: OnUnknown = "error",
    errors: str = "replace",
) -> list[str]:
    """Continues ``prompt``; the texts do not have it.

    The same seed gives the same texts with both backends, but for rounding: their scores differ in
    the last digits, which changes about two draws in a million (measured: 12 of 6.7 million with
    the default model on its own corpus, none of 1.1 million greedy ones), and with the first of
    them all that follows.

    Args:
        model: of ``vocabulary``; it is put into evaluation mode meanwhile.
        vocabulary: encodes the prompt and decodes what is drawn.
        prompt: what the model reads first; "": a line break, where the vocabulary has one.
        length: characters of each text.
        temperature: as of :class:`SampleOptions`, like the two that follow.
        top_k: of the k best alone.
        top_p: of the best that make up p.
        seed: of the draws; None: another one each time.
        streams: texts.
        stop: a text ends just before it, where it occurs.
        on_unknown: what becomes of characters of the prompt that are not in the vocabulary, as of
            :meth:`Vocabulary.encode`.
        errors: of ``bytes.decode``, for a :class:`ByteVocabulary`: ``'surrogateescape'`` keeps
            bytes that are no UTF-8.

    Raises:
        UsageError: a value is out of its range, or a character of the prompt is unknown.

    Example:
        >>> from charrnn_fast.charlm import ModelConfig, Vocabulary, build_model, sample
        >>> vocabulary = Vocabulary.from_text("a banana")
        >>> model = build_model(ModelConfig(len(vocabulary), hidden_size=16), seed=1)
        >>> texts = sample(model, vocabulary, "a b", length=10, streams=2, seed=1)
        >>> [len(text) for text in texts]
        [10, 10]
        >>> texts == sample(model, vocabulary, "a b", length=10, streams=2, seed=1)
        True
    """
    options = SampleOptions(temperature, top_k, top_p)
    texts = [""] * checks.whole("streams", streams, 1, MOST_STREAMS)
    decoders = [vocabulary.decoder(errors) for _ in texts]
    for ids in stream(
        model,
        vocabulary,
        prompt,
        length,
        options,
        seed=seed,
        streams=streams,
        on_unknown=on_unknown,
    ):
        columns = ids.T.cpu().numpy()
        texts = [t + d(c) for t, d, c in zip(texts, decoders, columns, strict=True)]
        if stop and all(stop in text for text in texts):
            break
    texts = [t + d([], final=True) for t, d in zip(texts, decoders, strict=True)]
    return [text.split(stop)[0] if stop else text for text in texts]


def write_stream(pieces: Iterator[Tensor], vocabulary: Vocabulary, stop: str = "") -> str:
    """Prints one stream as it is drawn and returns it; ends before ``stop``."""
    decoder, text, shown = vocabulary.decoder(), "", 0
    for ids in pieces:
        text += decoder(ids.cpu().numpy())
        end = text.find(stop) if stop else -1
        if end >= 0:
            text = text[:end]
        # A stop string may have begun at the end of what is there: hold that back.
        sure = len(text) if end >= 0 or not stop else max(shown, len(text) - len(stop) + 1)
        sys.stdout.write(text[shown:sure])
        sys.stdout.flush()
        shown = sure
        if end >= 0:
            return text
    text += decoder([], final=True)
    sys.stdout.write(text[shown:])
    return text
