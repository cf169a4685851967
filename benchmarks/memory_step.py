"""One training step in a fresh process; prints saved bytes and the growth of the peak as JSON."""

import importlib
import json
import re
import sys
import time
from pathlib import Path

import torch


def resident(field: str) -> int:
    """VmRSS (now) or VmHWM (peak) in bytes; ru_maxrss would begin with the parent's peak."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s*(\d+) kB", status)[1]) * 1024


def main() -> None:
    package, cell, *numbers = sys.argv[1:]
    B, T, I, H, tokens = map(int, numbers)
    torch.set_num_threads(1)
    module = getattr(importlib.import_module(package), cell)(I, H)
    for _ in range(2):  # code and buffers that come with the first call are not the step's
        module(torch.zeros(2, 1, I))[0].sum().backward()
    if tokens:
        ids = torch.randint(I, (T, B))
    else:
        x = torch.randn(T, B, I)

    def encode():
        if not tokens:
            return x
        return ids if package == "charrnn_fast" else torch.nn.functional.one_hot(ids, I).float()

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    saved: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    before, start = resident("VmRSS"), time.perf_counter()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y, _ = module(encode())
    y.sum().backward()
    print(
        json.dumps(
            {
                "saved_bytes": sum(saved.values()),
                "peak_growth_bytes": resident("VmHWM") - before,
                "output_bytes": y.nbytes,
                "input_bytes": encode().nbytes,
                "weight_bytes": sum(p.nbytes for p in module.parameters()),
                "seconds": time.perf_counter() - start,
            }
        )
    )


if __name__ == "__main__":
    main()
