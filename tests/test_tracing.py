"""What watches calls from outside: subclasses of Tensor, FX, TorchScript, FLOP counts."""

import io

import pytest
import torch
from helpers import assert_same, cells, pair, run
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.flop_counter import FlopCounterMode

import charrnn_fast
from charrnn_fast.ops import assert_fused

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")


class Tagged(Tensor):
    """A subclass by __torch_function__, as libraries make them."""


def test_torch_function_subclass():
    """A subclass of Tensor goes in and comes out as with nn.RNN."""
    stock, ours = pair(3, 5, 2)
    x = torch.randn(4, 2, 3).as_subclass(Tagged)
    got, want = ours(x), stock(x)
    assert [type(t) for t in got] == [type(t) for t in want]
    torch.testing.assert_close(got[0].as_subclass(Tensor), want[0].as_subclass(Tensor))


def test_torch_function_mode():
    """Who watches calls by a mode sees the op."""
    seen = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with Watch():
        charrnn_fast.RNN(3, 5)(torch.randn(4, 2, 3))
    assert any("charrnn_fast.rnn" in name for name in seen)


def test_default_device():
    """Inside torch.device(...), which is such a mode, calls run fused."""
    rnn, cell, x = charrnn_fast.RNN(3, 5), charrnn_fast.RNNCell(3, 5), torch.randn(4, 2, 3)
    with torch.device("cpu"), assert_fused():
        rnn(x)[0].sum().backward()
        cell(x[0]).sum().backward()
        assert charrnn_fast.explain(rnn, x).fused


def test_expanded_weights():
    """Per-sample gradients by ExpandedWeights, as Opacus asks for them."""
    results = []
    for module in pair(3, 5, batch_first=True):
        x = torch.linspace(-1, 1, 60).reshape(5, 4, 3)
        output, _ = call_for_per_sample_grads(module, batch_first=True)(x)
        output.square().sum().backward()
        results.append([p.grad_sample for p in module.parameters()])
    torch.testing.assert_close(results[1], results[0])
    assert results[1][0].shape == (5, 5, 3)


def test_fake_tensors():
    """FakeTensors flow through, forward and backward, with nn.RNN's shapes and strides."""
    shapes = []
    for cls in (nn.RNN, charrnn_fast.RNN):
        with FakeTensorMode():
            x = torch.randn(4, 2, 3, requires_grad=True)
            output, h_n = cls(3, 5, 2, bidirectional=True)(x)
            output.sum().backward()
            shapes.append([(t.shape, t.stride()) for t in (output, h_n, x.grad)])
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("make", [pair, cells])
def test_fx(make):
    """FX keeps the module as a leaf, as it keeps nn.RNN, and the traced model computes the same."""

    class Around(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x, hx):
            return self.inner(x * 2, hx)

    x, hx = torch.randn(1, 2, 3), torch.randn(1, 2, 5)
    graphs = []
    for module in make(3, 5):
        model = Around(module)
        traced = fx.symbolic_trace(model)
        graphs.append([(node.op, str(node.target)) for node in traced.graph.nodes])
        args = (x, hx) if make is pair else (x[0], hx[0])
        torch.testing.assert_close(traced(*args), model(*args), rtol=0, atol=0)
    assert graphs[0] == graphs[1]
    assert ("call_module", "inner") in graphs[1]


@pytest.mark.parametrize("make", [pair, cells])
def test_fx_of_the_module_itself(make):
    """FX cannot look into the module: the same kind of error for both, and ours names the cure."""
    stock, ours = make(3, 5)
    with pytest.raises(fx.proxy.TraceError):
        fx.symbolic_trace(stock)
    with pytest.raises(fx.proxy.TraceError, match="trace a module that holds it"):
        fx.symbolic_trace(ours)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
def test_jit_trace(options):
    """A traced module serves other T and B."""
    _, ours = pair(3, 5, **options)
    traced = torch.jit.trace(ours, (torch.randn(4, 2, 3),))
    x = torch.randn(9, 6, 3)
    torch.testing.assert_close(traced(x), ours(x))


class Scripted(nn.Module):
    """TorchScript needs the types."""

    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn

    def forward(self, x: Tensor, hx: Tensor | None = None):
        return self.rnn(x, hx)


class ScriptedPacked(Scripted):
    """The same for packed sequences."""

    def forward(self, x: PackedSequence, hx: Tensor | None = None):
        return self.rnn(x, hx)


def scripted(module):
    """Compiled, saved and loaded again."""
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(module), buffer)
    buffer.seek(0)
    return torch.jit.load(buffer)


@pytest.mark.parametrize(
    "options", [{}, {"batch_first": True}, {"bidirectional": True, "bias": False}], ids=str
)
def test_jit_script(options):
    """A scripted model runs the op: batches, one sequence and packed ones, with and without hx."""
    stock, ours = pair(3, 5, 2, **options)
    rows = 4 if options.get("bidirectional") else 2
    loaded = scripted(Scripted(ours))
    before = charrnn_fast.ops.counters()["forward_fused"]
    for x, state in [((6, 6, 3), (rows, 6, 5)), ((4, 3), (rows, 5))]:
        x, hx = torch.randn(x), torch.randn(state)
        torch.testing.assert_close(loaded(x, hx), stock(x, hx))
        torch.testing.assert_close(loaded(x), stock(x))
    assert charrnn_fast.ops.counters()["forward_fused"] == before + 8
    packed = pack_sequence([torch.randn(n, 3) for n in (2, 5, 3)], enforce_sorted=False)
    loaded = scripted(ScriptedPacked(ours))
    for hx in (None, torch.randn(rows, 3, 5)):
        got, want = loaded(packed, hx), stock(packed, hx)
        torch.testing.assert_close(got[0].data, want[0].data)
        torch.testing.assert_close(got[1], want[1])


@pytest.mark.parametrize("bias", [False, True])
def test_jit_script_of_the_cell(bias):
    """A scripted RNNCell gives nn.RNNCell's states."""
    stock, ours = cells(3, 5, bias)
    loaded = scripted(Scripted(ours))
    x, hx = torch.randn(2, 3), torch.randn(2, 5)
    torch.testing.assert_close(loaded(x, hx), stock(x, hx))
    torch.testing.assert_close(loaded(x[0]), stock(x[0]))


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
@pytest.mark.parametrize("frozen", [False, True])
def test_flop_counts(options, frozen):
    """FlopCounterMode counts the products that it counts for nn.RNN, forward and backward."""
    counts = []
    for module in pair(3, 5, **options):
        module.weight_hh_l0.requires_grad_(not frozen)
        x = torch.randn(4, 2, 3, requires_grad=not frozen)
        with FlopCounterMode(display=False) as counter:
            module(x)[0].sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


def test_flop_counts_of_packed_sequences():
    """The same for packed sequences, whose reverse direction starts with the longest."""
    counts = []
    for module in pair(3, 5, 2, bidirectional=True):
        packed = pack_sequence([torch.randn(n, 3) for n in (2, 5, 3)], enforce_sorted=False)
        with FlopCounterMode(display=False) as counter:
            module(packed)[0].data.sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_layouts_that_only_torch_knows():
    """Nested sequences of one length, and sparse input of a cell, go where nn.RNN takes them."""
    sequences = torch.randn(2, 4, 3)
    stock, ours = pair(3, 5)
    nested = torch.nested.nested_tensor(list(sequences))
    torch.testing.assert_close(ours(nested), stock(nested))
    stock, ours = cells(3, 5)
    sparse = sequences[0].to_sparse()
    torch.testing.assert_close(ours(sparse), stock(sparse))


def test_anomaly_mode_and_tensor_hooks():
    """set_detect_anomaly, retain_grad and hooks on both results work as with nn.RNN."""
    results = []
    for module in pair(3, 5):
        with torch.autograd.set_detect_anomaly(True):
            output, h_n = module(torch.linspace(-1, 1, 24).reshape(4, 2, 3))
            output.retain_grad()
            output.register_hook(lambda g: g * 2)
            h_n.register_hook(lambda g: g * 3)
            (output.sum() + h_n.sum()).backward()
        results.append([output.grad, *[p.grad for p in module.parameters()]])
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.filterwarnings("ignore:Complex modules")
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
def test_complex_weights(options):
    """Complex weights, which nn.RNN serves, give its results and gradients."""
    stock, ours = (module.to(torch.complex128) for module in pair(3, 5, **options))
    x = torch.randn(4, 2, 3, dtype=torch.complex128, requires_grad=True)
    results = []
    for module in (stock, ours):
        output, h_n = module(x)
        loss = output.abs().square().sum() + h_n.real.sum()
        results.append([output, h_n, *torch.autograd.grad(loss, [x, *module.parameters()])])
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"bidirectional": True}], ids=str)
def test_strides_of_results(options):
    """Results have nn.RNN's strides, which .view() and .is_contiguous() depend on."""
    stock, ours = pair(3, 5, 2, **options)
    x = torch.randn(4, 2, 3)
    for data in (x, x[0], x[:, :1], x[:1], x.transpose(0, 1)):
        got, want = ours(data), stock(data)
        assert [t.stride() for t in got] == [t.stride() for t in want]


def test_same_after_functional_call():
    """What was swapped in for one call leaves nothing behind."""
    stock, ours = pair(3, 5)
    x = torch.randn(4, 2, 3)
    zeros = {name: torch.zeros_like(p) for name, p in ours.named_parameters()}
    torch.func.functional_call(ours, zeros, (x,))
    assert_same(run(ours, x), run(stock, x))
