from __future__ import annotations

import copy
import math

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from charrnn_fast.charlm.optimizer import AdamW


def model(large: bool = True) -> nn.Module:
    """Weights of awkward sizes; the large one is longer than what PyTorch gives to one thread."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(300, 201 if large else 20), nn.Linear(3, 1), nn.RNN(7, 13))


def fill(models: list[nn.Module]) -> None:
    for parameters in zip(*(m.parameters() for m in models), strict=True):
        gradient = torch.randn_like(parameters[0])
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            p.grad += gradient


@pytest.mark.parametrize("limit", [0.5, 1e6, 0.0])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("large", [False, True])
def test_steps_are_those_of_pytorch(limit, weight_decay, large):
    """torch.optim.AdamW after clip_grad_norm_, over steps of different rates: weights, clipped
    gradients and norm."""
    ours, theirs = model(large), model(large)
    before = [p.detach().clone() for p in theirs.parameters()]
    optimizer = AdamW(ours, weight_decay)
    other = torch.optim.AdamW(theirs.parameters(), weight_decay=weight_decay)
    for p, q in zip(ours.parameters(), before, strict=True):
        assert torch.equal(p, q)
    for rate in (1e-2, 1e-3, 3e-3):
        optimizer.zero_grad()
        other.zero_grad()
        fill([ours, theirs])
        norm = nn.utils.clip_grad_norm_(theirs.parameters(), limit or math.inf)
        other.param_groups[0]["lr"] = rate
        other.step()
        torch.testing.assert_close(optimizer.step(rate, limit), norm)
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(p.grad, q.grad)


def test_weights_are_copied_and_saved_as_ever():
    """Although they share a vector: by state_dict, safetensors and deepcopy, each with its own."""
    m = model()
    before = {k: v.clone() for k, v in m.state_dict().items()}
    AdamW(m)
    loaded = load(save(m.state_dict()))
    copied = copy.deepcopy(m)
    with torch.no_grad():
        for p in m.parameters():
            p.zero_()
    for found in (loaded, copied.state_dict()):
        assert found.keys() == before.keys()
        assert all(torch.equal(found[k], before[k]) for k in before)
    m.load_state_dict(before)
    assert all(torch.equal(p, before[k]) for k, p in m.named_parameters())


@pytest.mark.parametrize("large", [False, True])
def test_same_bits_for_any_number_of_threads(large):
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        m = model(large)
        optimizer = AdamW(m)
        fill([m])
        norm = optimizer.step(1e-2, 1.0)
        results.append((norm, optimizer.weights, optimizer.exp_avg_sq))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_state_goes_on(tmp_path):
    """Moments by the names of the weights; what is loaded goes on to the same bits."""
    m = model()
    optimizer = AdamW(m)
    fill([m])
    optimizer.step(1e-2, 1.0)
    state = {k: v.clone() for k, v in optimizer.state().items()}
    names = {name for name, _ in m.named_parameters()}
    moments = {f"{name}.{k}" for name in names for k in ("exp_avg", "exp_avg_sq")}
    assert state.keys() == {"step", *moments}
    assert all(state[f"{n}.exp_avg"].shape == p.shape for n, p in m.named_parameters())
    other = copy.deepcopy(m)
    again = AdamW(other)
    again.load_state(state)
    for o in (optimizer, again):
        o.zero_grad()
    fill([m, other])
    assert torch.equal(optimizer.step(1e-2, 1.0), again.step(1e-2, 1.0))
    assert torch.equal(optimizer.weights, again.weights)
    with pytest.raises(ValueError, match=r"0.bias.exp_avg is \(3,\), expected \(201,\)"):
        again.load_state({**state, "0.bias.exp_avg": torch.zeros(3)})
    with pytest.raises(KeyError):
        again.load_state({})


def test_average_of_the_weights():
    """Exponential, and of few steps in the beginning; the model has it for a while when asked."""
    m = model(large=False)
    optimizer = AdamW(m, average=0.5)
    averages = [p.detach().clone() for p in m.parameters()]
    for step in range(1, 21):
        optimizer.zero_grad()
        fill([m])
        optimizer.step(1e-2, 0.0)
        decay = min(0.5, step / (step + 10))
        for average, p in zip(averages, m.parameters(), strict=True):
            average.lerp_(p.detach(), 1 - decay)
    last = [p.detach().clone() for p in m.parameters()]
    for average, found in zip(averages, optimizer.averages().values(), strict=True):
        torch.testing.assert_close(found, average)
    with optimizer.averaged():
        for average, p in zip(averages, m.parameters(), strict=True):
            torch.testing.assert_close(p.detach(), average)
    for before, p in zip(last, m.parameters(), strict=True):
        assert torch.equal(p, before)
    assert AdamW(model(large=False)).averages() == {}


def test_other_decays_of_moments():
    ours, theirs = model(False), model(False)
    optimizer = AdamW(ours, 0.1, betas=(0.8, 0.95))
    other = torch.optim.AdamW(theirs.parameters(), 1e-2, betas=(0.8, 0.95), weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        other.zero_grad()
        fill([ours, theirs])
        other.step()
        optimizer.step(1e-2, 0.0)
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)
