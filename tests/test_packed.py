"""PackedSequence against nn.RNN: fused, in every order of lengths."""

import pytest
import torch
from helpers import assert_same, leaf, pair
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

import charrnn_fast
from charrnn_fast.ops import assert_fused

LENGTHS = [[5, 4, 2], [2, 5, 1, 4], [1, 1, 1], [7], [3, 3, 3, 3, 3], [9, 1, 1, 8, 1, 6, 5, 5]]


def packed_run(module, sequences, hx):
    """Outputs and gradients of a packed batch."""
    leaves = [leaf(s) for s in sequences]
    hx = None if hx is None else leaf(hx)
    output, h_n = module(pack_sequence(leaves, enforce_sorted=False), hx)
    (output.data.cos().sum() + h_n.sin().sum()).backward()
    results = {"data": output.data, "h_n": h_n}
    results.update({f"d sequence {i}": s.grad for i, s in enumerate(leaves)})
    if hx is not None:
        results["d hx"] = hx.grad
    results.update({f"d {n}": p.grad for n, p in module.named_parameters()})
    return results, output


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("with_hx", [False, True])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
def test_packed(isa, lengths, with_hx, options):
    """Sorted, unsorted, all of one length, lengths of 1: results and gradients are nn.RNN's."""
    stock, ours = pair(4, 6, dtype=torch.float64, **options)
    sequences = [torch.randn(n, 4, dtype=torch.float64) for n in lengths]
    rows = 4 if options else 1
    hx = torch.randn(rows, len(lengths), 6, dtype=torch.float64) if with_hx else None
    want, stock_output = packed_run(stock, sequences, hx)
    with assert_fused():
        got, output = packed_run(ours, sequences, hx)
    assert_same(got, want, rtol=1e-10, atol=1e-10)
    assert isinstance(output, PackedSequence)
    assert torch.equal(output.batch_sizes, stock_output.batch_sizes)
    for a, b in zip(output[2:], stock_output[2:], strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.equal(a, b)


@pytest.mark.parametrize("batch_first", [False, True])
def test_packed_and_sorted(batch_first):
    """enforce_sorted=True leaves no permutation, and h_n is in the given order."""
    stock, ours = pair(4, 6, 2, batch_first=batch_first)
    packed = pack_padded_sequence(torch.randn(5, 3, 4), torch.tensor([5, 5, 2]))
    a, b = ours(packed), stock(packed)
    assert a[0].sorted_indices is None
    torch.testing.assert_close(a[0].data, b[0].data)
    torch.testing.assert_close(a[1], b[1])


@pytest.mark.parametrize("sizes", [[3, 2, 0], [2, 0, 0], [4, 4, 1, 0]], ids=str)
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
def test_steps_without_sequences(isa, sizes, options):
    """Batch sizes may end in zeros, which pack_sequence never makes: they change nothing."""
    stock, ours = pair(4, 6, dtype=torch.float64, **options)
    data = torch.randn(sum(sizes), 4, dtype=torch.float64)

    def run(module, sizes):
        x = leaf(data)
        output, h_n = module(PackedSequence(x, torch.tensor(sizes)))
        grads = torch.autograd.grad(
            output.data.cos().sum() + h_n.sin().sum(), [x, *module.parameters()], create_graph=True
        )
        again = torch.autograd.grad(sum(g.square().sum() for g in grads), x)
        results = dict(enumerate([output.data, h_n, *grads, *again]))
        return {str(k): v.detach() for k, v in results.items()}, output.batch_sizes.tolist()

    with assert_fused():
        ours(PackedSequence(data, torch.tensor(sizes)))[0].data.sum().backward()
    want, stock_sizes = run(stock, sizes)
    got, our_sizes = run(ours, sizes)
    assert_same(got, want, rtol=1e-10, atol=1e-10)
    assert our_sizes == stock_sizes == sizes
    shorter, _ = run(ours, [size for size in sizes if size > 0])
    assert all(torch.equal(got[k], shorter[k]) for k in got)


def test_packed_tokens():
    """Packed ids give the results of packed one-hot vectors."""
    stock, ours = pair(7, 6, 2, bidirectional=True)
    ids = [torch.randint(7, (n,)) for n in (3, 6, 1)]
    want = stock(pack_sequence([torch.eye(7)[i] for i in ids], enforce_sorted=False))
    with assert_fused():
        got = ours(pack_sequence(ids, enforce_sorted=False))
    torch.testing.assert_close(got[0].data, want[0].data)
    torch.testing.assert_close(got[1], want[1])


def test_packed_in_half_precision():
    """Packed data of bfloat16 runs fused, and gives nn.RNN's results up to rounding."""
    stock, ours = pair(4, 6, 2, bidirectional=True, dtype=torch.bfloat16)
    packed = pack_sequence([torch.randn(n, 4).bfloat16() for n in (3, 6, 1)], enforce_sorted=False)
    with assert_fused():
        output, h_n = ours(packed)
    torch.testing.assert_close(output.data, stock(packed)[0].data, rtol=0.02, atol=0.02)
    torch.testing.assert_close(h_n, stock(packed)[1], rtol=0.02, atol=0.02)


def test_packed_token_out_of_range():
    """An id out of range in packed data is named with its row."""
    rnn = charrnn_fast.RNN(7, 6)
    with pytest.raises(IndexError, match="token id 9 .*row 2"):
        rnn(pack_sequence([torch.tensor([1, 9]), torch.tensor([2])]))
