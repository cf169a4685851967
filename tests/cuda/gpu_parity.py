"""Modules on a device against float64 on the CPU, beside the error of torch.nn's on that device."""

import inspect
import itertools

from gpu_device import CELLS, DEVICE, LIBRARY, is_over, layers_run, say, say_failed, setup


def flat(tensors):
    """The tensors of a nested result."""
    if isinstance(tensors, (tuple, list)):
        return [leaf for item in tensors for leaf in flat(item)]
    return [tensors]


def gradients(torch, module, inputs, outputs):
    """Of one fixed loss, to the inputs and all parameters."""
    total = 0
    for output in outputs:
        ramp = torch.arange(output.numel(), dtype=torch.float64).reshape(output.shape)
        weights = torch.cos(ramp * 0.7 + 0.3).to(output)
        total = total + (output * weights).sum()
    wanted = [x for x in inputs if x.is_floating_point()] + list(module.parameters())
    return torch.autograd.grad(total, wanted)


def run(torch, module, kind, x, states, lengths, T, ours):
    """Outputs and gradients of one call of ours, or of the same mathematics by torch.nn."""
    from torch import nn
    from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

    is_lstm = isinstance(module, nn.LSTM)
    hx = tuple(states) if is_lstm else states[0]
    inputs = [x, *states]
    if kind == "tokens" and not ours:
        inputs = states
        like = next(module.parameters())
        x = nn.functional.one_hot(x, module.input_size).to(like)
    if kind == "packed" or (kind == "lengths" and not ours):
        packed = pack_padded_sequence(x, lengths, enforce_sorted=kind == "packed")
        output, last = module(packed, hx)
        output = pad_packed_sequence(output, total_length=T)[0]
    elif kind == "lengths":
        output, last = module(x, hx, lengths=lengths)
    elif kind == "resets" and ours:
        resets = torch.zeros(T, x.shape[1], dtype=torch.bool, device=x.device)
        resets[T // 2] = True
        output, last = module(x, hx, resets=resets)
    elif kind == "resets":
        first, _ = module(x[: T // 2], hx)
        second, last = module(x[T // 2 :])
        output = torch.cat((first, second))
    else:
        output, last = module(x, hx)
    results = [output, *flat(last)]
    found = [*results, *gradients(torch, module, inputs, results)]
    return [tensor.detach().cpu().double() for tensor in found]


def parity_cases(torch, charrnn_fast):
    """The widest variety first: a design by hidden size, then dtypes, kinds of input, layers."""
    hidden = (9, 40, 70) if LIBRARY else (32, 200, 300, 600, 1500, 2100)
    cells = [cell for cell in CELLS if hasattr(charrnn_fast, cell)]
    kinds = ("padded", "lengths", "packed", "tokens", "resets")
    for H, cell, dtype in itertools.product(
        hidden, cells, (torch.float32, torch.bfloat16, torch.float16)
    ):
        yield cell, H, dtype, "padded", {"bidirectional": True}
    for kind, cell, H in itertools.product(kinds, cells, hidden[1:4]):
        yield cell, H, torch.float32, kind, {"num_layers": 2}
    for mode in ("relu", "sigmoid"):
        yield "RNN", hidden[1], torch.float32, "padded", {"nonlinearity": mode}
    for cell, kind in itertools.product(cells, kinds):
        yield cell, hidden[2], torch.float32, kind, {"bias": False}


def parity(deadline):
    """Errors of ours and of torch.nn's module on the device, both against float64 on the CPU."""
    torch, charrnn_fast = setup()
    for cell, H, dtype, kind, options in parity_cases(torch, charrnn_fast):
        name = f"{cell} H={H} {str(dtype).removeprefix('torch.')} {kind} {options}"
        if is_over(deadline, "parity", name):
            return
        try:
            parity_case(torch, charrnn_fast, cell, H, dtype, kind, options, name)
        except Exception as error:
            say_failed("parity", name, error)


def parity_case(torch, charrnn_fast, cell, H, dtype, kind, options, name):
    kinds = getattr(charrnn_fast, cell)
    if kind == "resets" and "resets" not in inspect.signature(kinds.forward).parameters:
        say(part="parity", name=name, ok=True, skipped="the module has no resets")
        return
    T, B, I = 6, 9, 16
    ours = kinds(I, H, device=DEVICE, dtype=dtype, **options)
    sigmoid = options.get("nonlinearity") == "sigmoid"
    options = {} if sigmoid else options
    stock = getattr(torch.nn, cell)(I, H, device=DEVICE, dtype=dtype, **options)
    exact = getattr(torch.nn, cell)(I, H, **options).double()
    stock.load_state_dict(ours.state_dict())
    exact.load_state_dict(ours.state_dict())
    if sigmoid:  # torch.nn has none: sigmoid(a) = (tanh(a/2) + 1) / 2 is the formula on its own
        exact, stock = SigmoidFormula(exact), None
    x = torch.randint(I, (T, B)) if kind == "tokens" else torch.randn(T, B, I, dtype=dtype)
    lengths = torch.tensor([6, 5, 5, 4, 3, 2, 2, 1, 1])
    shape = (exact.num_layers * (1 + exact.bidirectional), B, H)
    states = [torch.randn(shape, dtype=dtype) for _ in range(1 + (cell == "LSTM"))]

    def call(module, is_ours, device, dtype):
        place = [
            t.to(device) if t.dtype == torch.int64 else t.to(device, dtype) for t in (x, *states)
        ]
        leaves = [t.requires_grad_() if t.is_floating_point() else t for t in place]
        return run(torch, module, kind, leaves[0], leaves[1:], lengths, T, is_ours)

    truth = call(exact, False, "cpu", torch.float64)
    before = layers_run()
    mine = call(ours, True, DEVICE, dtype)
    by = "kernels" if layers_run() > before else "formula"
    theirs = call(stock, False, DEVICE, dtype) if stock is not None else None
    eps = torch.finfo(dtype).eps
    worst, stocks, ok = 0.0, 0.0, True
    for i, want in enumerate(truth):
        scale = max(1.0, want.abs().max().item())
        error = (mine[i] - want).abs().max().item()
        stock_error = (theirs[i] - want).abs().max().item() if theirs is not None else 0.0
        # Twice stock's, or what rounding each of H + I terms of a sum may come to.
        allowed = max(2 * stock_error, 4 * eps * scale * (H + I) ** 0.5)
        ok &= error <= allowed  # false for a NaN, too
        worst, stocks = max(worst, error / scale / eps), max(stocks, stock_error / scale / eps)
    roundings = {"roundings": round(worst, 2), "stocks": round(stocks, 2)}
    say(part="parity", name=name, ok=ok, by=by, **roundings)


class SigmoidFormula:
    """One layer of sigmoid, in float64: what torch.nn.RNN cannot be told."""

    def __init__(self, rnn):
        self.rnn, self.num_layers, self.bidirectional = rnn, 1, False

    def parameters(self):
        return self.rnn.parameters()

    def __call__(self, x, hx):
        import torch

        W_ih, W_hh, b_ih, b_hh = self.rnn.parameters()
        h, output = hx[0], []
        for step in x:
            h = torch.sigmoid(step @ W_ih.T + b_ih + h @ W_hh.T + b_hh)
            output.append(h)
        return torch.stack(output), h[None]
