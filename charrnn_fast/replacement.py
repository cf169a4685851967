"""``replace_rnn``: the recurrent modules of a model become ours, in place."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from charrnn_fast.cell import GRUCell, LSTMCell, RNNCell
from charrnn_fast.fused import Fused
from charrnn_fast.gru import GRU
from charrnn_fast.lstm import LSTM
from charrnn_fast.rnn import RNN

_SWAPS: dict[type[nn.Module], type[Fused]] = {
    ours._stock: ours for ours in (RNN, LSTM, GRU, RNNCell, LSTMCell, GRUCell)
}


@dataclass
class Replacement:
    """What :func:`replace_rnn` did; ``str()`` of it lists it, a line a module.

    Attributes:
        changed: names of the modules that were swapped, as ``named_modules`` has them.
        left: names of the recurrent modules that were not, each with the reason.

    Example:
        >>> import torch, charrnn_fast
        >>> replacement = charrnn_fast.replace_rnn(torch.nn.LSTM(10, 20, proj_size=5))
        >>> print(replacement)
        left (the model itself): it has a proj_size, which is left to torch.nn
    """

    changed: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    _classes: list[str] = field(default_factory=list, repr=False)  # of those changed
    _modules: list[tuple[nn.Module, type[nn.Module]]] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Gives every swapped module its old class back; a second call does nothing."""
        for module, before in self._modules:
            module.__class__ = before
        self._modules.clear()

    def __str__(self) -> str:
        lines = [
            f"changed {name or '(the model itself)'} to {ours}"
            for name, ours in zip(self.changed, self._classes, strict=True)
        ]
        lines += [f"left {name or '(the model itself)'}: {why}" for name, why in self.left.items()]
        return "\n".join(lines) or "no recurrent module found"


def replace_rnn(model: nn.Module) -> Replacement:
    """Makes every ``nn.RNN``, ``nn.LSTM``, ``nn.GRU`` and their cells in a model ours, in place.

    The module objects stay the same: only their class changes, as ours hold the same attributes.
    Parameters, buffers, hooks, the training flag, devices, and all references from optimizers and
    other modules are untouched. Subclasses, scripted modules and an LSTM with ``proj_size`` stay
    what they are. A model without any recurrent module is a warning, not an error.

    Args:
        model: any module; it may itself be recurrent.

    Returns:
        What was changed, what was left and why, and an ``undo()``.

    Example:
        >>> import torch, charrnn_fast
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 10), torch.nn.GRU(10, 20))
        >>> replacement = charrnn_fast.replace_rnn(model)
        >>> print(replacement)
        changed 1 to charrnn_fast.GRU
        >>> type(model[1])
        <class 'charrnn_fast.gru.GRU'>
        >>> replacement.undo()
        >>> type(model[1])
        <class 'torch.nn.modules.rnn.GRU'>
    """
    report = Replacement()
    for name, module in _recurrent_modules(model):
        target = _SWAPS.get(type(module))
        if target is not None and getattr(module, "proj_size", 0) != 0:
            report.left[name] = "it has a proj_size, which is left to torch.nn"
        elif target is not None:
            report._modules.append((module, type(module)))
            module.__class__ = target
            report.changed.append(name)
            report._classes.append(f"charrnn_fast.{target.__name__}")
        elif isinstance(module, Fused):
            report.left[name] = "it is charrnn_fast's already"
        elif isinstance(module, tuple(_SWAPS)):
            kind = type(module)
            report.left[name] = f"{kind.__module__}.{kind.__qualname__} is a subclass of its own"
        elif isinstance(module, torch.jit.ScriptModule):
            report.left[name] = "it is compiled by TorchScript"
        else:
            report.left[name] = f"{type(module).__name__} has a formula of its own"
    if not report.changed and not report.left:
        warnings.warn("replace_rnn found no recurrent module in the model", stacklevel=2)
    return report


def _recurrent_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        scripted = getattr(module, "original_name", "") in {kind.__name__ for kind in _SWAPS}
        if isinstance(module, (nn.RNNBase, nn.RNNCellBase)) or (
            isinstance(module, torch.jit.ScriptModule) and scripted
        ):
            yield name, module
