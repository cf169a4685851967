"""DistributedDataParallel: two processes give the gradients of one."""

import gc
import importlib
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import assert_same, loss_of
from kinds import KINDS
from torch import nn

import charrnn_fast

LENGTHS = torch.tensor([5, 2, 4, 3])


def make(name):
    """The same model and data in every process."""
    torch.manual_seed(0)
    rnn = getattr(charrnn_fast, name)(3, 20, 2, bidirectional=True)
    return rnn, torch.randn(5, 4, 3)


def gradients(module, x, lengths):
    loss_of(module(x, None, lengths)).backward()
    return {name.removeprefix("module."): p.grad for name, p in module.named_parameters()}


def work(rank, names, folder):
    torch.set_num_threads(1)
    # Imported later, it would keep the group, whose threads may abort a process that ends.
    importlib.import_module("torch.distributed.nn.functional")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    half = slice(2 * rank, 2 * rank + 2)
    for name in names:
        rnn, x = make(name)
        grads = gradients(nn.parallel.DistributedDataParallel(rnn), x[:, half], LENGTHS[half])
        torch.save(grads, f"{folder}/{name}{rank}.pt")
    gc.collect()
    dist.destroy_process_group()
    threads = [task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")]
    assert not [name for name in threads if "gloo" in name], threads


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
def test_two_processes(tmp_path):
    """Each of two processes has the mean over both parts of a batch."""
    names = [kind.name for kind in KINDS]
    mp.spawn(work, (names, str(tmp_path)), nprocs=2)
    for name in names:
        halves = []
        for half in (slice(0, 2), slice(2, 4)):
            rnn, x = make(name)
            halves.append(gradients(rnn, x[:, half], LENGTHS[half]))
        mean = {key: (halves[0][key] + halves[1][key]) / 2 for key in halves[0]}
        for rank in range(2):
            assert_same(torch.load(tmp_path / f"{name}{rank}.pt"), mean)
