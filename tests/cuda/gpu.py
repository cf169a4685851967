"""For the day there is a device: parity, compute-sanitizer, and a benchmark against cuDNN.

usage: gpu.py test|bench; exits with 2 where there is no CUDA device, or no CUDA kernels were built.

The benchmark takes nn.RNN and RNN over the grid below, forward and backward, with TF32 on for both
and off for both, checks that they agree, and writes build/bench-gpu.json. Has never run.
"""

import itertools
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import torch

HIDDEN = (64, 128, 200, 256, 384, 512, 1024, 2048)
BATCH = (1, 8, 32, 64, 256)
T, I = 128, 128


def time_ms(body, repeats=30):
    """Median over `repeats` of one call, by the device's clock."""
    for _ in range(5):
        body()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        body()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def bench():
    import charrnn_fast

    rows = []
    for hidden, batch, dtype, tf32 in itertools.product(
        HIDDEN, BATCH, (torch.float32, torch.bfloat16), (False, True)
    ):
        if tf32 and dtype != torch.float32:
            continue
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
        reference = torch.nn.RNN(I, hidden, device="cuda", dtype=dtype)
        ours = charrnn_fast.RNN(I, hidden, device="cuda", dtype=dtype)
        ours.load_state_dict(reference.state_dict())
        x = torch.randn(T, batch, I, device="cuda", dtype=dtype)
        bound = 1e-1 if dtype == torch.bfloat16 else 2e-2 if tf32 else 1e-4
        torch.testing.assert_close(ours(x)[0], reference(x)[0], rtol=0, atol=bound)
        row = {"H": hidden, "B": batch, "dtype": str(dtype), "tf32": tf32}
        for name, module in (("cudnn", reference), ("ours", ours)):

            def forward(module=module, x=x):
                with torch.no_grad():
                    module(x)

            def both(module=module, x=x):
                module.zero_grad()
                module(x)[0].sum().backward()

            row[f"{name}_forward_ms"] = time_ms(forward)
            row[f"{name}_forward_backward_ms"] = time_ms(both)
        print(row, flush=True)
        rows.append(row)
    report = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "T": T, "I": I}
    Path("build/bench-gpu.json").write_text(json.dumps({**report, "rows": rows}, indent=1))


def test():
    tests = [sys.executable, "-m", "pytest", "-m", "cuda", "tests/cuda"]
    code = subprocess.run(tests, check=False).returncode
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        sys.exit("compute-sanitizer was not found: memory and races were NOT checked")
    for tool in ("memcheck", "racecheck", "synccheck"):
        command = [sanitizer, "--tool", tool, "--error-exitcode", "1", *tests, "-k", "32 or 300"]
        code |= subprocess.run(command, check=False).returncode
    sys.exit(code)


def main(what):
    if not torch.cuda.is_available():
        print("no CUDA device: nothing was run, nothing is known", file=sys.stderr)
        sys.exit(2)
    import charrnn_fast  # noqa: F401

    if not torch._C._dispatch_has_kernel_for_dispatch_key("charrnn_fast::rnn_layer", "CUDA"):
        print("charrnn_fast was built without CUDA kernels: nothing was run", file=sys.stderr)
        sys.exit(2)
    {"test": test, "bench": bench}[what]()


if __name__ == "__main__":
    main(sys.argv[1])
