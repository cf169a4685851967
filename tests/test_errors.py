"""Wrong arguments raise what nn.RNN raises: the same type, naming the same sizes."""

import re

import pytest
import torch
from helpers import cells, pair
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import charrnn_fast

X = torch.zeros(4, 2, 3)


def raised(call):
    """The exception of a call, which must not pass."""
    with pytest.raises(Exception) as caught:  # noqa: PT011  the type is what is compared
        call()
    return caught.value


CALLS = {
    "4-D input": lambda m: m(torch.zeros(1, 4, 2, 3)),
    "1-D input": lambda m: m(torch.zeros(3)),
    "0-D input": lambda m: m(torch.tensor(1.0)),
    "wrong input size": lambda m: m(torch.zeros(4, 2, 7)),
    "wrong input size, unbatched": lambda m: m(torch.zeros(4, 7)),
    "double input": lambda m: m(X.double()),
    "half input": lambda m: m(X.half()),
    "integer input": lambda m: m(X.long()),
    "int32 input": lambda m: m(X.int()),
    "bool input": lambda m: m(X.bool()),
    "no steps": lambda m: m(torch.zeros(0, 2, 3)),
    "2-D hx for a batch": lambda m: m(X, torch.zeros(2, 5)),
    "3-D hx for one sequence": lambda m: m(X[:, 0], torch.zeros(2, 1, 5)),
    "hx of another batch": lambda m: m(X, torch.zeros(2, 7, 5)),
    "hx of another size": lambda m: m(X, torch.zeros(2, 2, 6)),
    "hx of other layers": lambda m: m(X, torch.zeros(1, 2, 5)),
    "double hx": lambda m: m(X, torch.zeros(2, 2, 5).double()),
    "packed of another size": lambda m: m(pack_sequence([torch.zeros(4, 7)])),
    "packed with hx of another batch": lambda m: m(
        pack_sequence([torch.zeros(4, 3)]), torch.zeros(2, 2, 5)
    ),
    "packed double": lambda m: m(pack_sequence([torch.zeros(4, 3).double()])),
    "packed 3-D": lambda m: m(PackedSequence(torch.zeros(4, 2, 3), torch.ones(4).long())),
    "packed without steps": lambda m: m(
        PackedSequence(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
    ),
    "hx that is a tuple": lambda m: m(X, (torch.zeros(2, 2, 5),)),
    "no input": lambda m: m(),
    "input of None": lambda m: m(None),
    "input that is a list": lambda m: m([1.0]),
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("call", CALLS)
def test_call_errors(call, grad):
    """Type and sizes of the error are those of nn.RNN's."""
    stock, ours = pair(3, 5, 2)
    with torch.set_grad_enabled(grad):
        want = raised(lambda: CALLS[call](stock))
        got = raised(lambda: CALLS[call](ours))
    assert type(got) is type(want), f"{got!r} but nn.RNN: {want!r}"
    if call not in ("double hx", "no input", "packed without steps"):
        assert re.findall(r"\d+", str(got)) == re.findall(r"\d+", str(want)), (got, want)


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
def test_constructor_errors(construct):
    """The constructor refuses what nn.RNN's refuses."""
    try:
        CONSTRUCTIONS[construct](nn.RNN)
    except Exception as error:
        want = error
    else:  # torch 2.9 accepts some of them
        CONSTRUCTIONS[construct](charrnn_fast.RNN)
        return
    got = raised(lambda: CONSTRUCTIONS[construct](charrnn_fast.RNN))
    assert type(got) is type(want)
    assert re.findall(r"\d+", str(got)) == re.findall(r"\d+", str(want))


def test_dropout_warning():
    """Dropout that drops nothing is warned of, as by nn.RNN."""
    with pytest.warns(UserWarning, match="num_layers greater than 1"):
        charrnn_fast.RNN(3, 5, dropout=0.5)


CELL_CALLS = {
    "3-D input": lambda c: c(torch.zeros(1, 2, 3)),
    "0-D input": lambda c: c(torch.tensor(1.0)),
    "wrong input size": lambda c: c(torch.zeros(2, 7)),
    "wrong hx size": lambda c: c(torch.zeros(2, 3), torch.zeros(2, 7)),
    "3-D hx": lambda c: c(torch.zeros(2, 3), torch.zeros(1, 2, 5)),
    "double input": lambda c: c(torch.zeros(2, 3).double()),
    "2-D ids": lambda c: c(torch.zeros(2, 3).long()),
    "weight of another size": lambda c: (
        setattr(c, "weight_hh", nn.Parameter(torch.zeros(5, 4))),
        c(torch.zeros(2, 3)),
    ),
    "hx of another batch": lambda c: c(torch.zeros(2, 3), torch.zeros(4, 5)),
}


@pytest.mark.parametrize("call", CELL_CALLS)
def test_cell_errors(call):
    """RNNCell's errors have the type of nn.RNNCell's."""
    stock, ours = cells(3, 5)
    want = raised(lambda: CELL_CALLS[call](stock))
    got = raised(lambda: CELL_CALLS[call](ours))
    assert type(got) is type(want), f"{got!r} but nn.RNNCell: {want!r}"


def test_cell_nonlinearity():
    """An unknown nonlinearity is refused when the cell runs, as by nn.RNNCell."""
    for cls in (nn.RNNCell, charrnn_fast.RNNCell):
        with pytest.raises(RuntimeError, match="Unknown nonlinearity: gelu"):
            cls(3, 5, nonlinearity="gelu")(torch.zeros(2, 3))


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
def test_lengths_errors(lengths, error, message, dtype):
    """A wrong lengths names the sequence, its length and what is allowed."""
    rnn = charrnn_fast.RNN(3, 5, dtype=dtype)
    with pytest.raises(error, match=message):
        rnn(X.to(dtype), lengths=lengths)


def test_lengths_with_packed():
    """A packed sequence has lengths already."""
    rnn = charrnn_fast.RNN(3, 5)
    with pytest.raises(ValueError, match="PackedSequence"):
        rnn(pack_sequence([torch.zeros(4, 3)]), lengths=torch.tensor([4]))


def test_errors_of_the_ops():
    """Called directly, the ops check everything, and name what is wrong."""
    W_ih, W_hh, b = torch.zeros(5, 3), torch.zeros(5, 5), torch.zeros(5)
    layer = torch.ops.charrnn_fast.rnn_layer

    def call(
        input=X, hx=None, weights=(W_ih, W_hh, b, b), sizes=None, lengths=None, mode="RNN_TANH"
    ):
        return layer(input, hx, list(weights), sizes, lengths, mode, True)

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
