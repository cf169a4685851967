"""return_cell_states: c of every step of an LSTM, which torch.nn keeps to itself."""

import copy

import pytest
import torch
from helpers import (
    assert_same,
    assert_same_bits,
    beyond_torch_2_9,
    leaf,
    leaves_of,
    loss_of,
    named,
    run,
)
from kinds import KINDS, each, flat
from reference import stack
from torch.func import vmap
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from charrnn_fast.ops import assert_fused

T, B, I, H = 6, 4, 3, 5
LENGTHS = torch.tensor([6, 2, 5, 1])
WITH_CELLS = [kind for kind in KINDS if kind.has_cell_state]


@pytest.fixture(params=WITH_CELLS, ids=str)
def kind(request):
    """The kinds that have cell states."""
    return request.param


@pytest.mark.parametrize("through", ["all", "cells"])
def test_against_a_loop_over_the_cell(isa, kind, through):
    """Every c and every gradient, through the cell states alone, too, are those of LSTMCell."""
    stock, ours = kind.stock_cell(I, H, dtype=torch.float64), kind.ours(I, H, dtype=torch.float64)
    ours.load_state_dict({f"{name}_l0": p for name, p in stock.state_dict().items()})
    x, hx = torch.randn(T, B, I).double(), kind.state(1, B, H, dtype=torch.float64)
    results = []
    for is_ours in (True, False):
        data = leaf(x)
        state, leaves = leaves_of(hx)
        if is_ours:
            with assert_fused():
                output, (h_n, c_n), cells = ours(data, state, return_cell_states=True)
        else:
            h, c = (tensor[0] for tensor in state)
            steps = []
            for x_t in data:
                h, c = stock(x_t, (h, c))
                steps.append((h, c))
            output, cells = (torch.stack(tensors) for tensors in zip(*steps, strict=True))
            h_n, c_n = h[None], c[None]
        found = (output, h_n, c_n, cells)
        module = ours if is_ours else stock
        wanted = [data, *leaves.values(), *module.parameters()]
        loss = loss_of(cells if through == "cells" else found)
        results.append([*found, *torch.autograd.grad(loss, wanted)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("with_lengths", [False, True])
@pytest.mark.parametrize("with_resets", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_layers_and_directions(kind, with_lengths, with_resets, bidirectional):
    """Those of the last layer, both directions side by side, zero past a sequence's end."""
    ours = kind.ours(I, H, 2, bidirectional=bidirectional, dtype=torch.float64)
    x = leaf(torch.randn(T, B, I).double())
    lengths = LENGTHS if with_lengths else None
    resets = torch.rand(T, B) < 0.3 if with_resets else None
    wanted = [x, *ours.parameters()]
    options = {"resets": resets, "return_cell_states": True}
    got = ours(x, None, lengths, **options)
    want = stack(x, None, ours._flat_weights, "LSTM", True, 2, bidirectional, lengths, resets)
    for a, b in zip(
        [*flat(got), *torch.autograd.grad(loss_of(got), wanted)],
        [*flat(want), *torch.autograd.grad(loss_of(want), wanted)],
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    assert got[2].shape == got[0].shape


def test_packed(kind):
    """Packed for packed input, in its order, with the values that lengths= gives."""
    ours = kind.ours(I, H, 2, bidirectional=True)
    x = torch.randn(T, B, I)
    packed = pack_padded_sequence(x, LENGTHS, enforce_sorted=False)
    output, states, cells = ours(packed, return_cell_states=True)
    assert isinstance(cells, PackedSequence)
    for a, b in zip(cells[1:], output[1:], strict=True):
        assert torch.equal(a, b)
    want, want_states, want_cells = ours(x, None, LENGTHS, return_cell_states=True)
    assert torch.equal(pad_packed_sequence(output)[0], want)
    assert torch.equal(pad_packed_sequence(cells)[0], want_cells)
    assert all(map(torch.equal, states, want_states))


def test_shapes(kind):
    """Shaped as output is: batch first, one sequence, ids."""
    first = kind.ours(I, H, 2, batch_first=True)
    x = torch.randn(T, B, I)
    output, _, cells = first(x.transpose(0, 1), return_cell_states=True)
    assert cells.shape == output.shape == (B, T, H)
    one, (_, c_n), one_cells = first(x[:, 0], return_cell_states=True)
    assert one_cells.shape == one.shape == (T, H)
    torch.testing.assert_close(one_cells, cells[0])
    torch.testing.assert_close(one_cells[-1], c_n[-1])
    ids = torch.randint(I, (B, T))
    torch.testing.assert_close(
        first(ids, return_cell_states=True), first(torch.eye(I)[ids], return_cell_states=True)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_asking_changes_no_bit(isa, kind, dtype):
    """Results and gradients are those of a call that does not ask; c_n is among what it gets."""
    ours = kind.ours(9, 37, dtype=dtype)
    x = torch.randn(7, 5, 9).to(dtype)
    plain, asked = named(ours(x)), named(ours(x, return_cell_states=True))
    cells = asked.pop("cells")
    assert_same_bits(asked, plain)
    assert torch.equal(cells[-1], asked["c_n"][0])
    grads = []
    for options in ({}, {"return_cell_states": True}):
        found = flat(ours(x, **options))[:3]
        grads.append(torch.autograd.grad(loss_of(found), ours.parameters()))
    assert all(map(torch.equal, *grads))


def test_results_are_no_views_of_one_another(kind):
    """Changing the cell states in place changes nothing else, before backward, too."""
    ours = kind.ours(I, H, dtype=torch.float64)
    x = torch.randn(T, B, I).double()
    found = flat(ours(x, return_cell_states=True))
    assert len({tensor.untyped_storage().data_ptr() for tensor in found}) == 4
    copies = [tensor.clone() for tensor in flat(ours(x, return_cell_states=True))]
    for tensors in (found, copies):
        tensors[3].mul_(2)
        tensors[2].zero_()
    got, want = (torch.autograd.grad(loss_of(t), ours.parameters()) for t in (found, copies))
    torch.testing.assert_close(got, want)


def test_derivatives(kind):
    """vmap, and second derivatives through the cell states."""
    ours = kind.ours(I, H, dtype=torch.float64)
    x = torch.randn(3, T, B, I).double()
    got = vmap(lambda x: ours(x, return_cell_states=True)[2])(x)
    for i in range(3):
        torch.testing.assert_close(got[i], ours(x[i], return_cell_states=True)[2])
    params = list(ours.parameters())
    results = []
    for call in (
        lambda x: ours(x, return_cell_states=True)[2],
        lambda x: stack(x, None, params, "LSTM", True, 1, False)[2],
    ):
        data = leaf(x[0])
        first = torch.autograd.grad(loss_of(call(data)), [data, *params], create_graph=True)
        loss = sum(grad.square().sum() for grad in first)
        results.append(
            [*first, *torch.autograd.grad(loss, [data, *params], materialize_grads=True)]
        )
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


@beyond_torch_2_9
def test_full_graph(kind):
    """A compiled call gives them, and trains through them."""
    torch._dynamo.reset()
    ours = kind.ours(I, H, 2)
    x = torch.randn(T, B, I)
    with torch._dynamo.config.patch(allow_rnn=True):
        compiled = torch.compile(copy.deepcopy(ours), fullgraph=True, backend="aot_eager")
        results = []
        for module in (ours, compiled):
            found = module(x, return_cell_states=True)
            results.append(
                [*flat(found), *torch.autograd.grad(loss_of(found), module.parameters())]
            )
    torch.testing.assert_close(results[1], results[0])
    torch._dynamo.reset()


def test_others_have_none():
    """The other kinds know no such argument, as they have no such state."""
    for other in KINDS:
        if not other.has_cell_state:
            with pytest.raises(TypeError, match="return_cell_states"):
                other.ours(I, H)(torch.randn(T, B, I), return_cell_states=True)


# Projections are not oneDNN's, says torch.
@pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")
@pytest.mark.parametrize(
    "given",
    [
        {"return_cell_states": True},
        {"lengths": LENGTHS},
        {"resets": torch.zeros(T, B, dtype=torch.bool)},
    ],
    ids=lambda given: next(iter(given)),
)
def test_projections_are_torch_nn_s(kind, given):
    """proj_size: results and gradients by torch.nn's own way; what that lacks is refused."""
    stock, ours = kind.pair(I, H, 2, proj_size=2, bidirectional=True)
    x = torch.randn(T, B, I)
    hx = (torch.randn(4, B, 2), torch.randn(4, B, H))
    assert_same(run(ours, x, hx), run(stock, x, hx))
    packed = pack_padded_sequence(x, LENGTHS, enforce_sorted=False)
    assert_same(run(ours, packed, hx), run(stock, packed, hx))
    with pytest.raises(NotImplementedError, match="proj_size"):
        ours(x, **given)
    with pytest.raises(NotImplementedError, match="proj_size"):
        ours(torch.randint(I, (T, B)))


@pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")
def test_repr_of_projections(kind):
    """A projection shows, and is copied and saved, as in torch.nn."""
    stock, ours = kind.pair(I, H, proj_size=2)
    assert repr(ours) == repr(stock)
    again = copy.deepcopy(ours)
    again.load_state_dict(stock.state_dict())
    state = each(lambda tensor: tensor, (torch.zeros(1, B, 2), torch.zeros(1, B, H)))
    x = torch.randn(T, B, I)
    torch.testing.assert_close(again(x, state), stock(x, state))


@pytest.mark.parametrize("value", [1, "yes", None, torch.tensor(True)], ids=repr)
def test_anything_but_a_bool_is_refused(kind, value):
    """The flag decides how many results there are: what is merely true or false is refused."""
    lstm, x = kind.ours(I, H), torch.randn(T, B, I)
    expected = f"return_cell_states must be a bool, got {type(value).__name__}"
    with pytest.raises(TypeError, match=expected):
        lstm(x, return_cell_states=value)
    with pytest.raises(TypeError, match=expected):
        lstm(x, None, None, None, value)
