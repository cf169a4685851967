"""The op `generate`: the same characters as the step-by-step loop of charlm, for every ISA."""

import itertools
import signal
import threading
import time

import pytest
import torch

import charrnn_fast
from charrnn_fast import ops
from charrnn_fast.charlm import ModelConfig, SampleOptions, build_model
from charrnn_fast.charlm.sample import draw, step

GREEDY = SampleOptions(temperature=0)
HOW = [
    SampleOptions(),
    GREEDY,
    SampleOptions(temperature=0.5),
    SampleOptions(top_k=5),
    SampleOptions(top_p=0.8),
    SampleOptions(temperature=1.3, top_k=7, top_p=0.9),
]


@pytest.fixture(autouse=True)
def _one_thread():
    """Thousands of tiny ops: on a machine that others use, more threads wait for each other."""
    torch.set_num_threads(1)


def on_each_isa(call):
    """What ``call`` returns, by the name of the ISA it ran on."""
    results = {}
    for name in charrnn_fast.available_isas():
        with charrnn_fast.use_isa(name):
            results[name] = call()
    return results


def model_of(V, H, layers=1, kind="tanh", dtype=torch.float64, scale=4.0):
    """A random model whose choices are far from even; `kind` names a cell or a nonlinearity."""
    if kind in ("lstm", "gru"):
        config, backend = ModelConfig(V, H, layers, cell=kind), "torch"
    else:
        config, backend = ModelConfig(V, H, layers, kind), "fast"
    model = build_model(config, backend, "orthogonal", seed=1).to(dtype).eval()
    with torch.no_grad():
        model.head.weight *= scale
    return model


KINDS = ["tanh", "relu", "sigmoid", "lstm", "gru"]


def states_of(model, S):
    """A state for S streams: h, and c of an LSTM."""
    shape = (model.config.num_layers, S, model.config.hidden_size)
    return tuple(torch.randn(shape).to(model.head.weight) for _ in range(model.config.states))


def arguments(model, tokens, uniforms, state=None, options=HOW[0]):
    """What ``generate`` is called with to do as ``step`` does; the state is h, or (h, c)."""
    weights = [p.detach() for p in model.rnn.parameters()]
    head = [model.head.weight.detach(), model.head.bias.detach()]
    how = (options.temperature, options.top_k, options.top_p)
    states = (*((state,) if torch.is_tensor(state) else state or ()), None, None)[:2]
    return (tokens, *states, weights, *head, uniforms, model.rnn.mode, True, *how)


def inputs(V, N, S):
    return torch.randint(0, V, (S,)), torch.rand(N, S)


def loop(model, tokens, state, uniforms, options):
    """``step`` as its loop: it records gradients, which the op does not."""
    with torch.enable_grad():
        drawn, state = step(model, tokens, state, uniforms, options)
    return drawn, [tensor.detach() for tensor in state]


def differing(model, tokens, uniforms, drawn, options):
    """Draws that the reference would have made otherwise, each after the same characters."""
    seen = torch.cat([tokens[None], drawn[:-1]])
    with torch.no_grad():
        logits, _ = model(seen)
    expected = draw(logits.flatten(0, 1), uniforms.flatten(), options)
    return int((expected != drawn.flatten()).sum())


def assert_same_as_the_loop(model, N, S, state):
    """Every character and the state, on every ISA, for all kinds of options."""
    for options in HOW:
        tokens, uniforms = inputs(model.rnn.input_size, N, S)
        args = arguments(model, tokens, uniforms, state, options)
        expected, expected_after = loop(model, tokens, state, uniforms, options)
        for isa, (drawn, *after) in on_each_isa(lambda args=args: ops.generate(*args)).items():
            assert torch.equal(drawn, expected), (isa, options)
            if len(expected_after) == 1:
                assert after.pop().shape == (0,)
            torch.testing.assert_close(after, expected_after, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("S", [1, 2, 7, 64])
def test_float64_draws_what_the_loop_draws(S, layers, kind):
    """Thousands of characters, from a state, with an odd number of hidden units."""
    model = model_of(33, 19, layers, kind)
    assert_same_as_the_loop(model, 50, S, states_of(model, S))


@pytest.mark.parametrize("kind", ["tanh", "lstm", "gru"])
@pytest.mark.parametrize(("V", "H"), [(1, 3), (2, 1), (16, 16), (17, 65), (300, 37)])
def test_sizes(V, H, kind):
    """One character, one hidden unit, whole vectors and remainders, a vocabulary of hundreds."""
    assert_same_as_the_loop(model_of(V, H, kind=kind), 50, 3, None)


@pytest.mark.parametrize("kind", ["tanh", "lstm", "gru"])
@pytest.mark.parametrize("options", HOW)
def test_float32_differs_once_in_a_million(isa, options, kind):
    """Scores differ by rounding, and a uniform number may fall between: about 1 draw in 10**6."""
    model = model_of(65, 64, kind=kind, dtype=torch.float32)
    tokens, uniforms = inputs(65, 500, 256)
    drawn, *_ = ops.generate(*arguments(model, tokens, uniforms, None, options))
    assert differing(model, tokens, uniforms, drawn, options) <= 2  # of 128 000


@pytest.mark.parametrize("kind", KINDS)
def test_float32_state_has_the_bits_of_the_layers(isa, kind):
    """The state is that of the op `rnn` after the same characters, for any streams."""
    for layers, S in ((1, 1), (2, 7), (3, 97)):
        model = model_of(65, 37, layers, kind, dtype=torch.float32)
        tokens, uniforms = inputs(65, 40, S)
        states = states_of(model, S)
        drawn, *after = ops.generate(*arguments(model, tokens, uniforms, states))
        seen = torch.cat([tokens[None], drawn[:-1]])
        weights = [p.detach() for p in model.rnn.parameters()]
        how = (model.rnn.mode, True, layers, 0.0, False, False)
        _, *expected, _ = ops.rnn(seen, *(*states, None)[:2], weights, None, None, None, *how)
        assert all(map(torch.equal, after, expected))


def rows_of(logits, uniforms, options):
    """Draws of the op from given scores: a head of zeros whose bias they are."""
    V = logits.shape[0]
    weights = [torch.zeros(1, V), torch.zeros(1, 1), torch.zeros(1), torch.zeros(1)]
    head = [torch.zeros(V, 1).to(logits), logits]
    weights = [weight.to(logits) for weight in weights]
    how = (options.temperature, options.top_k, options.top_p)
    uniforms = uniforms[:, None]
    tokens = torch.zeros(1, dtype=torch.int64)
    given = (tokens, None, None, weights, *head, uniforms, "RNN_TANH", True, *how)
    return ops.generate(*given)[0][:, 0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("V", [1, 3, 16, 65, 200])
def test_draw_is_the_reference(V, dtype):
    """From the same scores, every combination of options draws the same."""
    uniforms = torch.linspace(0, 1 - 2**-24, 101)
    count = 0
    for temperature, top_k, top_p in itertools.product(
        (0.0, 1e-320, 1e-3, 0.7, 30.0), sorted({0, 1, 2, V - 1, V + 1}), (1e-9, 0.3, 0.9, 1.0)
    ):
        options = SampleOptions(temperature, top_k, top_p)
        logits = torch.randn(V, dtype=dtype) * 3
        expected = draw(logits.expand(101, V), uniforms, options)
        drawn = on_each_isa(lambda x=logits, options=options: rows_of(x, uniforms, options))
        count += sum(int((ids != expected).sum()) for ids in drawn.values())
    assert count <= (0 if dtype == torch.float64 else 2)


@pytest.mark.parametrize(
    "logits",
    [
        [2.0, 2.0, 2.0, 2.0, 2.0],
        [1.0, 3.0, 3.0, 1.0, 3.0, 0.0],
        [0.0, -0.0, 0.0, -0.0, -1.0],
        [1.0, -torch.inf, 2.0, -torch.inf, 1.0],
        [-torch.inf, -torch.inf, -torch.inf, 4.0],
        [-torch.inf, -torch.inf, -torch.inf],
        [0.0, torch.inf, 1.0, torch.inf],
        [0.0, torch.nan, 1.0, 5.0],
        [0.0, -torch.nan, torch.nan, 5.0],
        [1e30, -1e30, 1e30, 1e-30],
        [1e-42, 2e-42, 1e-42],
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_ties_and_odd_scores(isa, logits, dtype):
    """Equal scores, zeros of both signs, infinities, NaN and denormals, as the reference."""
    scores = torch.tensor(logits, dtype=dtype)
    uniforms = torch.tensor([0.0, 0.1, 0.26, 0.51, 0.76, 1 - 2**-24])
    for temperature, top_k, top_p in itertools.product((0.0, 1.0), (0, 1, 2, 3), (0.3, 0.7, 1.0)):
        options = SampleOptions(temperature, top_k, top_p)
        expected = draw(scores.expand(6, -1), uniforms, options)
        assert torch.equal(rows_of(scores, uniforms, options), expected), options


def test_streams_are_independent(isa):
    """A stream draws the same, and leaves the same bits of state, alone and for any threads."""
    model = model_of(65, 48, 2, dtype=torch.float32)
    tokens, uniforms = inputs(65, 400, 100)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(ops.generate(*arguments(model, tokens, uniforms)))
    for s in (0, 41, 99):
        one = slice(s, s + 1)
        drawn, state, _ = ops.generate(*arguments(model, tokens[one], uniforms[:, one]))
        for all_drawn, all_states, _ in results:
            assert torch.equal(drawn, all_drawn[:, one])
            assert torch.equal(state, all_states[:, one])


def test_calls_follow_one_another(isa):
    """The state and the last characters of one call go on in the next."""
    model = model_of(33, 20, 2, dtype=torch.float32)
    tokens, uniforms = inputs(33, 50, 3)
    whole, last, _ = ops.generate(*arguments(model, tokens, uniforms))
    state, pieces = None, []
    for part in uniforms.split([1, 20, 0, 29]):
        drawn, state, _ = ops.generate(*arguments(model, tokens, part, state))
        if len(part):
            tokens = drawn[-1]
        pieces.append(drawn)
    assert torch.equal(torch.cat(pieces), whole)
    assert torch.equal(state, last)


def test_inputs_are_not_written(isa):
    """The state that was given stays; what comes back shares no memory with it."""
    model = model_of(9, 5)
    tokens, uniforms = inputs(9, 4, 2)
    state = torch.randn(1, 2, 5, dtype=torch.float64)
    args = arguments(model, tokens, uniforms, state)
    copies = [a.clone() for a in (tokens, state, uniforms)]
    _, after, _ = ops.generate(*args)
    assert all(map(torch.equal, copies, (tokens, state, uniforms)))
    assert after.data_ptr() != state.data_ptr()


def test_non_contiguous_inputs(isa):
    """Strided and expanded views of everything."""
    model = model_of(17, 11, 2, dtype=torch.float32)
    tokens, uniforms = inputs(17, 30, 4)
    state = torch.randn(2, 4, 11)
    expected = ops.generate(*arguments(model, tokens, uniforms, state))

    def strided(tensor):
        return tensor.repeat_interleave(2, 0).T.contiguous().T[::2] if tensor.dim() > 1 else (
            tensor.repeat_interleave(3)[::3]
        )  # fmt: skip

    _, _, _, weights, head, bias, _, *rest = arguments(model, tokens, uniforms, state)
    moved = state.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    weights = [strided(weight) for weight in weights]
    args = (strided(tokens), moved, None, weights, strided(head), strided(bias), strided(uniforms))
    drawn, after, _ = ops.generate(*args, *rest)
    assert torch.equal(drawn, expected[0])
    assert torch.equal(after, expected[1])
    same = ops.generate(*arguments(model, tokens[:1].expand(4), uniforms[:, :1].expand(30, 4)))[0]
    assert torch.equal(same, same[:, :1].expand(30, 4))


def test_without_biases(isa):
    """Neither recurrent layers nor head need a bias."""
    model = model_of(17, 11, 2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name:
                parameter.zero_()
    tokens, uniforms = inputs(17, 30, 4)
    expected, *_ = ops.generate(*arguments(model, tokens, uniforms))
    weights = [p.detach() for n, p in model.rnn.named_parameters() if "weight" in n]
    head = model.head.weight.detach()
    drawn, *_ = ops.generate(tokens, None, None, weights, head, None, uniforms, "RNN_TANH", False)
    assert torch.equal(drawn, expected)


def test_nothing_to_draw():
    """No characters leave the state alone; no streams are no characters."""
    model = model_of(9, 5)
    state = torch.randn(1, 2, 5, dtype=torch.float64)
    tokens = torch.zeros(2, dtype=torch.int64)
    drawn, after, _ = ops.generate(*arguments(model, tokens, torch.rand(0, 2), state))
    assert drawn.shape == (0, 2)
    assert torch.equal(after, state)
    drawn, after, _ = ops.generate(*arguments(model, tokens[:0], torch.rand(3, 0)))
    assert drawn.shape == (3, 0)
    assert after.shape == (1, 0, 5)


ARGUMENTS = ["tokens", "state", "cell_state", "params", "head_weight", "head_bias", "uniforms"]
ARGUMENTS += ["mode", "has_biases", "temperature", "top_k", "top_p"]


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"tokens": torch.tensor([3, 9])}, IndexError, "token id 9 .* vocabulary has 9 .stream 1"),
        ({"tokens": torch.tensor([-1, 3])}, IndexError, "token id -1 is out of range"),
        ({"tokens": torch.tensor([3])}, RuntimeError, r"tokens of size \[2\], got \[1\]"),
        ({"tokens": torch.tensor([3.0, 1.0])}, ValueError, "tokens must be int64, got Float"),
        (
            {"state": torch.zeros(1, 2, 6)},
            RuntimeError,
            r"of size \[1, 2, 5\], got \[1, 2, 6",
        ),
        ({"state": torch.zeros(1, 2, 5).double()}, ValueError, r"state dtype \(Double\) does not"),
        ({"params": []}, RuntimeError, "params must hold 4 tensors for each layer"),
        ({"params": [torch.zeros(5, 9)] * 4}, RuntimeError, r"weight_ih of size \[9, 9\]"),
        (
            {"head_weight": torch.zeros(8, 5)},
            RuntimeError,
            r"_weight of size \[9, 5\], got \[8",
        ),
        ({"head_bias": torch.zeros(9, 1)}, RuntimeError, r"head_bias of size \[9\], got \[9, 1\]"),
        ({"uniforms": torch.zeros(4)}, RuntimeError, r"uniforms must have 2 dimensions"),
        ({"uniforms": torch.zeros(4, 2).double()}, ValueError, r"uniforms dtype \(Double\)"),
        ({"uniforms": torch.tensor([[0.0, 0.5], [0.1, 1.0]])}, ValueError, r"got 1 at \[1, 1\]"),
        ({"uniforms": torch.tensor([[-0.5, 0.5]])}, ValueError, r"in \[0, 1\), got -0.5 at \[0, 0"),
        ({"uniforms": torch.tensor([[0.5, torch.nan]])}, ValueError, r"got nan at \[0, 1\]"),
        ({"mode": "lstm"}, ValueError, "Unrecognized RNN mode: lstm"),
        ({"mode": "LSTM"}, RuntimeError, r"weight_ih of size \[20, 9\], got \[5, 9\]"),
        ({"cell_state": torch.zeros(1, 2, 5)}, ValueError, "cell_state must be None: RNN_TANH"),
        ({"temperature": -1.0}, ValueError, "temperature must be 0 or more, got -1"),
        ({"temperature": float("inf")}, ValueError, "temperature must be 0 or more, got inf"),
        ({"temperature": float("nan")}, ValueError, "temperature must be 0 or more, got nan"),
        ({"top_k": -1}, ValueError, "top_k must be 0 .all. or more, got -1"),
        ({"top_p": 0.0}, ValueError, r"top_p must be in \(0, 1\], got 0"),
        ({"top_p": 1.5}, ValueError, r"top_p must be in \(0, 1\], got 1.5"),
    ],
)
def test_errors_name_the_argument(wrong, error, message):
    """What was given, and what was expected."""
    model = model_of(9, 5, dtype=torch.float32)
    args = dict(zip(ARGUMENTS, arguments(model, *inputs(9, 4, 2)), strict=True))
    with pytest.raises(error, match=message):
        ops.generate(**{**args, **wrong})


def test_dtypes_without_a_kernel():
    """They are refused with a word, and `generates` knows them."""
    model = model_of(9, 5, dtype=torch.bfloat16)
    assert not ops.generates(model.head.weight, "RNN_TANH")
    assert ops.generates(model.head.weight.float(), "LSTM")
    with pytest.raises(NotImplementedError, match="must be float32 or float64, got BFloat16"):
        ops.generate(*arguments(model, *inputs(9, 4, 2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("with_state", [True, False])
def test_opcheck(dtype, with_state):
    """torch.library.opcheck: schema, fake and tracing."""
    model = model_of(9, 5, 2, dtype=dtype)
    tokens, uniforms = inputs(9, 4, 2)
    state = torch.randn(2, 2, 5, dtype=dtype) if with_state else None
    args = arguments(model, tokens, uniforms, state)
    torch.library.opcheck(torch.ops.charrnn_fast.generate.default, args)


def test_no_gradient_flows():
    """Drawing is not differentiable, and says nothing of it where weights want gradients."""
    model = model_of(9, 5)
    tokens, uniforms = inputs(9, 4, 2)
    args = list(arguments(model, tokens, uniforms))
    args[3] = list(model.rnn.parameters())
    drawn, state, _ = ops.generate(*args)
    assert not drawn.requires_grad
    assert not state.requires_grad


def test_a_signal_ends_a_long_call():
    """Ctrl-C, or any signal whose handler raises, ends it within a fraction of a second.

    Of the processor's time, with room for one that others use as well.
    """

    class Alarm(Exception):
        pass

    def ring(number, frame):
        raise Alarm

    model = model_of(65, 1024, dtype=torch.float32)
    args = arguments(model, *inputs(65, 2_000_000, 1))  # a minute or more
    before = signal.signal(signal.SIGALRM, ring)
    start = time.process_time()
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(Alarm):
            ops.generate(*args)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert time.process_time() - start < 3


def test_other_threads_run_meanwhile():
    """The interpreter lock is not held during a call."""
    model = model_of(65, 128, dtype=torch.float32)
    args = arguments(model, *inputs(65, 1_000_000, 1))
    worker = threading.Thread(target=ops.generate, args=args)
    turns = 0
    worker.start()
    while worker.is_alive():
        turns += 1
        time.sleep(0.001)
    assert turns > 5


def test_selects_by_isa():
    """Every ISA draws the same text from the same seed, but for draws that rounding decides."""
    model = model_of(65, 33, dtype=torch.float64)
    args = arguments(model, *inputs(65, 300, 2))
    texts = []
    for name in charrnn_fast.available_isas():
        with charrnn_fast.use_isa(name):
            texts.append(ops.generate(*args)[0])
    assert all(torch.equal(text, texts[0]) for text in texts)
