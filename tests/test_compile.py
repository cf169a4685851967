"""torch.compile, torch.export and AOTInductor: one op a sequence, in graphs of any T and B."""

import copy

import pytest
import torch
from helpers import beyond_torch_2_9, leaf, leaves_of, loss_of
from kinds import flat
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence

import charrnn_fast
from charrnn_fast.ops import assert_fused, counters


@pytest.fixture
def allow_rnn():
    """Dynamo's own switch, without which it refuses every nn.RNN in a full graph."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True):
        yield
    torch._dynamo.reset()


# What torch warns of itself with while it compiles.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")


def step(module, *args):
    """Results and gradients of one call of a module that must not be copied."""
    x = leaf(args[0])
    hx, states = leaves_of(args[1] if len(args) > 1 else None)
    found = module(x, hx, *args[2:])
    leaves = [*([x] if x.requires_grad else []), *states.values(), *module.parameters()]
    grads = torch.autograd.grad(loss_of(found), leaves)
    return [*flat(found), *grads]


class Graphs:
    """A backend that keeps the graphs it is given, and runs them by AOT autograd."""

    def __init__(self):
        self.seen = []

    def __call__(self, graph, inputs):
        self.seen.append(graph)
        return torch._dynamo.backends.debugging.aot_eager(graph, inputs)

    def calls(self, name):
        """How many calls of an op the graphs hold together."""
        nodes = [node for graph in self.seen for node in graph.graph.nodes]
        return sum(f"charrnn_fast.{name}" in str(node.target) for node in nodes)


class Model(nn.Module):
    """A small model around a recurrent module."""

    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn
        self.head = nn.Linear(2 * rnn.hidden_size, 2)

    def forward(self, x, hx=None):
        output, states = self.rnn(x, hx)
        return self.head(output).tanh(), states


@beyond_torch_2_9
@pytest.mark.usefixtures("allow_rnn")
def test_full_graph_of_any_sizes(kind):
    """One graph with one op serves every T and B, forward and backward, with eager's results."""
    stock, ours = map(Model, kind.pair(3, 5, 2, bidirectional=True))
    stock.head = ours.head
    graphs = Graphs()
    compiled = torch.compile(ours, fullgraph=True, dynamic=True, backend=graphs)
    for T, B in [(7, 6), (9, 2), (11, 8)]:
        x, hx = torch.randn(T, B, 3), kind.state(4, B, 5)
        with assert_fused():
            got = step(compiled, x, hx)
        torch.testing.assert_close(got, step(stock, x, hx))
    # Dynamo empties a graph that it began again, here for the float that dropout is.
    assert len([graph for graph in graphs.seen if len(graph.graph.nodes)]) == 1
    assert graphs.calls("rnn") == 1


@pytest.mark.usefixtures("allow_rnn")
@pytest.mark.parametrize("given", ["tokens", "lengths", "batch_first", "unbatched", "states"])
def test_full_graph_of_every_input(kind, given):
    """Token ids, lengths, batch_first, a single sequence and states compile, too."""
    rnn = kind.ours(6, 5, 2, batch_first=given == "batch_first")
    x = torch.randint(6, (4, 3)) if given == "tokens" else torch.randn(4, 3, 6)
    args = [x[:, 0] if given == "unbatched" else x, None]
    if given == "states":
        args[1] = kind.state(2, 3, 5)
    elif given == "lengths":
        args.append(torch.tensor([4, 1, 3]))
    compiled = torch.compile(copy.deepcopy(rnn), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(step(compiled, *args), step(rnn, *args))


@pytest.mark.usefixtures("allow_rnn")
def test_full_graph_of_sigmoid():
    """What nn.RNN has not compiles as well."""
    rnn, x = charrnn_fast.RNN(6, 5, nonlinearity="sigmoid"), torch.randn(4, 3, 6)
    compiled = torch.compile(copy.deepcopy(rnn), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(step(compiled, x), step(rnn, x))


class Packing(nn.Module):
    """Packs by itself, and gives plain tensors back."""

    def __init__(self, rnn):
        super().__init__()
        self.rnn = rnn

    def forward(self, x, lengths):
        output, states = self.rnn(pack_padded_sequence(x, lengths, enforce_sorted=False))
        return output.data, states


def packed(*lengths):
    return pack_sequence([torch.randn(n, 3) for n in lengths], enforce_sorted=False)


@beyond_torch_2_9
@pytest.mark.usefixtures("allow_rnn")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_full_graph_of_packed_sequences(kind, backend):
    """A packed argument compiles, where torch.nn fails, and serves other lengths and batches."""
    if backend == "inductor" and kind.gates > 1:
        pytest.skip("minutes; one kind shows that inductor takes them")
    rnn = kind.ours(3, 5, 2, bidirectional=True)
    compiled = torch.compile(copy.deepcopy(rnn), fullgraph=True, dynamic=True, backend=backend)
    for lengths in ((2, 4, 2), (1, 3, 4), (3, 3, 1, 5)):
        x = packed(*lengths)
        results = []
        for module in (rnn, compiled):
            found = module(x)
            grads = torch.autograd.grad(loss_of(found), list(module.parameters()))
            results.append([*flat(found), *grads])
        torch.testing.assert_close(results[1], results[0])


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=beyond_torch_2_9)])
def test_export_of_packed_sequences(kind, strict):
    """A packed argument exports, where torch.nn fails; without `strict` the packing does, too."""
    rnn = kind.ours(3, 5, 2, bidirectional=True)
    program = torch.export.export(rnn, (packed(2, 4, 2),), strict=strict).module()
    x = packed(1, 3, 4)
    torch.testing.assert_close(flat(program(x)[1]), flat(rnn(x)[1]))
    if not strict:
        model, x = Packing(rnn), torch.randn(4, 3, 3)
        program = torch.export.export(model, (x, torch.tensor([2, 4, 2])), strict=False).module()
        for lengths in ([1, 3, 4], [4, 2, 2], [4, 4, 4], [3, 1, 1]):
            given = (x, torch.tensor(lengths))
            torch.testing.assert_close(program(*given), model(*given))


@pytest.mark.usefixtures("allow_rnn")
def test_inductor(kind):
    """The default backend compiles the model, and the gradients are eager's."""
    model = Model(kind.ours(3, 5, bidirectional=True))
    x = torch.randn(4, 2, 3)
    torch.testing.assert_close(step(torch.compile(model, fullgraph=True), x), step(model, x))


@pytest.mark.usefixtures("allow_rnn")
def test_dropout_in_a_full_graph(kind):
    """Training drops units, with eager's mask for its seed; eval() drops none."""
    rnn = kind.ours(3, 50, 2, dropout=0.5)
    compiled = torch.compile(copy.deepcopy(rnn), fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 2, 3)
    outputs = []
    for module in (rnn, compiled):
        torch.manual_seed(3)
        outputs.append([module(x)[0], module(x)[0]])
    torch.testing.assert_close(outputs[1], outputs[0])
    assert not torch.allclose(outputs[1][0], outputs[1][1])
    torch.testing.assert_close(compiled.eval()(x), rnn.eval()(x))
    torch.testing.assert_close(compiled(x), compiled(x), rtol=0, atol=0)


def test_without_the_switch(kind):
    """Without allow_rnn Dynamo leaves the call alone, and it runs fused all the same."""
    torch._dynamo.reset()
    model = Model(kind.ours(3, 5, bidirectional=True))
    graphs = Graphs()
    compiled = torch.compile(model, backend=graphs)
    x = torch.randn(4, 2, 3)
    with assert_fused():
        got = step(compiled, x)
    torch.testing.assert_close(got, step(model, x))
    assert graphs.calls("rnn") == 0
    torch._dynamo.reset()


def test_the_switch_is_left_alone(kind):
    """Nothing here turns Dynamo's switch on for the user."""
    torch.compile(kind.ours(3, 5), backend="eager")(torch.randn(4, 2, 3))
    assert torch._dynamo.config.allow_rnn is False
    torch._dynamo.reset()


def test_cell_in_a_full_graph(kind):
    """A loop over a cell compiles without a break, and trains: Dynamo refuses no cell."""
    torch._dynamo.reset()
    cell = kind.cell(3, 5)

    def loop(x, state):
        for step in x:
            state = cell(step, state)
        return state

    x, hx = torch.randn(3, 2, 3), kind.state(2, 5)
    compiled = torch.compile(loop, fullgraph=True, backend="aot_eager")
    results = []
    for call in (loop, compiled):
        found = call(x, hx)
        results.append([*flat(found), *torch.autograd.grad(loss_of(found), cell.parameters())])
    torch.testing.assert_close(results[1], results[0])
    torch._dynamo.reset()


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=beyond_torch_2_9)])
def test_export(kind, strict):
    """torch.export gives a program of any T and B, whose one op is ours."""
    T, B = torch.export.Dim("T"), torch.export.Dim("B")
    rnn = kind.ours(3, 5, 2, bidirectional=True).eval()
    with torch._dynamo.config.patch(allow_rnn=strict):
        program = torch.export.export(
            rnn, (torch.randn(4, 2, 3),), dynamic_shapes=({0: T, 1: B},), strict=strict
        )
    targets = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    assert [t for t in targets if "getitem" not in t] == ["charrnn_fast.rnn.default"]
    x = torch.randn(9, 5, 3)
    torch.testing.assert_close(program.module()(x), rnn(x))


def test_export_with_lengths(kind):
    """Variable lengths export, as packed sequences do not."""

    class Ragged(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = kind.ours(3, 5, batch_first=True)

        def forward(self, x, lengths):
            return self.rnn(x, lengths=lengths)

    model = Ragged()
    x = torch.randn(2, 4, 3)
    program = torch.export.export(model, (x, torch.tensor([4, 1])))
    other = torch.tensor([2, 3])
    torch.testing.assert_close(program.module()(x, other), model(x, other))


@pytest.mark.filterwarnings("ignore")
def test_aot_inductor(kind, tmp_path):
    """AOTInductor packages the program; what is loaded runs the kernels."""
    rnn = kind.ours(3, 5, 2, bidirectional=True).eval()
    x = torch.randn(4, 2, 3)
    with torch.no_grad():
        program = torch.export.export(rnn, (x,))
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "rnn.pt2")
        )
        loaded = torch._inductor.aoti_load_package(path)
        before = counters()
        got = loaded(x)
        assert counters()["forward_fused"] == before["forward_fused"] + 2
        torch.testing.assert_close(flat(got), flat(rnn(x)))
