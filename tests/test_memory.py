"""What a call holds for backward, and how near gradients of long memories are."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import exact_run, run
from kinds import KINDS, flat

from charrnn_fast.ops import assert_fused

# In units of T*B*H of the kernels' dtype beside y.
HELD = {"RNN": 0, "LSTM": 5, "GRU": 4}


def held_for_backward(module, x, hx=None):
    """Bytes that a call saves, beside its arguments and parameters; results, and the output's."""
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        results = flat(module(x, hx))
    given = [x, *flat(hx), *module.parameters()]
    known = {tensor.untyped_storage()._cdata for tensor in given}
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in saved}
    return sum(size for key, size in storages.items() if key not in known), results


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("options", [{}, {"num_layers": 2}, {"bidirectional": True}], ids=str)
def test_held_for_backward(kind, options, dtype):
    """At most y of each layer, and what a cell saves of each unit."""
    T, B, H = 50, 8, 64
    ours = kind.ours(16, H, dtype=dtype, **options)
    x = torch.randn(T, B, 16, dtype=dtype, requires_grad=True)
    with assert_fused():
        held, results = held_for_backward(ours, x)
    unit = T * B * H * x.element_size()
    rows = ours.num_layers * (2 if ours.bidirectional else 1)
    states = sum(state.nbytes for state in results[1:])
    assert held <= rows * (1 + HELD[kind.name]) * unit + 2 * states
    assert held >= rows * unit  # y of each layer, if nothing else: the hooks do see it


@pytest.mark.parametrize("why", ["no_grad", "frozen", "inference"])
def test_nothing_is_held_where_no_gradient_is_wanted(kind, why):
    """Nothing is saved, and no result knows of a graph."""
    ours = kind.ours(16, 64, 2, bidirectional=True)
    if why == "frozen":
        ours.requires_grad_(False)
    with torch.inference_mode(why == "inference"), torch.set_grad_enabled(why == "frozen"):
        held, results = held_for_backward(ours, torch.randn(20, 4, 16))
    assert held == 0
    assert all(tensor.grad_fn is None for tensor in results)


@pytest.mark.parametrize("bias", [6.0, 9.0, 12.0, 15.0])
def test_gradients_of_a_long_memory(isa, bias):
    """Update gates near one, over 200 steps: gradients stay within 1e-5 of float64.

    1 - z of a rounded z has no digits left there, which costs nn.GRU 2e-5 to 1e-1.
    """
    for kind in KINDS:
        if kind.name == "GRU":
            ours = kind.ours(8, 32)
            with torch.no_grad():
                ours.bias_ih_l0[32:64] = bias
            x, hx = torch.randn(200, 4, 8), kind.state(1, 4, 32)
            with assert_fused():
                got = run(ours, x, hx)
            for name, truth in exact_run(ours, x, hx).items():
                error = (got[name] - truth).abs().max() / truth.abs().max()
                assert error <= 1e-5, f"{name}: {error:.2g}"


def test_bfloat16_keeps_c_in_float32(isa):
    """Small steps of c, below half a unit of bfloat16, add up through a layer."""
    for kind in KINDS:
        if kind.has_cell_state:
            H, T = 16, 500
            ours = kind.ours(1, H, dtype=torch.bfloat16)
            with torch.no_grad():
                for parameter in ours.parameters():
                    parameter.zero_()
                # i is about 1/64, f nearly 1, g about 1: c grows by 1/64 a step.
                ours.bias_ih_l0[:H] = -4.125
                ours.bias_ih_l0[H : 2 * H] = 20.0
                ours.bias_ih_l0[2 * H : 3 * H] = 20.0
            x = torch.zeros(T, 2, 1, dtype=torch.bfloat16)
            with torch.no_grad():
                c_n = flat(ours(x))[2]
            want = flat(ours.double()(x.double()))[2]
            # In bfloat16 c would stop at 4, where its unit is 1/32.
            assert (c_n.double() - want).abs().max() <= want.max() * 2.0**-8
            assert want.max() > 7


def kilobytes_of_huge_pages_asked_for():
    """Of this process; None where the system does not tell."""
    try:
        regions = Path("/proc/self/smaps").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    if "VmFlags" not in regions:
        return None
    found = re.findall(r"^Size: +(\d+) kB$.*?^VmFlags:([^\n]*)$", regions, re.MULTILINE | re.DOTALL)
    return sum(int(size) for size, flags in found if "hg" in flags.split())


CODE_OF_A_LARGE_CALL = """
import sys, torch, charrnn_fast as c
from test_memory import kilobytes_of_huge_pages_asked_for as asked
module = c.RNN(64, int(sys.argv[1]))
before = asked()
results = module(torch.randn(int(sys.argv[2]), 4, 64))
print(before, asked())
"""


@pytest.mark.parametrize(("H", "T", "megabytes"), [(512, 8, 0), (2048, 8, 16), (64, 8192, 8)])
def test_large_blocks_lie_in_huge_pages(H, T, megabytes):
    """Packed weights and results, as far as they fill them; small blocks do not ask."""
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("this system has no transparent huge pages")
    if kilobytes_of_huge_pages_asked_for() is None:
        pytest.skip("this system does not tell which pages were asked for")
    said = subprocess.run(
        [sys.executable, "-c", CODE_OF_A_LARGE_CALL, str(H), str(T)],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    )
    before, after = map(int, said.stdout.split())
    assert after - before >= 1024 * megabytes
    assert megabytes > 0 or after == before
