"""Beyond torch.nn: token ids as input, and lengths of a padded batch."""

import copy

import pytest
import torch
from helpers import (
    assert_as_accurate,
    assert_same,
    assert_same_bits,
    leaf,
    leaves_of,
    loss_of,
    named,
    rounding_of,
    run,
)
from kinds import flat
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from charrnn_fast.ops import assert_fused


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_tokens_equal_one_hot(isa, kind, batch_first, bidirectional):
    """Ids give the outputs and gradients of their one-hot vectors."""
    stock, ours = kind.pair(11, 6, 2, batch_first=batch_first, bidirectional=bidirectional)
    ids = torch.randint(11, (5, 3))
    one_hot = nn.functional.one_hot(ids, 11).float()
    want = run(stock, one_hot)
    del want["d input"]
    with assert_fused():
        got = run(ours, ids)
    assert_same(got, want)
    unbatched = ours(ids[:, 0])[0]
    torch.testing.assert_close(unbatched, ours(one_hot[:, 0])[0])


@pytest.mark.parametrize("shape", [(2, 1, 1000, 64), (70, 8, 1000, 40), (3, 5, 130, 200)], ids=str)
def test_tokens_of_a_large_vocabulary(isa, kind, shape):
    """Few ids of many, one of them more than once; the same bits for any number of threads."""
    T, B, V, H = shape
    rnn = kind.ours(V, H)
    ids = torch.randint(V, (T, B))
    ids[-1] = ids[0]
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run(rnn, ids))
    for other in results[1:]:
        assert_same_bits(other, results[0])
    one_hot = nn.functional.one_hot(ids, V)
    vectors, exact = run(rnn, one_hot.float()), run(copy.deepcopy(rnn).double(), one_hot.double())
    del vectors["d input"], exact["d input"]
    assert_as_accurate(results[0], vectors, exact, rounding_of(rnn, ids))


@pytest.mark.parametrize("bad", [11, -1, 2**40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_out_of_range(kind, bad, dtype):
    """An id outside the vocabulary is an IndexError that names it."""
    rnn = kind.ours(11, 6, dtype=dtype)
    ids = torch.randint(11, (5, 3))
    ids[3, 1] = bad
    with pytest.raises(IndexError, match=f"token id {bad} .*input_size is 11.*step 3.*sequence 1"):
        rnn(ids)


def packed_run(module, data, hx, lengths, batch_first):
    """Results and gradients of a padded batch that is packed, and padded again."""
    module = copy.deepcopy(module)
    x = leaf(data)
    hx, states = leaves_of(hx)
    sequence = pack_padded_sequence(x, lengths, batch_first, enforce_sorted=False)
    output, final = module(sequence, hx)
    padded = pad_packed_sequence(output, batch_first, total_length=x.shape[1 if batch_first else 0])
    results = (padded[0], final)
    loss_of(results).backward()
    found = named(results) | {"d input": x.grad}
    found.update({f"d {name}": tensor.grad for name, tensor in states.items()})
    return found | {f"d {name}": p.grad for name, p in module.named_parameters()}


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_lengths_equal_packing(isa, kind, bidirectional, batch_first):
    """lengths= gives the outputs (zero past the end), states and gradients of a packed batch."""
    stock, ours = kind.pair(4, 6, 2, batch_first=batch_first, bidirectional=bidirectional)
    lengths = torch.tensor([2, 5, 1, 4])
    shape = (4, 5, 4) if batch_first else (5, 4, 4)
    data, hx = torch.randn(shape), kind.state(4 if bidirectional else 2, 4, 6)
    with assert_fused():
        got = run(ours, data, hx, lengths=lengths)
    assert_same(got, packed_run(stock, data, hx, lengths, batch_first))
    padding = got["output"] if batch_first else got["output"].transpose(0, 1)
    assert padding[0, 2:].abs().sum() == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_padding_is_never_read(kind, value):
    """What lies past a sequence's end, be it nan, touches neither results nor gradients."""
    rnn = kind.ours(4, 6, bidirectional=True)
    lengths = torch.tensor([2, 5, 1])
    clean = torch.randn(5, 3, 4)
    dirty = clean.clone()
    for b, n in enumerate(lengths):
        clean[n:, b] = 0
        dirty[n:, b] = value
    assert_same_bits(run(rnn, dirty, lengths=lengths), run(rnn, clean, lengths=lengths))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_padding_is_never_read_by_the_formula(kind, value):
    """Nor by the composite path, which create_graph takes."""
    rnn = kind.ours(4, 6, bidirectional=True, dtype=torch.float64)
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    lengths = torch.tensor([2, 5, 1])
    padding = torch.arange(5)[:, None] >= lengths
    found = []
    for pad in (0.0, value):
        leaves = [leaf(x.masked_fill(padding[..., None], pad)), *rnn.parameters()]
        loss = loss_of(rnn(leaves[0], lengths=lengths))
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        second = torch.autograd.grad(sum(grad.square().sum() for grad in first), leaves)
        found.append({str(i): grad for i, grad in enumerate([*first, *second])})
    assert_same(found[1], found[0])


def test_lengths_may_be_a_list(kind):
    """A list of ints serves as lengths."""
    rnn = kind.ours(4, 6)
    x = torch.randn(5, 2, 4)
    assert torch.equal(rnn(x, lengths=[5, 2])[0], rnn(x, lengths=torch.tensor([5, 2]))[0])


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=str
)
def test_lengths_of_any_integer_dtype(kind, dtype):
    """Lengths of any integers are the same lengths, in eager mode and under vmap."""
    rnn = kind.ours(4, 6)
    x, lengths = torch.randn(5, 3, 4), torch.tensor([2, 5, 1])
    want = flat(rnn(x, lengths=lengths))
    assert all(map(torch.equal, flat(rnn(x, lengths=lengths.to(dtype))), want))
    mapped = torch.func.vmap(lambda x, n: rnn(x, lengths=n)[0])(x[None], lengths.to(dtype)[None])
    torch.testing.assert_close(mapped[0], want[0])
