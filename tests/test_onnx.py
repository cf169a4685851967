"""ONNX export: the RNN operator, not an unrolled loop, run by ONNX Runtime beside ours."""

import io

import pytest
import torch
from helpers import beyond_torch_2_9, pair
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
    want = [result.detach() for result in module(*args)]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    return [node.op_type for node in program.model_proto.graph.node]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_layers": 3},
        {"num_layers": 2, "bidirectional": True},
        {"nonlinearity": "relu", "bias": False, "bidirectional": True},
        {"nonlinearity": "sigmoid", "batch_first": True, "num_layers": 2, "dropout": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("with_hx", [False, True])
def test_one_operator_a_layer(options, with_hx):
    """Layers, directions, activations, states: one RNN node a layer, and the results are ours."""
    rnn = charrnn_fast.RNN(3, 5, **options)
    rows = rnn.num_layers * (2 if rnn.bidirectional else 1)
    x = torch.randn(4, 2, 3)
    batch = 4 if rnn.batch_first else 2
    args = (x, torch.randn(rows, batch, 5)) if with_hx else (x,)
    kinds = check(rnn, args)
    assert kinds.count("RNN") == rnn.num_layers
    assert not {"Tanh", "Relu", "Sigmoid", "MatMul", "Loop", "Scan"} & set(kinds)


@beyond_torch_2_9
def test_any_sizes():
    """With dynamic_shapes one model serves every T and B."""
    T, B = torch.export.Dim("T"), torch.export.Dim("B")
    rnn = charrnn_fast.RNN(3, 5, 2, bidirectional=True)
    check(
        rnn,
        (torch.randn(4, 2, 3),),
        other=(torch.randn(9, 6, 3),),
        dynamic_shapes=({0: T, 1: B},),
    )


def test_tokens():
    """Token ids become rows of one-hot vectors by a Gather."""
    kinds = check(charrnn_fast.RNN(7, 5, 2), (torch.randint(7, (4, 2)),))
    assert kinds.count("Gather") == 1
    assert kinds.count("RNN") == 2


def test_lengths():
    """lengths= becomes the operator's sequence_lens, in both directions."""

    class Ragged(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = charrnn_fast.RNN(3, 5, 2, bidirectional=True)

        def forward(self, x, lengths):
            return self.rnn(x, lengths=lengths)

    x = torch.randn(4, 3, 3)
    check(Ragged(), (x, torch.tensor([2, 4, 1])), other=(x, torch.tensor([4, 3, 2])))


def test_cell():
    """RNNCell is one RNN node of one step."""

    class Step(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = charrnn_fast.RNNCell(3, 5)

        def forward(self, x, h):
            return (self.cell(x, h),)

    assert check(Step(), (torch.randn(2, 3), torch.randn(2, 5))).count("RNN") == 1


def test_the_older_exporter():
    """dynamo=False writes for ours what it writes for nn.RNN."""
    sizes = []
    for module in pair(3, 5, 2, bidirectional=True):
        buffer = io.BytesIO()
        torch.onnx.export(module.eval(), (torch.randn(4, 2, 3),), buffer, dynamo=False)
        sizes.append(len(buffer.getvalue()))
    assert sizes[0] == sizes[1]
