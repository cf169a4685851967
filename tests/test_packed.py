"""PackedSequence against torch.nn: fused, in every order of lengths."""

import pytest
import torch
from helpers import assert_same, leaf, leaves_of, loss_of, named, run
from kinds import flat
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

from charrnn_fast.ops import assert_fused

LENGTHS = [[5, 4, 2], [2, 5, 1, 4], [1, 1, 1], [7], [3, 3, 3, 3, 3], [9, 1, 1, 8, 1, 6, 5, 5]]


def packed_run(module, sequences, hx):
    """Outputs and gradients of a packed batch, down to those of its sequences."""
    leaves = [leaf(s) for s in sequences]
    hx, states = leaves_of(hx)
    found = module(pack_sequence(leaves, enforce_sorted=False), hx)
    loss_of(found).backward()
    results = named(found)
    results.update({f"d sequence {i}": s.grad for i, s in enumerate(leaves)})
    results.update({f"d {name}": tensor.grad for name, tensor in states.items()})
    results.update({f"d {n}": p.grad for n, p in module.named_parameters()})
    return results, found[0]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("with_hx", [False, True])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
def test_packed(isa, kind, lengths, with_hx, options):
    """Sorted, unsorted, all of one length, lengths of 1: results and gradients are torch.nn's."""
    stock, ours = kind.pair(4, 6, dtype=torch.float64, **options)
    sequences = [torch.randn(n, 4, dtype=torch.float64) for n in lengths]
    rows = 4 if options else 1
    hx = kind.state(rows, len(lengths), 6, dtype=torch.float64) if with_hx else None
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
def test_packed_and_sorted(kind, batch_first):
    """enforce_sorted=True leaves no permutation, and states are in the given order."""
    stock, ours = kind.pair(4, 6, 2, batch_first=batch_first)
    packed = pack_padded_sequence(torch.randn(5, 3, 4), torch.tensor([5, 5, 2]))
    hx = kind.state(2, 3, 6)
    assert ours(packed)[0].sorted_indices is None
    assert_same(run(ours, packed, hx), run(stock, packed, hx))


@pytest.mark.parametrize("sizes", [[3, 2, 0], [2, 0, 0], [4, 4, 1, 0]], ids=str)
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
def test_steps_without_sequences(isa, kind, sizes, options):
    """Batch sizes may end in zeros, which pack_sequence never makes: they change nothing."""
    stock, ours = kind.pair(4, 6, dtype=torch.float64, **options)
    data = torch.randn(sum(sizes), 4, dtype=torch.float64)

    def run(module, sizes):
        x = leaf(data)
        found = module(PackedSequence(x, torch.tensor(sizes)))
        grads = torch.autograd.grad(loss_of(found), [x, *module.parameters()], create_graph=True)
        again = torch.autograd.grad(sum(g.square().sum() for g in grads), x)
        results = dict(enumerate([*flat(found), *grads, *again]))
        return {str(k): v.detach() for k, v in results.items()}, found[0].batch_sizes.tolist()

    with assert_fused():
        ours(PackedSequence(data, torch.tensor(sizes)))[0].data.sum().backward()
    want, stock_sizes = run(stock, sizes)
    got, our_sizes = run(ours, sizes)
    assert_same(got, want, rtol=1e-10, atol=1e-10)
    assert our_sizes == stock_sizes == sizes
    shorter, _ = run(ours, [size for size in sizes if size > 0])
    # Derivatives with a graph are the composite formula's, which promises no bits.
    for index in range(1 + len(kind.states)):
        assert torch.equal(got[str(index)], shorter[str(index)])
    assert_same(got, shorter, rtol=1e-10, atol=1e-10)


def test_packed_tokens(kind):
    """Packed ids give the results of packed one-hot vectors."""
    stock, ours = kind.pair(7, 6, 2, bidirectional=True)
    ids = [torch.randint(7, (n,)) for n in (3, 6, 1)]
    want = stock(pack_sequence([torch.eye(7)[i] for i in ids], enforce_sorted=False))
    with assert_fused():
        got = ours(pack_sequence(ids, enforce_sorted=False))
    torch.testing.assert_close(flat(got), flat(want))


def test_packed_in_half_precision(kind):
    """Packed data of bfloat16 runs fused, and gives torch.nn's results up to rounding."""
    stock, ours = kind.pair(4, 6, 2, bidirectional=True, dtype=torch.bfloat16)
    packed = pack_sequence([torch.randn(n, 4).bfloat16() for n in (3, 6, 1)], enforce_sorted=False)
    with assert_fused():
        got = ours(packed)
    torch.testing.assert_close(flat(got), flat(stock(packed)), rtol=0.02, atol=0.02)


def test_packed_token_out_of_range(kind):
    """An id out of range in packed data is named with its row."""
    rnn = kind.ours(7, 6)
    with pytest.raises(IndexError, match="token id 9 .*row 2"):
        rnn(pack_sequence([torch.tensor([1, 9]), torch.tensor([2])]))
