"""replace_rnn: what it swaps, what it keeps, what it reports, and how it is undone."""

import pytest
import torch
from kinds import KINDS, flat
from torch import nn

from charrnn_fast import replace_rnn
from charrnn_fast.ops import assert_fused


class Model(nn.Module):
    """Recurrent modules of one kind, nested."""

    def __init__(self, kind):
        super().__init__()
        self.encoder = nn.ModuleList(
            [kind.stock(3, 5, 2, dropout=0.3), kind.stock(5, 5, bias=False)]
        )
        self.cell = kind.stock_cell(5, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        for rnn in self.encoder:
            x, _ = rnn(x)
        return self.head(flat(self.cell(x[-1]))[0])


def test_in_place(kind):
    """Modules stay the objects they were: parameters, hooks, flags and optimizer references."""
    model = Model(kind).eval()
    x = torch.randn(4, 2, 3)
    want = model(x)
    calls = []
    model.encoder[0].register_forward_hook(lambda *_: calls.append(1))
    modules, parameters = list(model.modules()), list(model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    report = replace_rnn(model)
    assert report.changed == ["encoder.0", "encoder.1", "cell"]
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert not any(module.training for module in model.modules())
    assert type(model.encoder[0]) is kind.ours
    assert type(model.cell) is kind.cell
    with assert_fused():
        got = model(x)
        got.sum().backward()
    torch.testing.assert_close(got, want)
    assert calls == [1]
    optimizer.step()
    assert not torch.equal(model(x), got)


def test_undo(kind):
    """undo() gives the old classes back; training goes on with the same parameters."""
    model = Model(kind).eval()
    keys = list(model.state_dict())
    report = replace_rnn(model)
    x = torch.randn(4, 2, 3)
    got = model(x)
    report.undo()
    assert [type(m) for m in model.encoder] == [kind.stock, kind.stock]
    assert type(model.cell) is kind.stock_cell
    torch.testing.assert_close(model(x), got)
    assert list(model.state_dict()) == keys


def test_every_kind_in_one_model():
    """One call swaps modules and cells of every kind; copies and pickles of them are ours, too."""
    model = nn.ModuleDict()
    for kind in KINDS:
        model[f"{kind}"] = kind.stock(3, 5)
        model[f"{kind}Cell"] = kind.stock_cell(3, 5)
    assert sorted(replace_rnn(model).changed) == sorted(model)
    for name, module in model.items():
        assert type(module).__name__ == name
        assert type(module).__module__.startswith("charrnn_fast")


def test_report(kind):
    """What was left is named with its reason; the text has a line for each."""

    class Own(kind.stock):
        pass

    model = nn.ModuleDict({"own": Own(3, 5), "ours": kind.ours(3, 5), "rnn": kind.stock(3, 5)})
    report = replace_rnn(model)
    assert report.changed == ["rnn"]
    assert report.left.keys() == {"own", "ours"}
    assert "subclass" in report.left["own"]
    assert "already" in report.left["ours"]
    assert len(str(report).splitlines()) == 3
    assert f" to charrnn_fast.{kind.ours.__name__}\n" in str(report)
    assert type(model["own"]) is Own


def test_the_model_itself(kind):
    """A bare module is replaced, too; a model without any is warned of."""
    rnn = kind.stock(3, 5)
    assert "the model itself" in str(replace_rnn(rnn))
    assert isinstance(rnn, kind.ours)
    with pytest.warns(UserWarning, match="no recurrent module"):
        replace_rnn(nn.Linear(2, 2))


def test_shared_module(kind):
    """A module that is used twice is swapped once."""
    rnn = kind.stock(3, 5)
    report = replace_rnn(nn.ModuleList([rnn, rnn]))
    assert report.changed == ["0"]


def test_parametrized(kind):
    """A parametrized module has a class of its own, and is left with that reason."""

    class Positive(nn.Module):
        def forward(self, weight):
            return weight.abs()

    model = nn.Sequential(kind.stock(3, 5))
    nn.utils.parametrize.register_parametrization(model[0], "weight_hh_l0", Positive())
    report = replace_rnn(model)
    assert "0" in report.changed or "0" in report.left
    assert model(torch.randn(4, 2, 3))[0].shape == (4, 2, 5)
