"""resets=: a state that is zero before a step is a sequence that is split there."""

import copy
import itertools

import pytest
import torch
import torch.autograd.forward_ad as fwAD
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
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import KINDS, each, flat
from reference import stack
from torch.func import functional_call, grad, vmap
from torch.nn.utils.rnn import pack_sequence

from charrnn_fast.ops import assert_fused

# torch's own forward-mode AD warns of a module of torch that it uses.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")

T, B, I, H = 6, 4, 3, 5
LENGTHS = torch.tensor([6, 2, 5, 1])


def at(*places):
    """A mask that is true at these steps of all sequences, or at (step, sequence)."""
    mask = torch.zeros(T, B, dtype=torch.bool)
    for place in places:
        mask[place] = True
    return mask


MASKS = {
    "nowhere": at(),
    "everywhere": ~at(),
    "step 0": at(0),
    "last step": at(T - 1),
    "one sequence": at((2, 1), (0, 3)),
    "many": at((0, 0), (3, 0), (4, 0), (1, 1), (5, 2), (2, 3), (3, 3)),
}
OPTIONS = [{}, {"num_layers": 2, "bidirectional": True}, {"bidirectional": True, "bias": False}]


def formula_run(module, x, hx, resets, lengths=None):
    """What :func:`run` returns, by the formula."""
    module = copy.deepcopy(module)
    x = leaf(x)
    hx, states = leaves_of(hx)
    output, final, _ = stack(
        x,
        hx,
        list(module.parameters()),
        module.mode,
        module.bias,
        module.num_layers,
        module.bidirectional,
        lengths,
        resets,
    )
    loss_of((output, final)).backward()
    found = named((output, final))
    if x.is_floating_point():
        found["d input"] = x.grad
    for name, tensor in states.items():  # which no result may depend on
        found[f"d {name}"] = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
    return found | {f"d {name}": p.grad for name, p in module.named_parameters()}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("with_lengths", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_resets(kind, options, with_lengths, mask):
    """Results and every gradient are the formula's; past a sequence's end a reset means nothing."""
    ours = kind.ours(I, H, dtype=torch.float64, **options)
    rows = ours.num_layers * (2 if ours.bidirectional else 1)
    x, hx = torch.randn(T, B, I).double(), kind.state(rows, B, H, dtype=torch.float64)
    resets, lengths = MASKS[mask], LENGTHS if with_lengths else None
    with assert_fused():
        got = run(ours, x, hx, resets=resets, lengths=lengths)
    want = formula_run(ours, x, hx, resets, lengths)
    assert_same(got, want, rtol=1e-10, atol=1e-10)
    without = run(ours, x, None, resets=resets, lengths=lengths)
    assert_same(without, formula_run(ours, x, None, resets, lengths), rtol=1e-10, atol=1e-10)


@settings(max_examples=25 * len(KINDS), deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    rate=st.sampled_from([0.05, 0.3, 0.9]),
    bidirectional=st.booleans(),
    tokens=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_resets(kind, lengths, rate, bidirectional, tokens, seed):
    """Any mask and lengths, ids or vectors, two layers: the formula's results and gradients."""
    torch.manual_seed(seed)
    steps, batch = max(lengths), len(lengths)
    ours = kind.ours(I, H, 2, bidirectional=bidirectional, dtype=torch.float64)
    x = torch.randint(I, (steps, batch)) if tokens else torch.randn(steps, batch, I).double()
    hx = kind.state(4 if bidirectional else 2, batch, H, dtype=torch.float64)
    resets, lengths = torch.rand(steps, batch) < rate, torch.tensor(lengths)
    got = run(ours, x, hx, resets=resets, lengths=lengths)
    assert_same(got, formula_run(ours, x, hx, resets, lengths), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reverse", [False, True])
def test_pieces_have_the_bits_that_they_have_alone(isa, kind, reverse, dtype):
    """Each piece of each sequence, given to the module by itself, gives the same bits."""
    ours = kind.ours(9, 37, bidirectional=reverse, dtype=dtype)
    own = slice(37, 74) if reverse else slice(0, 37)
    rows = 2 if reverse else 1
    x, resets = torch.randn(12, 3, 9).to(dtype), torch.rand(12, 3) < 0.3
    hx = each(lambda tensor: tensor.to(dtype), kind.state(rows, 3, 37))
    with torch.no_grad(), assert_fused():
        output, final = ours(x, hx, resets=resets)
        for b in range(3):
            cuts = [0, *[t for t in range(1, 12) if resets[t, b]], 12]
            spans = list(itertools.pairwise(cuts))
            for begin, end in spans:
                # Forward, the given state is the first piece's; in reverse the last one's.
                given = end == 12 if reverse else begin == 0 and not resets[0, b]
                state = each(lambda tensor: tensor[:, b : b + 1], hx) if given else None
                piece, last = ours(x[begin:end, b : b + 1], state)
                assert torch.equal(piece[:, 0, own], output[begin:end, b, own])
                if begin == 0 if reverse else end == 12:
                    for got, want in zip(flat(final), flat(last), strict=True):
                        assert torch.equal(got[-1, b], want[-1, 0])


def test_splitting_by_hand(kind):
    """What one does without: pieces through torch.nn's class, one after the other."""
    stock, ours = kind.pair(I, H, dtype=torch.float64)
    x, hx = torch.randn(T, B, I).double(), kind.state(1, B, H, dtype=torch.float64)
    resets = MASKS["many"]
    got = run(ours, x, hx, resets=resets)
    x = leaf(x)
    hx, states = leaves_of(hx)
    columns, finals = [], []
    for b in range(B):
        state = each(lambda tensor: tensor[:, b], hx)
        ys = []
        for t in range(T):
            if resets[t, b]:
                state = None
            y, state = stock(x[t : t + 1, b], state)
            ys.append(y)
        columns.append(torch.cat(ys))
        finals.append(flat(state))
    final = [torch.stack(tensors, 1) for tensors in zip(*finals, strict=True)]
    output = torch.stack(columns, 1)
    loss_of((output, *final)).backward()
    want = named((output, *final)) | {"d input": x.grad}
    want |= {f"d {name}": tensor.grad for name, tensor in states.items()}
    want |= {f"d {name}": p.grad for name, p in stock.named_parameters()}
    assert_same(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_resets_nowhere_change_no_bit(kind, options):
    """A mask that is false everywhere is no mask."""
    ours = kind.ours(I, H, **options)
    x = torch.randn(T, B, I)
    assert_same_bits(run(ours, x, resets=at()), run(ours, x))


def test_an_unused_state_is_not_read(kind):
    """With a reset at step 0, h and c may be NaN: they are not read, and have no gradient."""
    ours = kind.ours(I, H)
    x, resets = torch.randn(T, B, I), at(0)
    hx = each(lambda tensor: torch.full_like(tensor, torch.nan), kind.state(1, B, H))
    got = run(ours, x, hx, resets=resets)
    want = run(ours, x, each(torch.zeros_like, hx))
    for name, tensor in got.items():
        if name in ("d hx", "d cx"):
            assert not tensor.any()
        else:
            torch.testing.assert_close(tensor, want[name], msg=name)


def test_batch_first_and_unbatched(kind):
    """The mask is (B, T) with batch_first, (T) of one sequence; strides do not matter."""
    stock, ours = (kind.ours(I, H, 2, batch_first=first) for first in (False, True))
    ours.load_state_dict(stock.state_dict())
    x, resets = torch.randn(T, B, I), MASKS["many"]
    output, final = stock(x, resets=resets)
    for mask in (resets.t(), resets.t().contiguous()):
        got, states = ours(x.transpose(0, 1), resets=mask)
        assert torch.equal(got.transpose(0, 1), output)
        assert all(map(torch.equal, flat(states), flat(final)))
    for module in (stock, ours):
        one, states = module(x[:, 0], resets=resets[:, 0])
        torch.testing.assert_close(one, output[:, 0])
        assert flat(states)[0].shape == (2, H)
    wide = torch.zeros(T, 2 * B, dtype=torch.bool)
    wide[:, ::2] = resets
    assert torch.equal(stock(x, resets=wide[:, ::2])[0], output)


def test_same_bits_for_any_threads_and_batch(isa, kind):
    """Results and gradients for any number of threads, results in any batch."""
    ours = kind.ours(20, 96, bidirectional=True)
    x, resets = torch.randn(40, 24, 20), torch.rand(40, 24) < 0.1
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(run(ours, x, resets=resets))
    for other in results[1:]:
        assert_same_bits(other, results[0])
    with torch.no_grad():
        for part in (slice(0, 1), slice(5, 12)):
            alone = ours(x[:, part], resets=resets[:, part])[0]
            assert torch.equal(alone, results[0]["output"][:, part])


def test_second_derivatives(kind):
    """Double backward and forward mode: those of the formula."""
    ours = kind.ours(I, H, 2, bidirectional=True, dtype=torch.float64)
    x, tangent = torch.randn(2, T, B, I).double()
    resets, params = MASKS["many"], list(ours.parameters())

    def by_formula(x):
        return stack(x, None, params, ours.mode, True, 2, True, LENGTHS, resets)[:2]

    def by_module(x):
        return ours(x, None, LENGTHS, resets=resets)

    results = []
    for call in (by_formula, by_module):
        data = leaf(x)
        first = torch.autograd.grad(loss_of(call(data)), [data, *params], create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), [data, *params])
        with fwAD.dual_level():
            found = flat(call(fwAD.make_dual(x, tangent)))
            tangents = [fwAD.unpack_dual(tensor).tangent for tensor in found]
        results.append([*first, *second, *tangents])
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-9)


def test_vmap_over_masks(kind):
    """Each element of a map may have a mask of its own; per-sample gradients, too."""
    ours = kind.ours(I, H, 2, bidirectional=True)
    x, resets = torch.randn(5, T, B, I), torch.rand(5, T, B) < 0.3
    got = vmap(lambda x, r: ours(x, resets=r))(x, resets)
    params = {name: p.detach() for name, p in ours.named_parameters()}

    def loss(params, x, mask):
        return loss_of(functional_call(ours, params, (x,), {"resets": mask}))

    per_sample = vmap(grad(loss), in_dims=(None, 0, 0))(params, x, resets)
    for i in range(5):
        want = flat(ours(x[i], resets=resets[i]))
        torch.testing.assert_close([tensor[i] for tensor in flat(got)], want)
        alone = grad(loss)(params, x[i], resets[i])
        for name in params:
            torch.testing.assert_close(per_sample[name][i], alone[name], msg=name)


@beyond_torch_2_9
def test_full_graph(kind):
    """One graph serves any T and B, with its gradients."""
    torch._dynamo.reset()
    ours = kind.ours(I, H, 2, bidirectional=True)
    with torch._dynamo.config.patch(allow_rnn=True):
        compiled = torch.compile(
            copy.deepcopy(ours), fullgraph=True, dynamic=True, backend="aot_eager"
        )
        for steps, batch in ((6, 4), (9, 3), (7, 8)):
            x, resets = torch.randn(steps, batch, I), torch.rand(steps, batch) < 0.3
            results = []
            for module in (ours, compiled):
                data = leaf(x)
                found = module(data, resets=resets)
                grads = torch.autograd.grad(loss_of(found), [data, *module.parameters()])
                results.append([*flat(found), *grads])
            torch.testing.assert_close(results[1], results[0])
    torch._dynamo.reset()


def test_export(kind):
    """A program with a mask for input serves other masks."""
    ours = kind.ours(I, H).eval()
    x = torch.randn(T, B, I)
    program = torch.export.export(ours, (x,), {"resets": at()}).module()
    for mask in MASKS.values():
        torch.testing.assert_close(flat(program(x, resets=mask)), flat(ours(x, resets=mask)))


@pytest.mark.parametrize(
    "resets",
    [
        torch.zeros(T, B),
        torch.zeros(T, B, dtype=torch.int64),
        torch.zeros(T, B, dtype=torch.uint8),
        torch.zeros(B, T, dtype=torch.bool),
        torch.zeros(T, dtype=torch.bool),
        torch.zeros(T, B, 1, dtype=torch.bool),
        torch.zeros(T - 1, B, dtype=torch.bool),
        torch.zeros(T, B + 1, dtype=torch.bool),
        torch.zeros((), dtype=torch.bool),
        torch.zeros(0, B, dtype=torch.bool),
    ],
    ids=lambda resets: f"{resets.dtype}{tuple(resets.shape)}",
)
def test_wrong_masks(kind, resets):
    """What is no mask of this batch is refused, and named."""
    with pytest.raises((TypeError, ValueError, RuntimeError), match="resets"):
        kind.ours(I, H)(torch.randn(T, B, I), resets=resets)


def test_masks_of_another_device_and_type(kind):
    """What is no tensor of the CPU is refused, too."""
    for resets in (at().to("meta"), "resets", object()):
        with pytest.raises((TypeError, ValueError, RuntimeError)):
            kind.ours(I, H)(torch.randn(T, B, I), resets=resets)


def test_with_packed_sequences(kind):
    """A packed sequence has no place for them: the error names lengths=."""
    with pytest.raises(ValueError, match="resets.*lengths="):
        kind.ours(I, H)(pack_sequence([torch.randn(T, I)]), resets=at()[:, :1])


@pytest.mark.parametrize("batched", [False, True])
def test_reset_of_a_cell(isa, kind, batched):
    """reset= of a cell: a row whose state counts as zeros, and gets no gradient."""
    cell = kind.cell(I, H, dtype=torch.float64)
    shape = (B,) if batched else ()
    x, hx = torch.randn(*shape, I).double(), kind.state(*shape, H, dtype=torch.float64)
    for reset in (torch.rand(shape) < 0.5, torch.zeros(shape).bool(), torch.ones(shape).bool()):
        with assert_fused():
            got = run(cell, x, hx, reset=reset)
        zeroed = each(lambda tensor: torch.where(reset[..., None], 0.0, tensor), hx)
        want = run(cell, x, zeroed)
        for name in ("hx", "cx")[: len(kind.states)]:
            want[f"d {name}"] = torch.where(reset[..., None], 0.0, want[f"d {name}"])
        assert_same(got, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(flat(cell(x, None, reset=reset)), flat(cell(x)))


def test_a_loop_over_a_cell(kind):
    """The loop of a reinforcement learner, in one call."""
    ours, cell = kind.ours(I, H, dtype=torch.float64), kind.cell(I, H, dtype=torch.float64)
    cell.load_state_dict({n.removesuffix("_l0"): p for n, p in ours.state_dict().items()})
    x, resets = torch.randn(T, B, I).double(), MASKS["many"]
    hx = kind.state(1, B, H, dtype=torch.float64)
    output, final = ours(x, hx, resets=resets)
    state = each(lambda tensor: tensor[0], hx)
    for t in range(T):
        state = cell(x[t], state, reset=resets[t])
        torch.testing.assert_close(flat(state)[0], output[t])
    torch.testing.assert_close(flat(state), [tensor[0] for tensor in flat(final)])


@pytest.mark.parametrize(
    "reset",
    [
        torch.zeros(B),
        torch.zeros(B + 1, dtype=torch.bool),
        torch.zeros(B, 1, dtype=torch.bool),
        torch.zeros((), dtype=torch.bool),
    ],
    ids=lambda reset: f"{reset.dtype}{tuple(reset.shape)}",
)
def test_wrong_masks_of_a_cell(kind, reset):
    """What is no mask of these rows is refused, and named."""
    with pytest.raises((TypeError, ValueError, RuntimeError), match="reset"):
        kind.cell(I, H)(torch.randn(B, I), kind.state(B, H), reset=reset)
