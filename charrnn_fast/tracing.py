"""Calls that something else intercepts: tensor subclasses and FX."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._C import _disabled_torch_function_impl
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def is_foreign(input: Tensor, hx: Any, weights: Sequence[Tensor]) -> bool:
    """Whether a tensor is of a subclass that intercepts ops, and so would have to know ours."""
    states = hx if isinstance(hx, (tuple, list)) else [hx]
    return any(
        _overrides(tensor) or is_traceable_wrapper_subclass(tensor)
        for tensor in [input, *states, *weights]
    )


def is_dense(tensor: Tensor) -> bool:
    """Whether its elements lie where its strides say."""
    return tensor.layout is torch.strided and not tensor.is_nested


def _overrides(tensor: Tensor) -> bool:
    """Whether its class overrides ``__torch_function__``. Modes do not count, as they do for
    has_torch_function: ``torch.set_default_device`` is one, and changes nothing here."""
    kind = type(tensor)
    if kind is Tensor or not issubclass(kind, Tensor):  # nn.RNN's checks refuse the latter
        return False
    return kind.__torch_function__ is not _disabled_torch_function_impl


def fx_call(module: nn.Module, *args: Any) -> Any:
    """The node of a call that FX traces, or None when it does not.

    FX takes modules of torch.nn for leaves by the name of their package; ours are leaves, too.
    """
    leaves = [leaf for arg in args for leaf in (arg if type(arg) in (tuple, list) else (arg,))]
    proxy = next((leaf for leaf in leaves if isinstance(leaf, fx.Proxy)), None)
    if proxy is None:
        return None
    while args[-1] is None:
        args = args[:-1]
    tracer: Any = proxy.tracer
    path = tracer.path_of_module(module)
    if not path:
        raise fx.proxy.TraceError(
            f"{type(module).__name__} is a leaf of FX: trace a module that holds it"
        )
    return tracer.create_proxy("call_module", path, args, {})
