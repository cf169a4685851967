"""What a module is beside its computation: construction, state, copies, hooks, weight lists."""

import copy
import io
import pickle

import pytest
import torch
from helpers import pair
from torch import nn

import charrnn_fast


def test_constructor_takes_the_same_arguments():
    """Positional and keyword arguments, device and dtype mean what they mean in nn.RNN."""
    positional = (3, 5, 2, "relu", False, True, 0.25, True)
    keywords = dict(
        zip(
            [
                "input_size",
                "hidden_size",
                "num_layers",
                "nonlinearity",
                "bias",
                "batch_first",
                "dropout",
                "bidirectional",
            ],
            positional,
            strict=True,
        )
    )
    for ours in (
        charrnn_fast.RNN(*positional, device="cpu", dtype=torch.float64),
        charrnn_fast.RNN(**keywords, device="cpu", dtype=torch.float64),
    ):
        stock = nn.RNN(*positional, device="cpu", dtype=torch.float64)
        assert repr(ours) == repr(stock)
        assert ours.__dict__.keys() == stock.__dict__.keys()
        for name in (*keywords, "mode"):
            assert getattr(ours, name) == getattr(stock, name), name
        assert [p.dtype for p in ours.parameters()] == [torch.float64] * 8
        assert isinstance(ours, nn.RNN)


def test_same_seed_same_weights():
    """The parameters are drawn as nn.RNN draws them."""
    torch.manual_seed(3)
    stock = nn.RNN(3, 5, 2, bidirectional=True)
    torch.manual_seed(3)
    ours = charrnn_fast.RNN(3, 5, 2, bidirectional=True)
    for a, b in zip(ours.parameters(), stock.parameters(), strict=True):
        assert torch.equal(a, b)


def test_sigmoid_shows_in_repr():
    """A sigmoid network says so; it is not nn.RNN's default."""
    assert "sigmoid" in repr(charrnn_fast.RNN(2, 3, nonlinearity="sigmoid"))
    assert charrnn_fast.RNN(2, 3, 1, "sigmoid").nonlinearity == "sigmoid"


def test_weight_lists():
    """all_weights, _flat_weights and flatten_parameters are nn.RNN's."""
    stock, ours = pair(3, 5, 2, bidirectional=True)
    ours.flatten_parameters()
    assert [len(w) for w in ours.all_weights] == [len(w) for w in stock.all_weights]
    assert ours._flat_weights_names == stock._flat_weights_names
    assert all(a is b for a, b in zip(ours._flat_weights, ours.parameters(), strict=True))


def test_state_dict_both_ways():
    """A state_dict of either module loads into the other, through a file too."""
    stock, ours = nn.RNN(3, 5, 2), charrnn_fast.RNN(3, 5, 2)
    stock.load_state_dict(ours.state_dict())
    buffer = io.BytesIO()
    torch.save(stock.state_dict(), buffer)
    buffer.seek(0)
    other = charrnn_fast.RNN(3, 5, 2)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    x = torch.randn(4, 2, 3)
    assert torch.equal(ours(x)[0], other(x)[0])
    torch.testing.assert_close(ours(x)[0], stock(x)[0])


@pytest.mark.parametrize("nonlinearity", ["tanh", "sigmoid"])
def test_copies(nonlinearity):
    """deepcopy and pickle give a module of the same results with weights of its own."""
    ours = charrnn_fast.RNN(3, 5, 2, nonlinearity)
    x = torch.randn(4, 2, 3)
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    for copied in (
        copy.deepcopy(ours),
        pickle.loads(pickle.dumps(ours)),
        torch.load(buffer, weights_only=False),
    ):
        assert type(copied) is charrnn_fast.RNN
        assert torch.equal(copied(x)[0], ours(x)[0])
        with torch.no_grad():
            copied.weight_hh_l0.zero_()
        assert not torch.equal(copied(x)[0], ours(x)[0])


def test_subclass():
    """A subclass may override forward and call ours by super()."""

    class Residual(charrnn_fast.RNN):
        def forward(self, input, hx=None):
            output, h_n = super().forward(input, hx)
            return output + input, h_n

    rnn = Residual(4, 4)
    x = torch.randn(3, 2, 4)
    plain = charrnn_fast.RNN(4, 4)
    plain.load_state_dict(rnn.state_dict())
    assert torch.equal(rnn(x)[0], plain(x)[0] + x)


def test_hooks_run():
    """Forward hooks, pre-hooks and full backward hooks see what nn.RNN's see."""
    seen = []
    for module in pair(3, 5):
        calls = []
        module.register_forward_pre_hook(lambda m, a, c=calls: c.append(len(a)))
        module.register_forward_hook(lambda m, a, o, c=calls: c.append(o[0].shape))
        module.register_full_backward_hook(lambda m, gi, go, c=calls: c.append(go[0].shape))
        module(torch.randn(4, 2, 3, requires_grad=True))[0].sum().backward()
        seen.append(calls)
    assert seen[0] == seen[1]
    assert len(seen[0]) == 3
