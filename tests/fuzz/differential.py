"""Random calls of charrnn_fast.RNN and torch.nn.RNN, which must agree.

    python tests/fuzz/differential.py [CASES] [SEED]

Each case draws constructor arguments, sizes, strides, dtype, packed input or not, which gradients
are wanted, the ISA and the number of threads. A case is named by its seed alone, so that a failing
one can be run again: differential.py 1 SEED. The reference is nn.RNN in float64.
"""

from __future__ import annotations

import copy
import random
import sys
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import charrnn_fast


def laid_out(rng: random.Random, tensor: Tensor) -> Tensor:
    """The same values with other strides: as a transposed, strided, offset or expanded view."""
    kind = rng.randrange(5)
    if kind == 0:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if kind == 1:
        wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1]), float("nan"))
        wide[..., ::2] = tensor
        return wide[..., ::2]
    if kind == 2:
        offset = tensor.new_full((tensor.numel() + 1,), float("nan"))
        offset[1:] = tensor.flatten()
        return offset[1:].view(tensor.shape)
    return tensor


def run_case(seed: int) -> str | None:
    """Runs one case; returns what differed, or None."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(rng.choice([1, 1, 2, 3]))
    isa = rng.choice(charrnn_fast.available_isas())
    dtype = rng.choice([torch.float32, torch.float32, torch.float64])
    size = rng.choice([4, 20, 70])
    T, B = rng.randint(1, rng.choice([3, 20])), rng.randint(1, rng.choice([3, 20]))
    width, hidden = rng.randint(1, size), rng.randint(1, size)
    options: dict[str, Any] = {
        "num_layers": rng.choice([1, 1, 2, 3]),
        "nonlinearity": rng.choice(["tanh", "relu"]),
        "bias": rng.random() < 0.7,
        "batch_first": rng.random() < 0.5,
        "bidirectional": rng.random() < 0.4,
        "dtype": dtype,
    }
    fast = charrnn_fast.RNN(width, hidden, **options)
    reference = nn.RNN(width, hidden, **{**options, "dtype": torch.float64})
    reference.load_state_dict(fast.state_dict())
    frozen = [rng.random() < 0.2 for _ in fast.parameters()]
    for p, q, off in zip(fast.parameters(), reference.parameters(), frozen, strict=True):
        p.requires_grad_(not off)
        q.requires_grad_(not off)

    directions = options["num_layers"] * (2 if options["bidirectional"] else 1)
    form = rng.choice(["padded", "padded", "unbatched", "packed", "lengths"])
    batch = 1 if form == "unbatched" else B
    x = torch.randn(T, batch, width, dtype=dtype)
    hx = torch.randn(directions, batch, hidden, dtype=dtype) if rng.random() < 0.5 else None
    steps = torch.tensor([T] + [rng.randint(1, T) for _ in range(batch - 1)])
    steps = steps[torch.randperm(batch)]
    tokens = form in ("padded", "lengths") and rng.random() < 0.2
    ids = torch.randint(width, (T, batch))
    if tokens:
        x = nn.functional.one_hot(ids, width).to(dtype)
    need_x, need_h = rng.random() < 0.6 and not tokens, rng.random() < 0.6
    weight_y, weight_h = rng.random() < 0.9, rng.random() < 0.6

    def run(rnn: nn.RNN, ours: bool) -> list[Tensor | None]:
        kind = dtype if ours else torch.float64
        leaf = (laid_out(rng, x) if ours else x.to(kind)).detach().requires_grad_(need_x)
        state = None
        if hx is not None:
            state = (laid_out(rng, hx) if ours else hx.to(kind)).detach().requires_grad_(need_h)
        value = leaf.transpose(0, 1) if options["batch_first"] else leaf
        h = state
        if form == "unbatched":
            value, h = leaf[:, 0], None if state is None else state[:, 0]
        if form == "packed" or (form == "lengths" and not ours):
            packed = pack_padded_sequence(
                value, steps, batch_first=options["batch_first"], enforce_sorted=False
            )
            y, h_n = rnn(packed, h)
        elif form == "lengths":
            if tokens:
                value = ids.t() if options["batch_first"] else ids
            y, h_n = rnn(value, h, steps)
        else:
            if tokens and ours:
                value = ids.t() if options["batch_first"] else ids
            y, h_n = rnn(value, h)
        if isinstance(y, PackedSequence):
            y, _ = nn.utils.rnn.pad_packed_sequence(
                y, batch_first=options["batch_first"], total_length=T
            )
        draw = torch.Generator().manual_seed(seed)
        loss = torch.zeros((), dtype=kind)
        if weight_y:
            loss = loss + (y * torch.randn(y.shape, generator=draw, dtype=torch.float64)).sum()
        if weight_h:
            loss = loss + (h_n * torch.randn(h_n.shape, generator=draw, dtype=torch.float64)).sum()
        if loss.requires_grad:
            loss.backward()
        grads = [leaf.grad, None if state is None else state.grad]
        return [y.detach(), h_n.detach(), *grads, *(p.grad for p in rnn.parameters())]

    about = f"{seed}: {isa} {dtype} T={T} B={batch} I={width} H={hidden} {form} tokens={tokens}"
    about += f" hx={hx is not None} {options}"
    with charrnn_fast.use_isa(isa):
        before = copy.deepcopy(fast.state_dict())
        got = run(fast, True)
    want = run(reference, False)
    names = ["y", "h_n", "dx", "dhx", *(f"d{name}" for name, _ in fast.named_parameters())]
    for name, a, b in zip(names, got, want, strict=True):
        if (a is None) != (b is None):
            # A gradient that is all zero may be left out by one and not by the other.
            if not torch.equal(some := b if a is None else a, torch.zeros_like(some)):
                return f"{about}: {name} is there on one side only"
            continue
        if a is None or b is None:
            continue
        scale = max(1.0, float(b.abs().max())) if b.numel() else 1.0
        error = float((a.double() - b).abs().max()) if b.numel() else 0.0
        relu = options["nonlinearity"] == "relu"
        limit = (2e-4 if relu else 5e-5) if dtype == torch.float32 else 1e-10
        if a.shape != b.shape or not error <= limit * scale:
            return f"{about}: {name} differs by {error:.3g} of {scale:.3g}"
    for name, value in fast.state_dict().items():
        if not torch.equal(value, before[name]):
            return f"{about}: {name} was written to"
    return None


def main() -> int:
    cases = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    first = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    began, failed = time.monotonic(), 0
    for seed in range(first, first + cases):
        difference = run_case(seed)
        if difference is not None:
            failed += 1
            print(difference, flush=True)
    seconds = time.monotonic() - began
    print(f"{cases} cases from seed {first}: {failed} differ, {seconds:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
