"""Derivatives of the layer op in double, and what backward reads, keeps and notices."""

import pytest
import torch
from helpers import layer_results
from layer_calls import (
    GATES,
    LENGTHS,
    MODES,
    OPS,
    SPLITS,
    B,
    H,
    T,
    layer_of,
    make,
    rnn_layer,
)

import charrnn_fast
from charrnn_fast import ops


def is_fused(mode, input, weights, **split):
    why = ops.why_composite(input, None, None, weights, split.get("resets"), mode)
    return why is None


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("split", SPLITS)
def test_gradcheck(mode, directions, split):
    """First derivatives of every argument agree with finite differences, by the kernels."""
    x, states, weights = make(mode, directions, packed=split == "packed", hidden=3)
    call = layer_of(mode, states, **SPLITS[split])
    before = ops.counters()
    assert torch.autograd.gradcheck(call, (x, *states, *weights))
    after = ops.counters()
    ran, other = ("fused", "composite")[:: 1 if is_fused(mode, x, weights, **SPLITS[split]) else -1]
    assert after[f"backward_{ran}"] > before[f"backward_{ran}"]
    assert after[f"backward_{other}"] == before[f"backward_{other}"]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # PyTorch's own use
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("split", SPLITS)
def test_forward_mode_and_second_derivatives(mode, split):
    """Tangents, and second derivatives, agree with finite differences."""
    x, states, weights = make(mode, packed=split == "packed", hidden=2)
    call, leaves = layer_of(mode, states, **SPLITS[split]), (x, *states, *weights)
    assert torch.autograd.gradcheck(call, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("split", ["plain", "lengths and resets"])
def test_complex(mode, split):
    """Complex tensors run by the formula, with gradients by finite differences."""
    if mode == "RNN_RELU":
        pytest.skip("relu is not defined for complex numbers")
    x, states, weights = make(mode, dtype=torch.complex128)
    call = layer_of(mode, states, **SPLITS[split])
    assert torch.autograd.gradcheck(call, (x, *states, *weights), fast_mode=True)


@pytest.mark.parametrize("mode", MODES)
def test_each_gradient_alone(mode):
    """A gradient asked for alone has the bits that it has among all."""
    x, states, weights = make(mode, 2)
    leaves = [x, *states, *weights]
    call = layer_of(mode, states, lengths=LENGTHS)

    def gradients(wanted):
        for tensor in leaves:
            tensor.requires_grad_(any(tensor is w for w in wanted))
        outputs = call(*leaves)
        return torch.autograd.grad(sum(output.sin().sum() for output in outputs), wanted)

    for leaf, expected in zip(leaves, gradients(leaves), strict=True):
        assert torch.equal(gradients([leaf])[0], expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("split", ["plain", "lengths and resets"])
def test_results_may_change_in_place(mode, split):
    """Results share no memory, and may be changed before backward, with the same gradients."""
    x, states, weights = make(mode, 2)
    leaves = [x, *states, *weights]
    call = layer_of(mode, states, **SPLITS[split])
    results = []
    for change in (False, True):
        outputs = call(*leaves)
        assert len({output.untyped_storage().data_ptr() for output in outputs}) == len(outputs)
        assert not any(output._is_view() for output in outputs)
        if change:
            outputs = [output.mul_(2) for output in outputs]
        else:
            outputs = [output * 2 for output in outputs]
        loss = sum(output.sum() for output in outputs)
        results.append(torch.autograd.grad(loss, leaves))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("mode", MODES)
def test_operands_changed_before_backward(mode):
    """What backward reads may not change; a bias, where gates were kept, may."""
    x, states, weights = make(mode)
    leaves = [x, *states, *weights]
    call = layer_of(mode, states)
    for changed in (weights[0], weights[1], states[0]):
        y = call(*leaves)[0]
        with torch.no_grad():
            changed.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
    kept = rnn_layer(x.detach(), None, [w.detach() for w in weights], mode, keep=True)[4]
    y = call(*leaves)[0]
    with torch.no_grad():
        weights[2].mul_(2)
    if kept is not None or GATES[mode] == 1:
        y.sum().backward()
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("split", ["plain", "lengths", "packed"])
def test_saved_is_a_cache(mode, split):
    """Given or not, it gives the same gradients, bit for bit; it needs no gradient itself."""
    packed = split == "packed"
    x, states, weights = make(mode, 2, requires_grad=False, packed=packed)
    hx, cx = (*states, None)[:2]
    args = (x, hx, cx, weights, *(SPLITS[split].get(n) for n in ("batch_sizes", "lengths", "x")))
    y, h_n, c_n, _, saved = layer_results(
        mode, False, OPS.rnn_layer(*args, mode, True, False, True)
    )
    assert (saved is None) == (mode not in ("LSTM", "GRU"))
    assert len(OPS.rnn_layer(*args, mode, True, False, False)) == 2 + (c_n is not None)
    dc_n = None if c_n is None else c_n.sin()
    grads, needs = (y.cos(), h_n.sin(), dc_n, None), [True, True, mode == "LSTM", *[True] * 8]
    results = [
        OPS.rnn_layer_backward(*grads, *args[:4], y, cache, *args[4:], mode, True, needs)
        for cache in (saved, None, y.new_empty(0), y.new_empty(3, 1, dtype=torch.float16))
    ]
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
    leaves = make(mode, packed=packed)
    kept = rnn_layer(leaves[0], None, leaves[2], mode, keep=True, **SPLITS[split])[4]
    assert kept is None or not kept.requires_grad


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_isa_may_change_before_backward(mode, dtype):
    """What one ISA kept serves another, or is computed again where the other keeps another dtype.

    The gradients are then those of the second ISA, but for the rounding of what was kept.
    """
    x, states, weights = make(mode, 2, dtype=torch.float32)
    leaves = [t.detach().to(dtype).requires_grad_() for t in (x, *states, *weights)]
    call, grads = layer_of(mode, states, lengths=LENGTHS), {}
    isas = charrnn_fast.available_isas()
    for forward, backward in [(a, b) for a in isas for b in isas]:
        with charrnn_fast.use_isa(forward):
            outputs = call(*leaves)
        with charrnn_fast.use_isa(backward), ops.assert_fused():
            rnn_layer(x, None, weights, mode)  # so that something has run forward
            loss = sum(output.float().sin().sum() for output in outputs)
            grads[forward, backward] = torch.autograd.grad(loss, leaves)
    eps = torch.finfo(dtype).eps
    for (_, backward), got in grads.items():
        for a, b in zip(got, grads[backward, backward], strict=True):
            scale = max(1.0, float(b.float().abs().max()))
            torch.testing.assert_close(a, b, rtol=0, atol=32 * eps * scale)


@pytest.mark.parametrize("mode", MODES)
def test_kept_for_backward(mode):
    """In units of T*B*H beside y: 5 for an LSTM, 4 for a GRU; nothing without gradients."""
    units = {"LSTM": 5, "GRU": 4}.get(mode, 0)
    x, states, weights = make(mode, dtype=torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer_of(mode, states)(x, *states, *weights)[0]
    operands = {t.untyped_storage().data_ptr() for t in (x, *states, *weights, y)}
    beside = [t for t in kept if t.untyped_storage().data_ptr() not in operands]
    assert sum(t.numel() for t in beside) == units * T * B * H
    with torch.no_grad():
        assert rnn_layer(x, None, weights, mode)[4] is None


@pytest.mark.parametrize("mode", MODES)
def test_backward_takes_rows_of_any_distance(mode):
    """One row of y may stand for all, and rows may lie apart: as their copies."""
    x, _, weights = make(mode, biases=False, requires_grad=False)
    dy, needs = torch.ones(T, B, H).double(), [True, False, False, True, True]
    none = [None] * 3
    for y in (torch.rand(H).double().expand(T, B, H), torch.rand(T, B, 2 * H).double()[..., :H]):
        results = [
            OPS.rnn_layer_backward(
                dy, *none, x, None, None, weights, rows, None, *none, mode, False, needs
            )
            for rows in (y, y.contiguous())
        ]
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)
