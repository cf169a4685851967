"""What watches calls from outside: subclasses of Tensor, FX, TorchScript, FLOP counts."""

import io

import pytest
import torch
from helpers import assert_same, leaf, loss_of, run
from kinds import KINDS, each, flat
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


def test_torch_function_subclass(kind):
    """A subclass of Tensor goes in and comes out as with torch.nn."""
    stock, ours = kind.pair(3, 5, 2)
    x = torch.randn(4, 2, 3).as_subclass(Tagged)
    got, want = flat(ours(x)), flat(stock(x))
    assert [type(t) for t in got] == [type(t) for t in want]
    torch.testing.assert_close(got[0].as_subclass(Tensor), want[0].as_subclass(Tensor))


def test_torch_function_mode(kind):
    """Who watches calls by a mode sees the op."""
    seen = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with Watch():
        kind.ours(3, 5)(torch.randn(4, 2, 3))
    assert any("charrnn_fast.rnn" in name for name in seen)


def test_default_device(kind):
    """Inside torch.device(...), which is such a mode, calls run fused."""
    rnn, cell, x = kind.ours(3, 5), kind.cell(3, 5), torch.randn(4, 2, 3)
    with torch.device("cpu"), assert_fused():
        rnn(x)[0].sum().backward()
        loss_of(cell(x[0])).backward()
        assert charrnn_fast.explain(rnn, x).fused


def test_expanded_weights(kind):
    """Per-sample gradients by ExpandedWeights, as Opacus asks for them."""
    results = []
    # In float64: torch's rules know no op of oneDNN's LSTM.
    for module in kind.pair(3, 5, batch_first=True, dtype=torch.float64):
        x = torch.linspace(-1, 1, 60, dtype=torch.float64).reshape(5, 4, 3)
        output, _ = call_for_per_sample_grads(module, batch_first=True)(x)
        output.square().sum().backward()
        results.append([p.grad_sample for p in module.parameters()])
    torch.testing.assert_close(results[1], results[0])
    assert results[1][0].shape == (5, 5 * kind.gates, 3)


def test_fake_tensors(kind):
    """FakeTensors flow through, forward and backward, with torch.nn's shapes and strides."""
    shapes = []
    for cls in (kind.stock, kind.ours):
        with FakeTensorMode():
            x = torch.randn(4, 2, 3, requires_grad=True)
            results = flat(cls(3, 5, 2, bidirectional=True)(x))
            results[0].sum().backward()
            shapes.append([(t.shape, t.stride()) for t in (*results, x.grad)])
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("is_cell", [False, True])
def test_fx(kind, is_cell):
    """FX keeps the module as a leaf, as it keeps torch.nn's, and computes the same."""

    class Around(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x, hx):
            return self.inner(x * 2, hx)

    x, hx = torch.randn(1, 2, 3), kind.state(1, 2, 5)
    graphs = []
    for module in kind.cells(3, 5) if is_cell else kind.pair(3, 5):
        model = Around(module)
        traced = fx.symbolic_trace(model)
        graphs.append([(node.op, str(node.target)) for node in traced.graph.nodes])
        args = (x[0], each(lambda tensor: tensor[0], hx)) if is_cell else (x, hx)
        torch.testing.assert_close(traced(*args), model(*args), rtol=0, atol=0)
    assert graphs[0] == graphs[1]
    assert ("call_module", "inner") in graphs[1]


@pytest.mark.parametrize("is_cell", [False, True])
def test_fx_of_the_module_itself(kind, is_cell):
    """FX cannot look into the module: the same kind of error for both, and ours names the cure."""
    stock, ours = kind.cells(3, 5) if is_cell else kind.pair(3, 5)
    with pytest.raises(fx.proxy.TraceError):
        fx.symbolic_trace(stock)
    with pytest.raises(fx.proxy.TraceError, match="trace a module that holds it"):
        fx.symbolic_trace(ours)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
def test_jit_trace(kind, options):
    """A traced module serves other T and B, and trains."""
    ours = kind.ours(3, 5, **options)
    traced = torch.jit.trace(ours, (torch.randn(4, 2, 3),))
    x = torch.randn(9, 6, 3)
    results = []
    for module in (ours, traced):
        found = module(x)
        results.append([*flat(found), *torch.autograd.grad(loss_of(found), module.parameters())])
    torch.testing.assert_close(results[1], results[0])


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


class ScriptedPair(Scripted):
    """The same for two states."""

    def forward(self, x: Tensor, hx: tuple[Tensor, Tensor] | None = None):
        return self.rnn(x, hx)


class ScriptedPackedPair(Scripted):
    """The same for packed sequences and two states."""

    def forward(self, x: PackedSequence, hx: tuple[Tensor, Tensor] | None = None):
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
def test_jit_script(kind, options):
    """A scripted model runs the op: batches, one sequence and packed ones, with and without hx."""
    stock, ours = kind.pair(3, 5, 2, **options)
    rows = 4 if options.get("bidirectional") else 2
    around, around_packed = (
        (ScriptedPair, ScriptedPackedPair) if kind.has_cell_state else (Scripted, ScriptedPacked)
    )
    loaded = scripted(around(ours))
    before = charrnn_fast.ops.counters()["forward_fused"]
    for x, state in [((6, 6, 3), (rows, 6, 5)), ((4, 3), (rows, 5))]:
        x, hx = torch.randn(x), kind.state(*state)
        torch.testing.assert_close(loaded(x, hx), stock(x, hx))
        torch.testing.assert_close(loaded(x), stock(x))
    assert charrnn_fast.ops.counters()["forward_fused"] == before + 8
    packed = pack_sequence([torch.randn(n, 3) for n in (2, 5, 3)], enforce_sorted=False)
    loaded = scripted(around_packed(ours))
    for hx in (None, kind.state(rows, 3, 5)):
        torch.testing.assert_close(flat(loaded(packed, hx)), flat(stock(packed, hx)))


@pytest.mark.parametrize("bias", [False, True])
def test_jit_script_of_the_cell(kind, bias):
    """A scripted cell gives the states of torch.nn's."""
    stock, ours = kind.cells(3, 5, bias)
    loaded = scripted((ScriptedPair if kind.has_cell_state else Scripted)(ours))
    x, hx = torch.randn(2, 3), kind.state(2, 5)
    torch.testing.assert_close(loaded(x, hx), stock(x, hx))
    torch.testing.assert_close(loaded(x[0]), stock(x[0]))


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("batch_first", [False, True])
def test_jit_script_with_projections(batch_first):
    """proj_size compiles, too: batches, one sequence and packed ones, with and without states."""
    options = {"proj_size": 2, "bidirectional": True, "batch_first": batch_first}
    stock, ours = nn.LSTM(3, 5, 2, **options), charrnn_fast.LSTM(3, 5, 2, **options)
    ours.load_state_dict(stock.state_dict())

    def state(*batch):
        return torch.randn(4, *batch, 2), torch.randn(4, *batch, 5)

    loaded, x = scripted(ScriptedPair(ours)), torch.randn(3, 3, 3)
    for args in ((x,), (x, state(3)), (x[0],), (x[0], state())):
        torch.testing.assert_close(flat(loaded(*args)), flat(stock(*args)))
    loaded = scripted(ScriptedPackedPair(ours))
    packed = pack_sequence([torch.randn(n, 3) for n in (2, 5, 3)], enforce_sorted=False)
    for args in ((packed,), (packed, state(3))):
        torch.testing.assert_close(flat(loaded(*args)), flat(stock(*args)))


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
@pytest.mark.parametrize("frozen", [False, True])
def test_flop_counts(kind, options, frozen):
    """FlopCounterMode counts the products that it counts for torch.nn, forward and backward.

    In float64: oneDNN's LSTM of float32 is an op of its own, which the counter does not know.
    """
    counts = []
    for module in kind.pair(3, 5, dtype=torch.float64, **options):
        module.weight_hh_l0.requires_grad_(not frozen)
        x = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=not frozen)
        with FlopCounterMode(display=False) as counter:
            module(x)[0].sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_flop_counts_of_packed_sequences(kind):
    """The same for packed sequences, whose reverse direction starts with the longest."""
    counts = []
    for module in kind.pair(3, 5, 2, bidirectional=True):
        packed = pack_sequence([torch.randn(n, 3) for n in (2, 5, 3)], enforce_sorted=False)
        with FlopCounterMode(display=False) as counter:
            module(packed)[0].data.sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_flop_counts_of_the_cell(kind):
    """The same for one step of a cell."""
    counts = []
    for module in kind.cells(3, 5):
        with FlopCounterMode(display=False) as counter:
            loss_of(module(torch.randn(2, 3, requires_grad=True))).backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_layouts_that_only_torch_knows(kind):
    """Nested sequences of one length, and sparse input of a cell, go where torch.nn takes them."""
    sequences = torch.randn(2, 4, 3)
    nested = torch.nested.nested_tensor(list(sequences))
    sparse = sequences[0].to_sparse()
    for (stock, ours), x in ((kind.pair(3, 5), nested), (kind.cells(3, 5), sparse)):
        try:
            want = stock(x)
        except Exception as error:
            with pytest.raises(type(error)):
                ours(x)
        else:
            torch.testing.assert_close(ours(x), want)


def test_anomaly_mode_and_tensor_hooks(kind):
    """set_detect_anomaly, retain_grad and hooks on all results work as with torch.nn."""
    results = []
    for module in kind.pair(3, 5):
        with torch.autograd.set_detect_anomaly(True):
            found = flat(module(torch.linspace(-1, 1, 24).reshape(4, 2, 3)))
            found[0].retain_grad()
            for times, tensor in enumerate(found, 2):
                tensor.register_hook(lambda grad, times=times: grad * times)
            sum(tensor.sum() for tensor in found).backward()
        results.append([found[0].grad, *[p.grad for p in module.parameters()]])
    torch.testing.assert_close(results[1], results[0])


@pytest.mark.filterwarnings("ignore:Complex modules")
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
def test_complex_weights(options):
    """Complex weights, which torch.nn serves, give its results and gradients."""
    for kind in KINDS:
        stock, ours = (module.to(torch.complex128) for module in kind.pair(3, 5, **options))
        x = torch.randn(4, 2, 3, dtype=torch.complex128)
        results = []
        for module in (stock, ours):
            data = leaf(x)
            found = flat(module(data))
            loss = sum(tensor.abs().square().sum() for tensor in found)
            results.append([*found, *torch.autograd.grad(loss, [data, *module.parameters()])])
        torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"bidirectional": True}], ids=str)
def test_strides_of_results(kind, options):
    """Results have torch.nn's strides, which .view() and .is_contiguous() depend on."""
    # In float64, as oneDNN's LSTM has strides of its own.
    stock, ours = kind.pair(3, 5, 2, dtype=torch.float64, **options)
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    for data in (x, x[0], x[:, :1], x[:1], x.transpose(0, 1)):
        got, want = flat(ours(data)), flat(stock(data))
        assert [t.stride() for t in got] == [t.stride() for t in want]


def test_same_after_functional_call(kind):
    """What was swapped in for one call leaves nothing behind."""
    stock, ours = kind.pair(3, 5)
    x = torch.randn(4, 2, 3)
    zeros = {name: torch.zeros_like(p) for name, p in ours.named_parameters()}
    torch.func.functional_call(ours, zeros, (x,))
    assert_same(run(ours, x), run(stock, x))
