"""What a module is beside its computation: construction, weights, copies, results of its own."""

import copy
import io
import pickle

import pytest
import torch
from helpers import assert_same, run
from kinds import VARIANTS, flat
from torch import nn

import charrnn_fast


def constructions():
    """Arguments in the order of their positions, where nn.RNN alone has its nonlinearity."""
    for kind, variant in VARIANTS:
        own = {"nonlinearity": "tanh"} | variant if kind.name == "RNN" else {}
        sizes = {"input_size": 3, "hidden_size": 5}
        yield kind, sizes
        yield (
            kind,
            sizes
            | {"num_layers": 2}
            | own
            | {"bias": False, "batch_first": True, "dropout": 0.25, "bidirectional": True},
        )


@pytest.mark.parametrize(("kind", "keywords"), list(constructions()), ids=str)
def test_constructor_takes_the_same_arguments(kind, keywords):
    """Positional and keyword arguments, device and dtype mean what they mean in torch.nn."""
    stock = kind.stock(**keywords, device="cpu", dtype=torch.float64)
    for ours in (
        kind.ours(**keywords, device="cpu", dtype=torch.float64),
        kind.ours(*keywords.values(), device="cpu", dtype=torch.float64),
    ):
        assert repr(ours) == repr(stock)
        assert ours.__dict__.keys() == stock.__dict__.keys()
        for name in (*keywords, "mode", "proj_size"):
            assert getattr(ours, name) == getattr(stock, name), name
        assert [p.shape for p in ours.parameters()] == [p.shape for p in stock.parameters()]
        assert {p.dtype for p in ours.parameters()} == {torch.float64}
        assert isinstance(ours, kind.stock)


def test_constructor_of_the_cell(kind):
    """The cell's arguments, positional and by keyword, are those of torch.nn's cell."""
    for args, kwargs in (
        ((3, 5), {}),
        ((3, 5, False), {}),
        ((), {"input_size": 3, "hidden_size": 5, "bias": False, "dtype": torch.float64}),
    ):
        ours, stock = kind.cell(*args, **kwargs), kind.stock_cell(*args, **kwargs)
        assert repr(ours) == repr(stock)
        assert ours.__dict__.keys() == stock.__dict__.keys()
        assert [n for n, _ in ours.named_parameters()] == [n for n, _ in stock.named_parameters()]
        assert {p.dtype for p in ours.parameters()} == {p.dtype for p in stock.parameters()}
        assert isinstance(ours, kind.stock_cell)


@pytest.mark.parametrize("is_cell", [False, True])
def test_same_seed_same_weights(kind, is_cell):
    """The parameters are drawn as torch.nn draws them, and the generator is left where it was."""
    found = []
    for cls in (kind.stock_cell, kind.cell) if is_cell else (kind.stock, kind.ours):
        torch.manual_seed(3)
        module = cls(3, 5) if is_cell else cls(3, 5, 2, bidirectional=True)
        found.append([*module.parameters(), torch.rand(1)])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_sigmoid_shows_in_repr():
    """A sigmoid network says so; it is not nn.RNN's default."""
    assert "sigmoid" in repr(charrnn_fast.RNN(2, 3, nonlinearity="sigmoid"))
    assert charrnn_fast.RNN(2, 3, 1, "sigmoid").nonlinearity == "sigmoid"


def test_weight_lists(kind):
    """all_weights, _flat_weights and flatten_parameters are torch.nn's."""
    stock, ours = kind.pair(3, 5, 2, bidirectional=True)
    ours.flatten_parameters()
    assert [len(w) for w in ours.all_weights] == [len(w) for w in stock.all_weights]
    assert ours._flat_weights_names == stock._flat_weights_names
    assert all(a is b for a, b in zip(ours._flat_weights, ours.parameters(), strict=True))


def test_state_dict_both_ways(kind):
    """A state_dict of either module loads into the other, through a file too."""
    stock, ours = kind.stock(3, 5, 2), kind.ours(3, 5, 2)
    stock.load_state_dict(ours.state_dict())
    buffer = io.BytesIO()
    torch.save(stock.state_dict(), buffer)
    buffer.seek(0)
    other = kind.ours(3, 5, 2)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    x = torch.randn(4, 2, 3)
    assert torch.equal(ours(x)[0], other(x)[0])
    torch.testing.assert_close(ours(x)[0], stock(x)[0])


@pytest.mark.parametrize("is_cell", [False, True])
def test_copies(kind, is_cell):
    """deepcopy and pickle give a module of the same results with weights of its own."""
    ours = kind.cell(3, 5) if is_cell else kind.ours(3, 5, 2)
    if kind.name == "RNN":
        ours = type(ours)(3, 5, nonlinearity="sigmoid")
    weight = "weight_hh" if is_cell else "weight_hh_l0"
    x = torch.randn(4, 2, 3)[0 if is_cell else slice(None)]
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    for copied in (
        copy.deepcopy(ours),
        pickle.loads(pickle.dumps(ours)),
        torch.load(buffer, weights_only=False),
    ):
        assert type(copied) is type(ours)
        assert_same(run(copied, x), run(ours, x), rtol=0, atol=0)
        for name, parameter in copied.named_parameters():
            assert parameter.data_ptr() != ours.get_parameter(name).data_ptr()
        with torch.no_grad():
            copied.get_parameter(weight.replace("hh", "ih")).zero_()
        assert not torch.equal(flat(copied(x))[0], flat(ours(x))[0])


def untouched(module):
    pass


def hooked(module):
    module.register_forward_hook(lambda *args: None)


def normed(module):
    name = "weight_hh" if isinstance(module, nn.RNNCellBase) else "weight_hh_l0"
    nn.utils.parametrizations.weight_norm(module, name)


@pytest.mark.parametrize("change", [untouched, hooked, normed])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("layout", ["time first", "batch first", "cell"])
def test_results_are_no_views(kind, layout, change, autocast):
    """They may be detached in place, and made without and changed with gradients; so may most of
    torch.nn's, which are views where oneDNN's LSTM has the batch first.
    """
    if layout == "cell":
        module, x = kind.cell(3, 5), torch.randn(2, 3)
    else:
        module, x = kind.ours(3, 5, batch_first=layout == "batch first"), torch.randn(4, 2, 3)
    change(module)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        results = flat(module(x))
        with torch.no_grad():
            untracked = flat(module(x))
    for result in results:
        assert result.requires_grad
        result.detach_()
        assert not result.requires_grad
    for result in untracked:
        result.add_(torch.ones((), requires_grad=True))
        assert result.requires_grad


def test_subclass(kind):
    """A subclass may override forward and call ours by super()."""

    class Residual(kind.ours):
        def forward(self, input, hx=None):
            output, h_n = super().forward(input, hx)
            return output + input, h_n

    rnn = Residual(4, 4)
    x = torch.randn(3, 2, 4)
    plain = kind.ours(4, 4)
    plain.load_state_dict(rnn.state_dict())
    assert torch.equal(rnn(x)[0], plain(x)[0] + x)


def test_keywords_and_wrong_calls(kind):
    """Arguments by name mean the same, and errors of a call are those of forward."""
    rnn = kind.ours(3, 5)
    x, hx = torch.randn(4, 2, 3), kind.state(1, 2, 5)
    for result in (rnn(x, hx=hx), rnn(input=x, hx=hx), rnn(x, hx, None)):
        assert torch.equal(result[0], rnn(x, hx)[0])
    for args in ((), (x, hx, None, None, None, None, None)):
        with pytest.raises(TypeError, match="forward"):
            rnn(*args)
