"""Beyond nn.RNN: token ids as input, and lengths of a padded batch."""

import pytest
import torch
from helpers import assert_same, leaf, pair, run
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import charrnn_fast
from charrnn_fast.ops import assert_fused


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_tokens_equal_one_hot(isa, batch_first, bidirectional):
    """Ids give the outputs and gradients of their one-hot vectors."""
    stock, ours = pair(11, 6, 2, batch_first=batch_first, bidirectional=bidirectional)
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
def test_tokens_of_a_large_vocabulary(isa, shape):
    """Few ids of many, one of them more than once; the same bits for any number of threads."""
    T, B, V, H = shape
    rnn = charrnn_fast.RNN(V, H)
    ids = torch.randint(V, (T, B))
    ids[-1] = ids[0]
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run(rnn, ids))
    for other in results[1:]:
        assert_same(other, results[0], rtol=0, atol=0)
    one_hot = run(rnn, nn.functional.one_hot(ids, V).float())
    del one_hot["d input"]
    assert_same(results[0], one_hot, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bad", [11, -1, 2**40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_out_of_range(bad, dtype):
    """An id outside the vocabulary is an IndexError that names it."""
    rnn = charrnn_fast.RNN(11, 6, dtype=dtype)
    ids = torch.randint(11, (5, 3))
    ids[3, 1] = bad
    with pytest.raises(IndexError, match=f"token id {bad} .*input_size is 11.*step 3.*sequence 1"):
        rnn(ids)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_lengths_equal_packing(isa, bidirectional, batch_first):
    """lengths= gives the outputs (zero past the end), states and gradients of a packed batch."""
    stock, ours = pair(4, 6, 2, batch_first=batch_first, bidirectional=bidirectional)
    lengths = torch.tensor([2, 5, 1, 4])
    shape = (4, 5, 4) if batch_first else (5, 4, 4)
    data, hx = torch.randn(shape), torch.randn(4 if bidirectional else 2, 4, 6)

    def packed(module, x, h):
        sequence = pack_padded_sequence(x, lengths, batch_first, enforce_sorted=False)
        output, h_n = module(sequence, h)
        return pad_packed_sequence(output, batch_first)[0], h_n

    results = []
    for call in (
        lambda x, h: packed(stock, x, h),
        lambda x, h: ours(x, h, lengths),
    ):
        x, h = leaf(data), leaf(hx)
        output, h_n = call(x, h)
        (output.cos().sum() + h_n.sin().sum()).backward()
        results.append({"output": output, "h_n": h_n, "x": x.grad, "h": h.grad})
    assert_same(results[1], results[0])
    for a, b in zip(ours.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    padding = results[1]["output"]
    assert (padding if batch_first else padding.transpose(0, 1))[0, 2:].abs().sum() == 0


def test_padding_is_never_read():
    """What lies past a sequence's end, be it nan, touches neither results nor gradients."""
    rnn = charrnn_fast.RNN(4, 6, bidirectional=True)
    lengths = torch.tensor([2, 5, 1])
    clean = torch.randn(5, 3, 4)
    for b, n in enumerate(lengths):
        clean[n:, b] = 0
    dirty = clean.clone()
    for b, n in enumerate(lengths):
        dirty[n:, b] = float("nan")
    a, b = run(rnn, clean, lengths=lengths), run(rnn, dirty, lengths=lengths)
    assert_same(b, a, rtol=0, atol=0)


def test_lengths_may_be_a_list():
    """A list of ints serves as lengths."""
    rnn = charrnn_fast.RNN(4, 6)
    x = torch.randn(5, 2, 4)
    assert torch.equal(rnn(x, lengths=[5, 2])[0], rnn(x, lengths=torch.tensor([5, 2]))[0])
