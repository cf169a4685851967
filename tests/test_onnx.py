"""ONNX export: one operator a layer, not an unrolled loop, run by ONNX Runtime beside ours."""

import io

import pytest
import torch
from helpers import beyond_torch_2_9
from kinds import KINDS, VARIANTS, flat
from torch import nn

import charrnn_fast

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
# What the exporter and onnxscript warn of is theirs.
pytestmark = pytest.mark.filterwarnings("ignore")


def check(module, args, other=None, **kwargs):
    """Exports, runs both on args or on others, compares, and returns the kinds of the nodes."""
    module.eval()
    program = torch.onnx.export(module, args, dynamo=True, verbose=False, **kwargs)
    session = onnxruntime.InferenceSession(
        program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    args = args if other is None else other
    feed = dict(zip([i.name for i in session.get_inputs()], [a.numpy() for a in args], strict=True))
    got = [torch.from_numpy(result) for result in session.run(None, feed)]
    want = [result.detach() for result in flat(module(*args))]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    return [node.op_type for node in program.model_proto.graph.node]


# What an operator of our kinds would be made of, had it not been recognised.
UNROLLED = {"Tanh", "Relu", "Sigmoid", "MatMul", "Loop", "Scan"}
OPTIONS = [
    *[(kind, variant) for kind, variant in VARIANTS],
    *[(kind, {"num_layers": 2, "bidirectional": True}) for kind in KINDS],
    *[(kind, {"bias": False, "bidirectional": True} | variant) for kind, variant in VARIANTS],
    *[(kind, {"batch_first": True, "num_layers": 2, "dropout": 0.5}) for kind in KINDS],
]


class Flat(nn.Module):
    """A program has tensors for inputs and results."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, *states):
        hx = states if len(states) > 1 else states[0] if states else None
        return tuple(flat(self.inner(x, hx)))


class Ragged(nn.Module):
    """The same with lengths."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, lengths):
        return tuple(flat(self.inner(x, lengths=lengths)))


@pytest.mark.parametrize(("kind", "options"), OPTIONS, ids=str)
@pytest.mark.parametrize("with_hx", [False, True])
def test_one_operator_a_layer(kind, options, with_hx):
    """Layers, directions, activations, states: one node a layer, and the results are ours."""
    rnn = kind.ours(3, 5, **options)
    rows = rnn.num_layers * (2 if rnn.bidirectional else 1)
    x = torch.randn(4, 2, 3)
    batch = 4 if rnn.batch_first else 2
    kinds = check(Flat(rnn), (x, *flat(kind.state(rows, batch, 5))) if with_hx else (x,))
    assert kinds.count(kind.name) == rnn.num_layers
    assert not UNROLLED & set(kinds)


def test_sigmoid():
    """The one activation that nn.RNN has not."""
    rnn = charrnn_fast.RNN(3, 5, nonlinearity="sigmoid", num_layers=2)
    kinds = check(Flat(rnn), (torch.randn(4, 2, 3),))
    assert kinds.count("RNN") == 2
    assert not UNROLLED & set(kinds)


@beyond_torch_2_9
def test_any_sizes(kind):
    """With dynamic_shapes one model serves every T and B."""
    T, B = torch.export.Dim("T"), torch.export.Dim("B")
    rnn = kind.ours(3, 5, 2, bidirectional=True)
    check(
        rnn,
        (torch.randn(4, 2, 3),),
        other=(torch.randn(9, 6, 3),),
        dynamic_shapes=({0: T, 1: B},),
    )


def test_tokens(kind):
    """Token ids become rows of one-hot vectors by a Gather."""
    kinds = check(Flat(kind.ours(7, 5, 2)), (torch.randint(7, (4, 2)),))
    assert kinds.count("Gather") == 1
    assert kinds.count(kind.name) == 2


def test_lengths(kind):
    """lengths= becomes the operator's sequence_lens, in both directions."""
    x = torch.randn(4, 3, 3)
    kinds = check(
        Ragged(kind.ours(3, 5, 2, bidirectional=True)),
        (x, torch.tensor([2, 4, 1])),
        other=(x, torch.tensor([4, 3, 2])),
    )
    assert kinds.count(kind.name) == 2


def test_cell(kind):
    """A cell is one node of one step."""
    kinds = check(Flat(kind.cell(3, 5)), (torch.randn(2, 3), *flat(kind.state(2, 5))))
    assert kinds.count(kind.name) == 1


def test_the_older_exporter(kind):
    """dynamo=False writes for ours what it writes for torch.nn."""
    sizes = []
    for module in kind.pair(3, 5, 2, bidirectional=True):
        buffer = io.BytesIO()
        torch.onnx.export(module.eval(), (torch.randn(4, 2, 3),), buffer, dynamo=False)
        sizes.append(len(buffer.getvalue()))
    assert sizes[0] == sizes[1]


def test_what_the_older_exporter_cannot_write(kind):
    """Ids, lengths and resets beside dynamo=False: an error that names the exporter that can."""
    x, lengths = torch.randn(4, 3, 3), torch.tensor([2, 4, 1])
    calls = [
        (x[..., 0].abs().long(), {}),
        (x, {"lengths": lengths}),
        (x, {"resets": x[..., 0] > 0}),
    ]
    for input, keywords in calls:
        model = WithKeywords(kind.ours(3, 5), keywords).eval()
        with pytest.raises(NotImplementedError, match="dynamo=True"):
            torch.onnx.export(model, (input,), io.BytesIO(), dynamo=False)


class WithKeywords(nn.Module):
    """Calls a module with keywords that the exporter need not know."""

    def __init__(self, rnn, keywords):
        super().__init__()
        self.rnn = rnn
        self.keywords = keywords

    def forward(self, x):
        return self.rnn(x, **self.keywords)


def test_resets(kind):
    """ONNX's operators have none: the error that comes first says so."""
    model = WithKeywords(kind.ours(3, 5), {"resets": torch.ones(4, 2, dtype=torch.bool)}).eval()
    with pytest.raises(torch.onnx.OnnxExporterError, match="no resets"):
        torch.onnx.export(model, (torch.randn(4, 2, 3),), dynamo=True, verbose=False)
