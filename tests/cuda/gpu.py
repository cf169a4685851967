"""What only a device can tell, in one command: `make gpu-report OUT=dir`. Has never run on one.

usage: gpu.py report DIR [--dry-run LIBRARY]
       gpu.py test | bench           parts of it, without building
       gpu.py part NAME SECONDS      one part, which prints a line of JSON for each result

The report wants Python, torch with CUDA, numpy, nvcc and a C++ compiler, and nothing else. Each part
is a process of its own with a time limit, the most valuable first: one that fails, hangs or spoils
its device does not stop the next. DIR/report.md and DIR/report.json are written anew after each.

--dry-run takes the emulated kernels (tests/cuda/test_cuda.py builds them) for a device: everything
but speed, graphs and compute-sanitizer is then what a device would run.
"""

from __future__ import annotations

import argparse
import ctypes
import inspect
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 450  # seconds for everything: eight minutes, less what it takes to start and to write
# Seconds for each part at most, in this order. What a part leaves is for those after it.
PARTS = {
    "machine": 20,
    "parity": 90,
    "generation": 30,
    "capture": 30,
    "sanitizer": 70,
    "bench": 110,
}
BUILD = 240
LIBRARY = os.environ.get("CHARRNN_FAST_DRY_RUN", "")  # of emulated kernels; "": a device
DEVICE = "cpu" if LIBRARY else "cuda"
CELLS = ("RNN", "LSTM", "GRU")


def say(**result):
    """One result, for the process that collects them."""
    print("RESULT " + json.dumps(result), flush=True)


def say_failed(part, name, error):
    say(part=part, name=name, ok=False, error=f"{type(error).__name__}: {error}"[:500])


# --- parts, each in a process of its own ---


def setup():
    """torch and charrnn_fast, with the kernels in question; an error where they are not there."""
    import warnings

    import torch

    import charrnn_fast

    torch.manual_seed(0)
    if LIBRARY:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.ops.load_library(LIBRARY)
        return torch, charrnn_fast
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device: nothing was run, nothing is known")
    if not torch._C._dispatch_has_kernel_for_dispatch_key("charrnn_fast::rnn_layer", "CUDA"):
        raise SystemExit("charrnn_fast was built without CUDA kernels: nothing was run")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return torch, charrnn_fast


def layers_run():
    """Layers that ran forward in our kernels so far."""
    if LIBRARY:
        return ctypes.CDLL(LIBRARY).emulated_layers(0)
    from charrnn_fast import ops

    return ops.counters()["forward_fused"]


def machine(_deadline):
    torch, charrnn_fast = setup()
    facts = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA of torch": torch.version.cuda,
        "build": charrnn_fast.build_info(),
    }
    if not LIBRARY:
        properties = torch.cuda.get_device_properties(0)
        facts["device"] = properties.name
        facts["multiprocessors"] = properties.multi_processor_count
        facts["compute capability"] = f"{properties.major}.{properties.minor}"
        facts["memory"] = f"{properties.total_memory / 2**30:.0f} GB"
        facts["cuDNN"] = torch.backends.cudnn.version()
        query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm", "--format=csv,noheader"]
        if shutil.which("nvidia-smi"):
            facts["driver, clock"] = subprocess.run(query, capture_output=True, text=True).stdout
    for cell in CELLS:
        if hasattr(charrnn_fast, cell):
            module, before = getattr(charrnn_fast, cell)(4, 8, device=DEVICE), layers_run()
            with torch.no_grad():
                module(torch.zeros(2, 2, 4, device=DEVICE))
            served = layers_run() > before
            facts[f"{cell} in float32"] = "our kernels" if served else "PyTorch's formula"
    for name, value in facts.items():
        say(part="machine", name=name, ok=True, value=str(value).strip())


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
        if time.monotonic() > deadline:
            say(part="parity", name="time was up before " + name, ok=False)
            return
        try:
            parity_case(torch, charrnn_fast, cell, H, dtype, kind, options, name)
        except Exception as error:
            say(part="parity", name=name, ok=False, error=f"{type(error).__name__}: {error}"[:500])


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


def generation(deadline):
    """Characters against the loop in float64: one in a hundred may differ by rounding."""
    torch, _ = setup()
    from charrnn_fast.charlm import ModelConfig, SampleOptions, build_model
    from charrnn_fast.charlm.sample import draw, step, why_stepwise

    fields = inspect.signature(ModelConfig).parameters
    cells = ("rnn", "lstm", "gru") if "cell" in fields else ("rnn",)
    ways = ({}, {"temperature": 0}, {"top_k": 5}, {"top_p": 0.8})
    for cell, layers, way in itertools.product(cells, (1, 2), ways):
        name = f"{cell}, {layers} layers, {way}"
        if LIBRARY and cell != "rnn":  # a device has the loop for these, the CPU another kernel
            say(part="generation", name=name, ok=True, skipped="not emulated")
            continue
        if time.monotonic() > deadline:
            say(part="generation", name="time was up before " + name, ok=False)
            return
        try:
            more = {"cell": cell} if "cell" in fields else {}
            config, options = ModelConfig(40, 32, layers, **more), SampleOptions(**way)
            model = build_model(config, "fast", "orthogonal", seed=1).eval()
            exact = build_model(config, "torch", "orthogonal", seed=1).eval().double()
            exact.load_state_dict(model.state_dict())
            tokens, uniforms = torch.randint(40, (200,)), torch.rand(1, 200)
            with torch.no_grad():
                logits, _ = exact(tokens[None], None)
                expected = draw(logits[0], uniforms[0].double(), options)
                model.to(DEVICE)
                by = why_stepwise(model) or "one kernel"
                drawn, _ = step(model, tokens.to(DEVICE), None, uniforms.to(DEVICE), options)
            differing = (drawn[0].cpu() != expected).float().mean().item()
            say(part="generation", name=name, ok=differing <= 0.01, differing=differing, by=by)
        except Exception as error:
            say_failed("generation", name, error)


def capture(deadline):
    """One call of each design and cell in a graph, replayed with another input."""
    torch, charrnn_fast = setup()
    for H, cell in itertools.product((32, 600, 2100), CELLS):
        name = f"{cell} H={H}"
        if LIBRARY or not hasattr(charrnn_fast, cell):
            say(part="capture", name=name, ok=True, skipped="wants a device, and the module")
            continue
        if time.monotonic() > deadline:
            say(part="capture", name="time was up before " + name, ok=False)
            return
        try:
            module = getattr(charrnn_fast, cell)(16, H, device="cuda")
            x = torch.randn(12, 9, 16, device="cuda")
            with torch.no_grad():
                stream = torch.cuda.Stream()
                with torch.cuda.stream(stream):
                    module(x)
                torch.cuda.current_stream().wait_stream(stream)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    output = module(x)[0]
                x.normal_()
                graph.replay()
                same = torch.equal(output, module(x)[0])
            say(part="capture", name=name, ok=same)
        except Exception as error:
            say_failed("capture", name, error)


def sanitized():
    """A short list of calls under compute-sanitizer: each design, forward and backward."""
    torch, charrnn_fast = setup()
    for H, cell in itertools.product((32, 300, 2100), CELLS):
        if hasattr(charrnn_fast, cell):
            module = getattr(charrnn_fast, cell)(8, H, device="cuda")
            y = module(torch.randn(3, 5, 8, device="cuda"))[0]
            torch.autograd.grad(y.sum(), list(module.parameters()))
    torch.cuda.synchronize()


def sanitizer(deadline):
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if LIBRARY or not os.path.exists(program):
        reason = "an emulated device" if LIBRARY else "compute-sanitizer was not found"
        say(part="sanitizer", name="all tools", ok=bool(LIBRARY), skipped=reason)
        return
    for tool in ("memcheck", "racecheck", "synccheck"):
        command = [program, "--tool", tool, "--error-exitcode", "1", sys.executable, __file__]
        left = max(5, deadline - time.monotonic())
        try:
            done = subprocess.run(
                [*command, "sanitized"], capture_output=True, text=True, timeout=left
            )
            tail = (done.stdout + done.stderr)[-1500:] if done.returncode else ""
            say(part="sanitizer", name=tool, ok=done.returncode == 0, error=tail)
        except subprocess.TimeoutExpired:
            say(part="sanitizer", name=tool, ok=False, error=f"did not end within {left:.0f} s")


def time_ms(torch, body, repeats):
    """Median of one call, by the device's clock where there is one."""
    for _ in range(1 if LIBRARY else 5):
        body()
    times = []
    for _ in range(repeats):
        if LIBRARY:
            start = time.perf_counter()
            body()
            times.append((time.perf_counter() - start) * 1e3)
            continue
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        body()
        last.record()
        last.synchronize()
        times.append(first.elapsed_time(last))
    return statistics.median(times)


def bench_cases(torch):
    """(cell, H, B, dtype, tf32): the sizes that people ask about first."""
    full, tf32, half = (torch.float32, False), (torch.float32, True), (torch.bfloat16, False)
    if LIBRARY:
        yield "RNN", 40, 3, *full
        return
    done = set()
    for sizes, batches, numbers in (
        ((256, 512, 1024), (1, 32, 256), (full,)),
        ((256, 1024), (1, 32, 256), (tf32, half)),
        ((64, 128, 200, 384, 2048), (1, 8, 64), (full, half)),
        ((256, 512, 1024), (8, 64), (full, tf32, half)),
    ):
        for H, B, number, cell in itertools.product(sizes, batches, numbers, CELLS):
            case = (cell, H, B, *number)
            if case not in done:
                done.add(case)
                yield case


def bench(deadline, T=128, I=128):
    """nn.RNN, nn.LSTM, nn.GRU, which are cuDNN's, beside ours; checked before they are timed."""
    torch, charrnn_fast = setup()
    T, I = (4, 8) if LIBRARY else (T, I)
    for cell, H, B, dtype, tf32 in bench_cases(torch):
        if not hasattr(charrnn_fast, cell):
            continue
        number = "tf32" if tf32 else str(dtype).removeprefix("torch.")
        result = {"part": "bench", "name": f"{cell} H={H} B={B} {number}"}
        if time.monotonic() > deadline:
            say(**result, ok=True, skipped="time was up")
            return
        try:
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
            stock = getattr(torch.nn, cell)(I, H, device=DEVICE, dtype=dtype)
            ours = getattr(charrnn_fast, cell)(I, H, device=DEVICE, dtype=dtype)
            ours.load_state_dict(stock.state_dict())
            x = torch.randn(T, B, I, device=DEVICE, dtype=dtype)
            bound = 1e-1 if dtype == torch.bfloat16 else 2e-2 if tf32 else 1e-4
            with torch.no_grad():
                difference = (ours(x)[0] - stock(x)[0]).abs().max().item()
            if not difference <= bound:
                say(**result, ok=False, error=f"off by {difference:.3g}: nothing is timed")
                continue
            for name, module in (("cudnn", stock), ("ours", ours)):

                def forward(module=module, x=x):
                    with torch.no_grad():
                        module(x)

                def both(module=module, x=x):
                    y = module(x)[0]
                    torch.autograd.grad(y, list(module.parameters()), torch.ones_like(y))

                result[f"{name}_forward_ms"] = time_ms(torch, forward, 20)
                result[f"{name}_both_ms"] = time_ms(torch, both, 20)
            say(**result, ok=True)
        except Exception as error:
            say(**result, ok=False, error=f"{type(error).__name__}: {error}"[:500])


# --- the process that collects ---


def collect(name, seconds, environment):
    """The results of one part, its seconds and what it said; what came before a failure counts."""
    start = time.monotonic()
    command = [sys.executable, "-u", __file__, "part", name, str(seconds)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        start_new_session=True,
    )  # fmt: skip
    try:
        text, ended = process.communicate(timeout=seconds + 10)[0], None
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)  # what it started, too
        text, ended = process.communicate()[0], f"stopped after {seconds + 10:.0f} s"
    results, other = [], []
    for line in text.splitlines():
        if line.startswith("RESULT "):
            results.append(json.loads(line.removeprefix("RESULT ")))
        else:
            other.append(line)
    if ended is None and process.returncode:
        ended = f"ended with {process.returncode}"
    if ended:
        said = "\n".join(other)[-2000:]
        results.append(
            {"part": name, "name": "the part itself", "ok": False, "error": f"{ended}: {said}"}
        )
    return results, time.monotonic() - start


def build(folder, environment):
    """The package with kernels for this device alone, in a folder of its own."""
    query = "import torch; print('%d%d' % torch.cuda.get_device_capability())"
    start = time.monotonic()
    found = subprocess.run([sys.executable, "-c", query], capture_output=True, text=True)
    arch = os.environ.get("CHARRNN_FAST_CUDA_ARCHS") or found.stdout.strip()
    if not arch:
        error = found.stderr[-1000:]
        return [{"part": "build", "name": "asking for the device", "ok": False, "error": error}], 0
    variables = {
        **environment,
        "CHARRNN_FAST_CUDA": "1",
        "CHARRNN_FAST_CUDA_ARCHS": arch,
        "CHARRNN_FAST_VARIANT": f"-gpu-{arch}",
        "MAX_JOBS": os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1),
    }
    command = [sys.executable, "setup.py", "-q", "build", "--build-lib", str(folder)]
    result = {"part": "build", "name": f"for compute capability {arch}", "ok": True}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=BUILD
        )
        if done.returncode:
            result |= {"ok": False, "error": (done.stdout + done.stderr)[-3000:]}
    except subprocess.TimeoutExpired:
        result |= {"ok": False, "error": f"did not end within {BUILD} s"}
    return [result], time.monotonic() - start


def write(folder, results, seconds, dry):
    """report.json with everything, report.md for people."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"dry run": bool(dry), "seconds": seconds, "results": results}
    (folder / "report.json").write_text(json.dumps(content, indent=1) + "\n")
    lines = ["# GPU report", ""]
    if dry:
        lines += [
            "**A dry run on emulated kernels: no device was there, no time means anything.**",
            "",
        ]
    lines += ["| part | passed | failed | not run | seconds |", "|---|---|---|---|---|"]
    for part, taken in seconds.items():
        own = [r for r in results if r["part"] == part]
        skipped = sum("skipped" in r for r in own)
        failed = sum(not r["ok"] for r in own)
        passed = sum(r["ok"] and "skipped" not in r for r in own)
        lines.append(f"| {part} | {passed} | {failed} | {skipped} | {taken:.0f} |")
    lines += ["", "## Machine", ""]
    lines += [
        f"- {r['name']}: {r['value']}" for r in results if r["part"] == "machine" and "value" in r
    ]
    failures = [r for r in results if not r["ok"]]
    lines += ["", "## What failed", ""] + ([] if failures else ["Nothing."])
    for r in failures:
        lines += [f"- {r['part']}, {r['name']}: {describe(r)}"]
    lines += ["", "## Parity", "", "Largest error in roundings of the dtype, ours and torch.nn's, against float64.", "",
              "| case | by | ours | torch.nn | |", "|---|---|---|---|---|"]  # fmt: skip
    for r in results:
        if r["part"] == "parity" and "roundings" in r:
            verdict = "" if r["ok"] else "FAILED"
            lines.append(
                f"| {r['name']} | {r['by']} | {r['roundings']} | {r['stocks']} | {verdict} |"
            )
    lines += ["", "## Generation", "", "| case | by | differing characters |", "|---|---|---|"]
    for r in results:
        if r["part"] == "generation" and "differing" in r:
            lines.append(f"| {r['name']} | {r['by']} | {r['differing']:.2%} |")
    lines += ["", "## Beside cuDNN", "", "Milliseconds of 128 steps, 128 inputs, one layer.", "",
              "| case | forward: cuDNN | ours | ratio | both: cuDNN | ours | ratio |",
              "|---|---|---|---|---|---|---|"]  # fmt: skip
    for r in results:
        if r["part"] == "bench" and "ours_both_ms" in r:
            cells = [r["name"]]
            for kind in ("forward", "both"):
                cudnn, ours = r[f"cudnn_{kind}_ms"], r[f"ours_{kind}_ms"]
                cells += [f"{cudnn:.3f}", f"{ours:.3f}", f"{cudnn / ours:.2f}"]
            lines.append("| " + " | ".join(cells) + " |")
    (folder / "report.md").write_text("\n".join(lines) + "\n")


def describe(result):
    if "error" in result:
        return "`" + result["error"].strip().replace("\n", " / ").replace("`", "'") + "`"
    known = ("by", "roundings", "stocks", "differing")
    return ", ".join(f"{name} {result[name]}" for name in known if name in result)


def report(folder, dry="", parts=tuple(PARTS), built=True):
    """Runs the parts and writes what they found; the number of failures."""
    start, results, seconds = time.monotonic(), [], {}
    environment = {**os.environ, "CHARRNN_FAST_DRY_RUN": dry}
    where = ROOT
    if not dry and built:
        where = folder / "build"
        results, seconds["build"] = build(where, environment)
        write(folder, results, seconds, dry)
    environment["PYTHONPATH"] = str(where)
    for name in parts:
        left = LIMIT - (time.monotonic() - start)
        if left < 15:
            results.append({"part": name, "name": "no time was left", "ok": False, "error": ""})
            seconds[name] = 0.0
        else:
            found, seconds[name] = collect(name, min(PARTS[name], left - 12), environment)
            results += found
        write(folder, results, seconds, dry)
        failed = [r for r in results if r["part"] == name and not r["ok"]]
        print(f"{name:10} {seconds[name]:4.0f} s  {'FAILED ' * bool(failed)}"
              f"{len(failed)} of {sum(r['part'] == name for r in results)} failed", flush=True)  # fmt: skip
    return sum(not r["ok"] for r in results)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_subparsers(dest="what", required=True)
    whole = what.add_parser("report")
    whole.add_argument("folder", type=Path)
    whole.add_argument("--dry-run", default="", metavar="LIBRARY")
    what.add_parser("test")
    what.add_parser("bench")
    what.add_parser("sanitized")
    part = what.add_parser("part")
    part.add_argument("name", choices=PARTS)
    part.add_argument("seconds", type=float)
    options = parser.parse_args()
    if options.what == "part":
        deadline = time.monotonic() + options.seconds
        try:
            globals()[options.name](deadline)
        except Exception:
            traceback.print_exc()
            sys.exit(1)
    elif options.what == "sanitized":
        sanitized()
    elif options.what == "report":
        failed = report(options.folder.resolve(), options.dry_run)
        print(f"{failed} failed; see {options.folder}/report.md")
        sys.exit(1 if failed else 0)
    else:
        parts = ("bench",) if options.what == "bench" else tuple(p for p in PARTS if p != "bench")
        folder = ROOT / "build" / "gpu"
        sys.exit(1 if report(folder, parts=parts, built=False) else 0)


if __name__ == "__main__":
    main()
