"""The processes of a training: one alone, or those that torchrun has started."""

from __future__ import annotations

import gc
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn

from charrnn_fast import ops

from . import checks
from .errors import UsageError


def usable_device(name: str | torch.device) -> torch.device:
    """The device of a name; UsageError where this PyTorch or this machine cannot compute on it."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).add(1).item()  # meta has tensors, but no numbers
    except (RuntimeError, AssertionError, TypeError, OverflowError, ImportError) as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(f"cannot use the device {str(name)!r}: {reason}") from None
    return device


def use_kernels() -> None:
    """UsageError where CHARRNN_FAST_ISA asks for an instruction set that there is not."""
    try:
        ops.current_isa()
    except RuntimeError as error:
        raise UsageError(str(error)) from None


def torchrun_variable(name: str, most: int = checks.MOST) -> int:
    """One of the numbers that torchrun gives to its processes in their environment."""
    try:
        return checks.whole(name, int(os.environ[name]), 0, most)
    except (KeyError, ValueError):
        found = os.environ.get(name)
        what = f"{name} is {found!r}" if found else f"{name} is not set"
        raise UsageError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']!r}, as torchrun sets it, but {what}: start "
            "the training with torchrun, or unset WORLD_SIZE"
        ) from None


class Group:
    """This process's ``rank`` among ``size`` processes, and their collective operations.

    Without torchrun the size is 1, and everything here leaves its argument as it is.
    """

    def __init__(self, device: str) -> None:
        self.size = torchrun_variable("WORLD_SIZE") if os.environ.get("WORLD_SIZE") else 1
        self.rank = 0
        if device == "cuda" and os.environ.get("LOCAL_RANK"):
            device = f"cuda:{os.environ['LOCAL_RANK']}"
        self.device = usable_device(device)
        if self.size <= 1:
            self.size = 1
            return
        if not dist.is_initialized():
            torchrun_variable("RANK", self.size - 1)
            torchrun_variable("MASTER_PORT", 65535)
            if not os.environ.get("MASTER_ADDR"):
                torchrun_variable("MASTER_ADDR")
            # Functions of this module have the group of the whole world as a default argument, and
            # DistributedDataParallel imports it: after the group is made they would keep it for
            # ever.
            from torch.distributed.nn import functional  # noqa: F401

            try:
                dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
            except (RuntimeError, ValueError) as error:
                reason = str(error).partition("\n")[0]
                raise UsageError(f"cannot join the other processes of torchrun: {reason}") from None
        self.rank = dist.get_rank()

    def parallel(self, model: nn.Module) -> nn.Module:
        """The model, with gradients that are means over the processes."""
        return model if self.size == 1 else nn.parallel.DistributedDataParallel(model)

    def share(self, whole: Tensor) -> Tensor:
        """Columns ``rank``, ``rank + size``, ... of ``[T, B]``, on this process's device."""
        mine = whole if self.size == 1 else whole[:, self.rank :: self.size]
        return mine.to(self.device)

    def sum(self, mine: Tensor) -> Tensor:
        if self.size == 1:
            return mine
        total = mine.clone()
        dist.all_reduce(total)
        return total

    def agree(self, flag: bool) -> bool:
        """Whether any process raises the flag."""
        if self.size == 1:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=self.device)).item())

    def gather(self, mine: Tensor) -> list[Tensor]:
        """The same-shaped tensors of all processes, by rank."""
        if self.size == 1:
            return [mine]
        mine = mine.contiguous().to(self.device)
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(parts, mine)
        return [part.cpu() for part in parts]

    def leave(self) -> None:
        """Destroys the process group, once nothing refers to a ``parallel`` model.

        The group's threads end with the last reference to it. A thread that outlived it could
        release a collective while the interpreter shuts down, which aborts the process.
        """
        if self.size > 1:
            gc.collect()  # DistributedDataParallel refers to itself
            dist.destroy_process_group()
