"""The parts of `make gpu-report`, each in a process of its own.

usage: gpu_parts.py NAME SECONDS      prints a line of JSON for each result
"""

import argparse
import inspect
import itertools
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
import traceback

from gpu_device import CELLS, DEVICE, LIBRARY, is_over, layers_run, say, say_failed, setup
from gpu_parity import parity


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
        if is_over(deadline, "generation", name):
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
        if is_over(deadline, "capture", name):
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


def sanitized(_deadline):
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
                [*command, "sanitized", str(left)], capture_output=True, text=True, timeout=left
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


PARTS = (machine, parity, generation, capture, sanitizer, sanitized, bench)


def main():
    parts = {part.__name__: part for part in PARTS}
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=parts)
    parser.add_argument("seconds", type=float)
    options = parser.parse_args()
    try:
        parts[options.name](time.monotonic() + options.seconds)
    except Exception:
        traceback.print_exc()
        sys.exit(1)


if __name__ == "__main__":
    main()
