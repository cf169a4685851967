"""Random calls of the op `generate`, beside the step-by-step loop of charlm.

Usage: generation.py [CASES] [FIRST_SEED]. In float64, where rounding decides no draw, every
character is the loop's; in float32, all but one in ten thousand, each after the same characters.
"""

from __future__ import annotations

import random
import sys
import time

import torch

import charrnn_fast
from charrnn_fast import ops
from charrnn_fast.charlm import ModelConfig, SampleOptions, build_model
from charrnn_fast.charlm.sample import draw, step


def run_seed(seed: int) -> tuple[str | None, int, int]:
    """What is wrong with the case of a seed; its draws in float32, and how many of them differ."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    V, H = (
        rng.choice([1, 2, 5, 16, 17, 33, 65, 130]),
        rng.choice([1, 3, 8, 16, 19, 31, 64, 65, 130]),
    )
    N, S, layers = rng.randint(1, 12), rng.choice([1, 1, 2, 3, 7, 17, 97]), rng.choice([1, 1, 2, 3])
    kind = rng.choice(["tanh", "relu", "sigmoid", "lstm", "gru"])
    options = SampleOptions(
        temperature=rng.choice([0.0, 0.3, 1.0, 1.0, 2.5]),
        top_k=rng.choice([0, 0, 1, 2, 5, V]),
        top_p=rng.choice([1.0, 1.0, 0.1, 0.5, 0.9]),
    )
    single = rng.random() < 0.3
    isa, threads = rng.choice(charrnn_fast.available_isas()), rng.choice([1, 1, 2, 3])
    dtype = torch.float32 if single else torch.float64
    about = f"{seed}: V={V} H={H} N={N} S={S} {layers} {kind} {options} {isa} {threads} {dtype}"
    if kind in ("lstm", "gru"):
        config, backend = ModelConfig(V, H, layers, cell=kind), "torch"
    else:
        config, backend = ModelConfig(V, H, layers, kind), "fast"
    model = build_model(config, backend, "orthogonal", seed=seed)
    model = model.to(dtype).eval()
    with torch.no_grad():
        model.head.weight *= rng.choice([0.1, 1.0, 4.0])
        model.head.bias.normal_()
    tokens, uniforms = torch.randint(0, V, (S,)), torch.rand(N, S, dtype=dtype)
    state = None
    if rng.random() < 0.5:
        state = tuple(torch.randn(layers, S, H, dtype=dtype) for _ in range(config.states))
    weights = [p.detach() for p in model.rnn.parameters()]
    head = [model.head.weight.detach(), model.head.bias.detach()]
    how = (options.temperature, options.top_k, options.top_p)
    torch.set_num_threads(threads)
    with charrnn_fast.use_isa(isa):
        mode = model.rnn.mode
        operands = (tokens, *(*(state or ()), None, None)[:2], weights, *head, uniforms)
        drawn, *after = ops.generate(*operands, mode, True, *how)
    torch.set_num_threads(1)
    if drawn.shape != (N, S) or int(drawn.min()) < 0 or int(drawn.max()) >= V:
        return f"{about}: not {N} x {S} characters of the vocabulary", 0, 0
    if single:
        seen = torch.cat([tokens[None], drawn[:-1]])
        with torch.no_grad():
            expected = draw(model(seen, state)[0].flatten(0, 1), uniforms.flatten(), options)
        return None, N * S, int((expected != drawn.flatten()).sum())
    with torch.enable_grad():  # the loop, not the op
        expected, expected_after = step(model, tokens, state, uniforms, options)
    if not torch.equal(drawn, expected):
        return f"{about}: other characters", 0, 0
    pairs = zip(after, expected_after, strict=False)  # an empty cell state comes last
    if not all(torch.allclose(a, b, rtol=1e-11, atol=1e-11) for a, b in pairs):
        return f"{about}: another state", 0, 0
    return None, 0, 0


def main() -> int:
    cases = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    first = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    began, failed, draws, differing = time.monotonic(), 0, 0, 0
    for seed in range(first, first + cases):
        found, single, other = run_seed(seed)
        draws, differing = draws + single, differing + other
        if found is not None:
            failed += 1
            print(found, flush=True)
    print(
        f"{cases} calls of generate, seeds {first} to {first + cases - 1}: {failed} differ; "
        f"of {draws} draws in float32 {differing} do, {time.monotonic() - began:.0f} s"
    )
    return 1 if failed or differing > 1e-4 * draws + 2 else 0


if __name__ == "__main__":
    sys.exit(main())
