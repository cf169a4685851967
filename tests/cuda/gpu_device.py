"""The device that a part of `make gpu-report` runs on, and how it says what it found.

CHARRNN_FAST_DRY_RUN names a library of emulated kernels, which then stand for the device.
"""

import ctypes
import json
import os
import time

LIBRARY = os.environ.get("CHARRNN_FAST_DRY_RUN", "")  # of emulated kernels; "": a device
DEVICE = "cpu" if LIBRARY else "cuda"
CELLS = ("RNN", "LSTM", "GRU")


def say(**result):
    """One result, for the process that collects them."""
    print("RESULT " + json.dumps(result), flush=True)


def is_over(deadline, part, name):
    """Whether the time is up: then the report says what it did not come to."""
    over = time.monotonic() > deadline
    if over:
        say(part=part, name="time was up before " + name, ok=False)
    return over


def say_failed(part, name, error):
    say(part=part, name=name, ok=False, error=f"{type(error).__name__}: {error}"[:500])


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
