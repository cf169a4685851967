"""Wrong arguments raise what torch.nn raises: the same type, naming the same sizes."""

import re

import pytest
import torch
from helpers import call_op
from kinds import KINDS, each, flat
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import charrnn_fast

X = torch.zeros(4, 2, 3)


def raised(call):
    """The exception of a call, which must not pass."""
    with pytest.raises(Exception) as caught:  # noqa: PT011  the type is what is compared
        call()
    return caught.value


# Calls of a module (3, 5, 2); `s` makes zeros of a state of its kind.
CALLS = {
    "4-D input": lambda m, s: m(torch.zeros(1, 4, 2, 3)),
    "1-D input": lambda m, s: m(torch.zeros(3)),
    "0-D input": lambda m, s: m(torch.tensor(1.0)),
    "wrong input size": lambda m, s: m(torch.zeros(4, 2, 7)),
    "wrong input size, unbatched": lambda m, s: m(torch.zeros(4, 7)),
    "double input": lambda m, s: m(X.double()),
    "half input": lambda m, s: m(X.half()),
    "integer input": lambda m, s: m(X.long()),
    "int32 input": lambda m, s: m(X.int()),
    "bool input": lambda m, s: m(X.bool()),
    "no steps": lambda m, s: m(torch.zeros(0, 2, 3)),
    "2-D hx for a batch": lambda m, s: m(X, s(2, 5)),
    "3-D hx for one sequence": lambda m, s: m(X[:, 0], s(2, 1, 5)),
    "4-D hx": lambda m, s: m(X, s(1, 2, 2, 5)),
    "hx of another batch": lambda m, s: m(X, s(2, 7, 5)),
    "hx of another size": lambda m, s: m(X, s(2, 2, 6)),
    "hx of other layers": lambda m, s: m(X, s(1, 2, 5)),
    "double hx": lambda m, s: m(X, each(torch.Tensor.double, s(2, 2, 5))),
    "meta hx": lambda m, s: m(X, each(lambda t: t.to("meta"), s(2, 2, 5))),
    "packed of another size": lambda m, s: m(pack_sequence([torch.zeros(4, 7)])),
    "packed with hx of another batch": lambda m, s: m(
        pack_sequence([torch.zeros(4, 3)]), s(2, 2, 5)
    ),
    "packed double": lambda m, s: m(pack_sequence([torch.zeros(4, 3).double()])),
    "packed 3-D": lambda m, s: m(PackedSequence(torch.zeros(4, 2, 3), torch.ones(4).long())),
    "packed without steps": lambda m, s: m(
        PackedSequence(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
    ),
    "hx that is a tuple of one": lambda m, s: m(X, (torch.zeros(2, 2, 5),)),
    "hx of three": lambda m, s: m(X, (torch.zeros(2, 2, 5),) * 3),
    "hx of two": lambda m, s: m(X, (torch.zeros(2, 2, 5), torch.zeros(2, 2, 6))),
    "hx of h and None": lambda m, s: m(X, (torch.zeros(2, 2, 5), None)),
    "hx that is a string": lambda m, s: m(X, "hx"),
    "hx that is one tensor of another size": lambda m, s: m(X, torch.zeros(3, 2, 5)),
    "no input": lambda m, s: m(),
    "input of None": lambda m, s: m(None),
    "input that is a list": lambda m, s: m([1.0]),
}
# What is wrong with one of two states.
STATES = {
    "c of another size": lambda h: (h, torch.zeros(2, 2, 6)),
    "c of another batch": lambda h: (h, torch.zeros(2, 3, 5)),
    "c of other layers": lambda h: (h, torch.zeros(1, 2, 5)),
    "2-D c": lambda h: (h, torch.zeros(2, 5)),
    "2-D h": lambda h: (torch.zeros(2, 5), h),
    "h of another size": lambda h: (torch.zeros(2, 2, 6), h),
    "double c": lambda h: (h, h.double()),
    "double h": lambda h: (h.double(), h),
    "meta c": lambda h: (h, h.to("meta")),
    "one tensor": lambda h: h,
}
# torch.nn's words name other numbers there, or none.
OTHER_NUMBERS = ("double hx", "no input", "packed without steps", "double c", "double h")
if torch.__version__.startswith("2.9."):
    OTHER_NUMBERS += ("packed of another size", "c of another batch")
    # Its own LSTM reads memory that c lacks; see test_c_that_torch_dies_of.
    del STATES["c of other layers"], STATES["meta c"]


def assert_same_refusal(call, stock, ours, numbers=True):
    """Both refuse, by the same type of exception, and name the same sizes.

    Ours refuses also what nn.LSTM does not look at, where it computes with what lies past the end.
    """
    got = raised(lambda: call(ours))
    try:
        call(stock)
    except Exception as error:
        want = error
    else:
        assert isinstance(got, (RuntimeError, ValueError)), got
        assert re.search(r"\d+", str(got)), got
        return
    assert type(got) is type(want), f"{got!r} but torch.nn: {want!r}"
    if numbers:
        assert re.findall(r"\d+", str(got)) == re.findall(r"\d+", str(want)), (got, want)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("call", CALLS)
def test_call_errors(kind, call, grad):
    """Type and sizes of the error are those of torch.nn's."""
    stock, ours = kind.pair(3, 5, 2)
    with torch.set_grad_enabled(grad):
        assert_same_refusal(
            lambda m: CALLS[call](m, lambda *shape: kind.state(*shape, make=torch.zeros)),
            stock,
            ours,
            call not in OTHER_NUMBERS,
        )


@pytest.mark.parametrize("call", STATES)
def test_errors_of_one_state_of_two(call):
    """An LSTM's h or c alone is wrong: the error is nn.LSTM's, batched and packed."""
    for kind in KINDS:
        if kind.has_cell_state:
            stock, ours = kind.pair(3, 5, 2)
            hx = STATES[call](torch.zeros(2, 2, 5))
            numbers = call not in OTHER_NUMBERS
            assert_same_refusal(lambda m: m(X, hx), stock, ours, numbers)
            packed = pack_sequence([torch.zeros(4, 3)] * 2)
            assert_same_refusal(lambda m: m(packed, hx), stock, ours, numbers)


def test_c_that_torch_dies_of():
    """A c of another device or of fewer layers: torch 2.9's own LSTM reads memory that it lacks."""
    ours, cell = charrnn_fast.LSTM(3, 5, 2), charrnn_fast.LSTMCell(3, 5)
    h = torch.zeros(2, 2, 5)
    packed = pack_sequence([torch.zeros(4, 3)] * 2)
    for input in (X, packed):
        with pytest.raises(RuntimeError, match="not at the same device.*meta"):
            ours(input, (h, h.to("meta")))
        with pytest.raises((RuntimeError, IndexError), match=r"\[1, 2, 5\]"):
            ours(input, (h, h[:1]))
    with pytest.raises(RuntimeError, match="device.*meta"):
        cell(torch.zeros(2, 3), (h[0], h[0].to("meta")))


CONSTRUCTIONS = {
    "unknown nonlinearity": lambda cls: cls(3, 5, nonlinearity="gelu"),
    "unknown positional nonlinearity": lambda cls: cls(3, 5, 1, "gelu"),
    "proj_size": lambda cls: cls(3, 5, proj_size=2),
    "dropout of 2": lambda cls: cls(3, 5, dropout=2.0),
    "dropout of True": lambda cls: cls(3, 5, 2, dropout=True),
    "no hidden units": lambda cls: cls(3, 0),
    "no inputs": lambda cls: cls(0, 5),
    "no layers": lambda cls: cls(3, 5, 0),
    "float hidden size": lambda cls: cls(3, 5.0),
    "bias of 1": lambda cls: cls(3, 5, bias=1),
    "unknown keyword": lambda cls: cls(3, 5, hidden=2),
    "too few": lambda cls: cls(3),
}


@pytest.mark.parametrize("construct", CONSTRUCTIONS)
def test_constructor_errors(kind, construct):
    """The constructor refuses what torch.nn's refuses."""
    try:
        CONSTRUCTIONS[construct](kind.stock)
    except Exception as error:
        want = error
    else:  # an older torch accepts some of them, and LSTM a projection
        CONSTRUCTIONS[construct](kind.ours)
        return
    got = raised(lambda: CONSTRUCTIONS[construct](kind.ours))
    assert type(got) is type(want)
    assert re.findall(r"\d+", str(got)) == re.findall(r"\d+", str(want))


def test_dropout_warning(kind):
    """Dropout that drops nothing is warned of, as by torch.nn."""
    with pytest.warns(UserWarning, match="num_layers greater than 1"):
        kind.ours(3, 5, dropout=0.5)


CELL_CALLS = {
    "3-D input": lambda c, s: c(torch.zeros(1, 2, 3)),
    "0-D input": lambda c, s: c(torch.tensor(1.0)),
    "wrong input size": lambda c, s: c(torch.zeros(2, 7)),
    "wrong hx size": lambda c, s: c(torch.zeros(2, 3), s(2, 7)),
    "3-D hx": lambda c, s: c(torch.zeros(2, 3), s(1, 2, 5)),
    "1-D hx for a batch": lambda c, s: c(torch.zeros(2, 3), s(5)),
    "double input": lambda c, s: c(torch.zeros(2, 3).double()),
    "double hx": lambda c, s: c(torch.zeros(2, 3), each(torch.Tensor.double, s(2, 5))),
    "2-D ids": lambda c, s: c(torch.zeros(2, 3).long()),
    "weight of another size": lambda c, s: (
        setattr(c, "weight_hh", nn.Parameter(torch.zeros(5, 4))),
        c(torch.zeros(2, 3)),
    ),
    "hx of another batch": lambda c, s: c(torch.zeros(2, 3), s(4, 5)),
    "hx a tuple of one": lambda c, s: c(torch.zeros(2, 3), (torch.zeros(2, 5),)),
    "hx of two sizes": lambda c, s: c(torch.zeros(2, 3), (torch.zeros(2, 5), torch.zeros(2, 6))),
    "hx a string": lambda c, s: c(torch.zeros(2, 3), "hx"),
    "no input": lambda c, s: c(),
}


@pytest.mark.parametrize("call", CELL_CALLS)
def test_cell_errors(kind, call):
    """The errors of a cell have the type of those of torch.nn's."""
    stock, ours = kind.cells(3, 5)
    assert_same_refusal(
        lambda m: CELL_CALLS[call](m, lambda *shape: kind.state(*shape, make=torch.zeros)),
        stock,
        ours,
        numbers=False,
    )


def test_cell_nonlinearity():
    """An unknown nonlinearity is refused when the cell runs, as by nn.RNNCell."""
    for cls in (nn.RNNCell, charrnn_fast.RNNCell):
        with pytest.raises(RuntimeError, match="Unknown nonlinearity: gelu"):
            cls(3, 5, nonlinearity="gelu")(torch.zeros(2, 3))


def test_nonlinearity_names_the_choices():
    """The message of an unknown nonlinearity names all three; the type is torch.nn's."""
    choices = "'tanh', 'relu' or 'sigmoid'"
    for unknown in ("gelu", None, ["tanh"]):
        with pytest.raises(ValueError, match=choices):
            charrnn_fast.RNN(3, 5, nonlinearity=unknown)
        with pytest.raises(RuntimeError, match=choices):
            charrnn_fast.RNNCell(3, 5, nonlinearity=unknown)(torch.zeros(2, 3))


OTHER_IDS = {
    "padded": lambda m, c, ids: m(ids),
    "unbatched": lambda m, c, ids: m(ids[:, 0]),
    "packed": lambda m, c, ids: m(PackedSequence(ids[:, 0], torch.ones(4).long())),
    "a step": lambda m, c, ids: c(ids[0]),
    "an unbatched step": lambda m, c, ids: c(ids[0, 0]),
}


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8], ids=str)
@pytest.mark.parametrize("call", OTHER_IDS)
def test_ids_of_another_dtype(kind, call, dtype):
    """Token ids are int64: the error says so, where torch.nn's says to convert them to floats."""
    ids = torch.zeros(4, 2, dtype=dtype)
    (stock, ours), (stock_cell, cell) = kind.pair(3, 5), kind.cells(3, 5)
    want = raised(lambda: OTHER_IDS[call](stock, stock_cell, ids))
    got = raised(lambda: OTHER_IDS[call](ours, cell, ids))
    assert type(got) is type(want)
    assert re.search(rf"{dtype} .*token ids, which are int64.*input\.long\(\)", str(got))


SPARSE = {
    "input": lambda m, x, h: m(x.to_sparse()),
    "hx": lambda m, x, h: m(x, each(torch.Tensor.to_sparse, h)),
}


@pytest.mark.parametrize("argument", SPARSE)
@pytest.mark.parametrize("is_cell", [False, True])
def test_sparse_tensors(kind, argument, is_cell):
    """A sparse input or state is computed where torch.nn does; the error names the argument."""
    stock, ours = (kind.cells if is_cell else kind.pair)(3, 5)
    x = torch.ones((2, 3) if is_cell else (4, 2, 3))
    h = kind.state(*((2, 5) if is_cell else (1, 2, 5)))
    call = SPARSE[argument]
    try:
        want = flat(call(stock, x, h))
    except RuntimeError as error:
        refusal = error
    else:
        torch.testing.assert_close(flat(call(ours, x, h)), want)
        return
    got = raised(lambda: call(ours, x, h))
    assert type(got) is type(refusal)
    assert f"{argument} must be a dense tensor, got a torch.sparse_coo one" in str(got)


@pytest.mark.parametrize("argument", ["input", "hx", "lengths", "resets"])
def test_sparse_tensors_beyond_torch(kind, argument):
    """What torch.nn does not know is never sparse, nor is anything beside it."""
    rnn, cell = kind.ours(3, 5), kind.cell(3, 5)
    given = {
        "input": torch.ones(4, 2, 3),
        "hx": kind.state(1, 2, 5),
        "lengths": torch.tensor([4, 1]),
        "resets": torch.ones(4, 2) > 0,
    }
    given[argument] = each(torch.Tensor.to_sparse, given[argument])
    with pytest.raises(RuntimeError, match=f"{argument} must be a dense tensor"):
        rnn(**given)
    if argument == "lengths":
        return
    step = {
        "input": torch.ones(2, 3),
        "hx": kind.state(2, 5),
        "reset": torch.ones(2) > 0,
    }
    name = argument.removesuffix("s")
    step[name] = each(torch.Tensor.to_sparse, step[name])
    with pytest.raises(RuntimeError, match=f"{name} must be a dense tensor"):
        cell(**step)


@pytest.mark.parametrize(
    ("is_cell", "keyword", "hint"),
    [
        (False, "reset", "resets"),
        (False, "length", "lengths"),
        (True, "resets", "reset"),
        (True, "lengths", "one step"),
    ],
)
def test_misnomers(kind, is_cell, keyword, hint):
    """A keyword of the other kind of class is a TypeError that tells what it is called here."""
    module = (kind.cell if is_cell else kind.ours)(3, 5)
    x = torch.zeros((2, 3) if is_cell else (4, 2, 3))
    with pytest.raises(TypeError, match=rf"unexpected keyword argument '{keyword}'.*\(.*{hint}"):
        module(x, **{keyword: torch.zeros(2) > 0})


def test_misnomers_of_a_subclass(kind):
    """A forward of one's own may call its arguments as it likes."""

    class Own(kind.ours):
        def forward(self, input, reset=None):
            return super().forward(input, resets=reset)

    own = Own(3, 5)
    reset = torch.ones(4, 2) > 0
    torch.testing.assert_close(own(X + 1, reset=reset)[0], own.forward(X + 1, reset)[0])
    assert not torch.equal(own(X + 1, reset=reset)[0], own(X + 1)[0])


@pytest.mark.parametrize(
    "hx",
    [torch.zeros(2, 5), torch.zeros(3, 5), (torch.zeros(2, 5),), "hx"],
    ids=["tensor of two rows", "tensor", "tuple of one", "string"],
)
def test_states_of_a_cell_with_reset(hx):
    """One tensor, or anything else that is no pair, is refused as such."""
    cell = charrnn_fast.LSTMCell(3, 5)
    with pytest.raises(RuntimeError, match=r"LSTMCell: hx must be a pair \(h_0, c_0\), got"):
        cell(torch.zeros(2, 3), hx, torch.zeros(2) > 0)


@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        (torch.tensor([4, 5]), ValueError, r"\[1, 4\].*got 5 for sequence 1"),
        (torch.tensor([0, 2]), ValueError, r"\[1, 4\].*got 0 for sequence 0"),
        (torch.tensor([4]), RuntimeError, r"lengths of size \[2\], got \[1\]"),
        (torch.tensor([4.0, 1.0]), RuntimeError, "int64"),
        (torch.tensor([[4, 1]]), RuntimeError, "2-D"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lengths_errors(kind, lengths, error, message, dtype):
    """A wrong lengths names the sequence, its length and what is allowed."""
    rnn = kind.ours(3, 5, dtype=dtype)
    with pytest.raises(error, match=message):
        rnn(X.to(dtype), lengths=lengths)


def test_lengths_with_packed(kind):
    """A packed sequence has lengths already."""
    rnn = kind.ours(3, 5)
    with pytest.raises(ValueError, match="PackedSequence"):
        rnn(pack_sequence([torch.zeros(4, 3)]), lengths=torch.tensor([4]))


def test_errors_of_the_ops():
    """Called directly, the ops check everything, and name what is wrong."""
    W_ih, W_hh, b = torch.zeros(5, 3), torch.zeros(5, 5), torch.zeros(5)

    def call(
        input=X, hx=None, weights=(W_ih, W_hh, b, b), sizes=None, lengths=None, mode="RNN_TANH"
    ):
        return call_op(
            "rnn_layer",
            input=input,
            hx=hx,
            weights=list(weights),
            batch_sizes=sizes,
            lengths=lengths,
            mode=mode,
            has_biases=True,
        )

    with pytest.raises(RuntimeError, match="token ids, which are int64"):
        call(torch.zeros(4, 2, dtype=torch.int32))
    with pytest.raises(ValueError, match="RNN_GELU"):
        call(mode="RNN_GELU")
    with pytest.raises(RuntimeError, match="weights must hold 4 .* got 3"):
        call(weights=(W_ih, W_hh, b))
    with pytest.raises(RuntimeError, match=r"weight_hh of size \[5, 5\], got \[4, 5\]"):
        call(weights=(W_ih, W_hh[:4], b, b))
    with pytest.raises(RuntimeError, match=r"bias_hh of size \[5\], got \[4\]"):
        call(weights=(W_ih, W_hh, b, b[:4]))
    with pytest.raises(RuntimeError, match="bias_ih dtype"):
        call(weights=(W_ih, W_hh, b.double(), b))
    with pytest.raises(RuntimeError, match="never rise"):
        call(torch.zeros(3, 3), sizes=torch.tensor([1, 2]))
    with pytest.raises(RuntimeError, match="add up to 3 rows, but input has 4"):
        call(torch.zeros(4, 3), sizes=torch.tensor([2, 1]))
    with pytest.raises(RuntimeError, match=r"hidden of size \[1, 2, 5\], got \[1, 2, 4\]"):
        call(hx=torch.zeros(1, 2, 4))


def test_unknown_isa():
    """An ISA that is unknown or not supported is a ValueError that lists the choices."""
    with pytest.raises(ValueError, match="sse9.*baseline"):
        charrnn_fast.use_isa("sse9")
