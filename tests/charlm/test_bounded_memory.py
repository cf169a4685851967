"""What is only read, or only evaluated, takes memory that its length and vocabulary do not set."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# The most that the process has held since, above what it held, in bytes; PyTorch's memory is not
# Python's, so the system is asked.
PRELUDE = """
import sys
from pathlib import Path
import numpy as np
import torch
from charrnn_fast.charlm import ModelConfig, Vocabulary, build_model, evaluate, sample
from charrnn_fast.charlm.data import LineBatches
from charrnn_fast.charlm.evaluate import evaluate_lines, evaluate_stream

def status(name):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) << 10

def peak(call):
    call(4)  # what is set up once
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    call(1)
    return status("VmHWM") - before

torch.set_num_threads(1)
cell, backend = sys.argv[1:]
"""

PROMPT = """
vocabulary = Vocabulary("\\n abcdefghijklmnopqrstuvwxyz" + "".join(map(chr, range(0x100, 0x130))))
model = build_model(ModelConfig(len(vocabulary), 64, 2, cell=cell), backend)
text = "the quick brown fox " * 25_000
print(peak(lambda share: sample(model, vocabulary, text[: len(text) // share], 10, seed=1)))
"""

LARGE_VOCABULARY = """
V = 20_000
model = build_model(ModelConfig(V, 16, 1, cell=cell), backend)
ids = (np.arange(2001) * 7919 % V).astype(np.uint16)
def run(share):
    part = ids[: len(ids) // share]
    evaluate(model, part, streams=15)
    evaluate_stream(model, [part])
    part = part.copy()
    part[::1000] = 0
    evaluate_lines(model, LineBatches(part, 64, 0, 0))
print(peak(run))
"""


def peak(code: str, cell: str, backend: str) -> int:
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("the system does not tell the peak of memory")
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + code, cell, backend],
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.parametrize(("cell", "backend"), [("rnn", "fast"), ("lstm", "torch")])
def test_a_prompt_is_read_in_pieces(cell, backend):
    """Half a megabyte of it: scores alone would take 150 MB, one-hot vectors 300."""
    assert peak(PROMPT, cell, backend) < 40 << 20


@pytest.mark.parametrize(("cell", "backend"), [("rnn", "fast"), ("lstm", "torch")])
def test_evaluation_is_bounded_by_the_vocabulary(cell, backend):
    """Scores of 256 steps of 15 streams would take 300 MB, those of 1024 steps of one 80."""
    assert peak(LARGE_VOCABULARY, cell, backend) < 120 << 20
