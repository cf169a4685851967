"""Run by test_cuda.py in a process of its own: nn.RNN against the emulated CUDA path.

usage: emulated_parity.py LIBRARY; CHARRNN_FAST_DESIGN names the design.
"""

import ctypes
import itertools
import os
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import charrnn_fast
from charrnn_fast import ops
from charrnn_fast.charlm import ModelConfig, SampleOptions, build_model
from charrnn_fast.charlm.sample import draw, step, why_stepwise

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 6e-2, torch.float16: 1e-2}


def close(found, expected, what, dtype):
    bound = TOLERANCE[dtype] * max(1.0, expected.abs().max().item())
    error = (found.double() - expected).abs().max().item() if expected.numel() else 0.0
    assert error <= bound, f"{what}: off by {error:g}, allowed {bound:g}"


def compare(what, dtype, ours, reference, run, run_reference):
    """Outputs and every gradient of ours against nn.RNN in float64."""
    output, h_n = run(ours)
    expected, expected_h_n = run_reference(reference)
    close(output, expected, what + " output", dtype)
    close(h_n, expected_h_n, what + " h_n", dtype)
    generator = torch.Generator().manual_seed(3)
    g, g_n = (torch.randn(t.shape, generator=generator) for t in (expected, expected_h_n))
    ((output * g.to(dtype)).sum() + (h_n * g_n.to(dtype)).sum()).backward()
    (
        (expected * g.to(dtype).double()).sum() + (expected_h_n * g_n.to(dtype).double()).sum()
    ).backward()
    for (name, p), q in zip(ours.named_parameters(), reference.parameters(), strict=True):
        close(p.grad, q.grad, f"{what} gradient of {name}", dtype)


@torch.no_grad()
def generation(library):
    """Characters and states of the op against the step-by-step loop in float64, in two calls."""
    runs = ctypes.CDLL(library).emulated_generations
    options = [
        SampleOptions(),
        SampleOptions(temperature=0),
        SampleOptions(top_k=5),
        SampleOptions(top_p=0.8),
        SampleOptions(temperature=1.3, top_k=7, top_p=0.9),
    ]
    calls = 0
    for layers, mode, how in itertools.product((1, 2, 3), ("tanh", "relu"), options):
        config = ModelConfig(40, 24, layers, mode)
        model = build_model(config, "fast", "orthogonal", seed=layers)
        model.eval().head.weight.mul_(4)
        assert why_stepwise(model) is None
        exact = build_model(config, "torch", "orthogonal", seed=0).double().eval()
        exact.load_state_dict(model.state_dict())
        torch.manual_seed(calls)
        tokens, uniforms = torch.randint(40, (3,)), torch.rand(12, 3)
        first, state = step(model, tokens, None, uniforms[:5], how)
        second, state = step(model, first[-1], state, uniforms[5:], how)
        calls += 2
        expected, expected_state = [], None
        for row in uniforms.double():
            logits, expected_state = exact(tokens[None], expected_state)
            tokens = draw(logits[0], row, how)
            expected.append(tokens)
        what = f"{layers} layers, {mode}, {how}"
        assert torch.equal(torch.cat((first, second)), torch.stack(expected)), what
        close(state[0], expected_state[0], what, torch.float32)
    assert runs() == calls, "the emulated kernel did not draw"
    with pytest.raises(NotImplementedError, match="must be float32, got Double"):
        step(model.double(), tokens, None, uniforms.double(), how)
    print(f"generation: {calls} calls")


def other_cells(counts):
    """LSTM, GRU and resets have no kernels there: the formula runs, with torch's results."""
    before = counts(0), counts(1)
    for stock, mode in ((nn.LSTM, "LSTM"), (nn.GRU, "GRU"), (nn.RNN, "RNN_TANH")):
        module = stock(7, 9, 2, bidirectional=True).double()
        x = torch.randn(5, 6, 7, dtype=torch.float64, requires_grad=True)
        begin = torch.zeros(5, 6, dtype=torch.bool)
        begin[2] = True
        weights = list(module.parameters())
        how = (mode, True, 2, 0.0, False, True)
        output, *_ = ops.rnn(
            x.float(), None, None, [w.float() for w in weights], None, None, begin, *how
        )
        # Each layer starts anew at step 2, in both directions: two sequences.
        parts = [module(part)[0] for part in (x[:2], x[2:])]
        expected = torch.cat(parts)
        close(output, expected, f"{mode} with resets", torch.float32)
        grads = torch.autograd.grad(output.sin().sum(), [x, *weights])
        want = torch.autograd.grad(expected.sin().sum(), [x, *weights])
        for a, b in zip(grads, want, strict=True):
            close(a, b, f"gradients of {mode} with resets", torch.float32)
    assert (counts(0), counts(1)) == before, "a kernel ran that knows Elman's cell alone"


def main(library):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.ops.load_library(library)
    counts = ctypes.CDLL(library).emulated_layers
    design = os.environ.get("CHARRNN_FAST_DESIGN", "block")
    cases = 0
    for layers, two, bias, dtype, kind in itertools.product(
        (1, 2),
        (False, True),
        (True, False),
        (torch.float32, torch.bfloat16, torch.float16),
        ("padded", "lengths", "packed", "tokens", "no hx"),
    ):
        # In 16 bits a sum near zero may fall on the other side of relu's corner.
        mode = "relu" if dtype == torch.float32 and cases % 2 else "tanh"
        T, B, input_size, H = 5, 6, 7, (9, 40, 70)[cases % 3]
        cases += 1
        what = f"{design} {kind} layers={layers} two={two} bias={bias} {dtype} H={H} {mode}"
        torch.manual_seed(cases)
        ours = charrnn_fast.RNN(
            input_size, H, layers, mode, bias=bias, bidirectional=two, dtype=dtype
        )
        reference = nn.RNN(input_size, H, layers, mode, bias=bias, bidirectional=two).double()
        reference.load_state_dict(ours.state_dict())
        hx = None if kind == "no hx" else torch.randn(layers * (1 + two), B, H, dtype=dtype)
        hx64 = None if hx is None else hx.double()
        lengths = torch.tensor([5, 4, 4, 2, 1, 1])
        if kind == "lengths":
            lengths = lengths[torch.tensor([3, 0, 5, 1, 4, 2])]
        x = torch.randn(T, B, input_size, dtype=dtype)
        if kind == "tokens":
            ids = torch.randint(input_size, (T, B))
            x64 = nn.functional.one_hot(ids, input_size).double()
            compare(what, dtype, ours, reference, lambda m: m(ids, hx), lambda m: m(x64, hx64))
            continue
        leaf, leaf64 = x.clone().requires_grad_(), x.double().requires_grad_()

        def padded64(m, leaf=leaf64, lengths=lengths, hx=hx64):
            packed = pack_padded_sequence(leaf, lengths, enforce_sorted=False)
            output, h_n = m(packed, hx)
            return nn.utils.rnn.pad_packed_sequence(output, total_length=leaf.shape[0])[0], h_n

        def packed(m, leaf=leaf, lengths=lengths, hx=hx):
            output, h_n = m(pack_padded_sequence(leaf, lengths), hx)
            return nn.utils.rnn.pad_packed_sequence(output, total_length=leaf.shape[0])[0], h_n

        if kind == "lengths":
            compare(what, dtype, ours, reference, lambda m: m(leaf, hx, lengths=lengths), padded64)
        elif kind == "packed":
            compare(what, dtype, ours, reference, packed, padded64)
        else:
            compare(what, dtype, ours, reference, lambda m: m(leaf, hx), lambda m: m(leaf64, hx64))
        close(leaf.grad, leaf64.grad, what + " gradient of the input", dtype)
    assert counts(0) >= cases, "the emulated kernels did not run forward"
    assert counts(1) >= cases, "the emulated kernels did not run backward"
    print(f"{design}: {cases} modules, {counts(0)} layers forward, {counts(1)} backward")
    generation(library)
    other_cells(counts)


if __name__ == "__main__":
    main(sys.argv[1])
