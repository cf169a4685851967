"""What watches calls from outside: tensor subclasses, and FX."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx, nn
from torch.overrides import has_torch_function
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def is_foreign(input: Tensor, hx: Tensor | None, weights: Sequence[Tensor]) -> bool:
    """Whether a tensor subclass is among these that would have to know our ops."""
    tensors = [input, *weights] if hx is None else [input, hx, *weights]
    return has_torch_function(tensors) or any(map(is_traceable_wrapper_subclass, tensors))


def fx_call(module: nn.Module, *args: Any) -> Any:
    """The node of a call that FX traces, or None when it does not.

    FX takes modules of torch.nn for leaves by the name of their package; ours are leaves, too.
    """
    proxy = next((arg for arg in args if isinstance(arg, fx.Proxy)), None)
    if proxy is None:
        return None
    while args[-1] is None:
        args = args[:-1]
    tracer: Any = proxy.tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(module), args, {})
