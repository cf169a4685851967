"""``RNN`` and ``RNNCell``: ``torch.nn``'s, with the computation in fused kernels."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import has_torch_function
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from charrnn_fast import ops

_is_compiling = torch.compiler.is_compiling


class RNN(nn.RNN):
    """Drop-in for :class:`torch.nn.RNN`, whose arguments, attributes and errors it keeps.

    Beyond ``nn.RNN``:

    - ``nonlinearity`` may also be ``'sigmoid'``;
    - an int64 input holds token ids standing for one-hot vectors: ``(T, B)``, or ``(B, T)`` with
      ``batch_first``, or ``(T)`` unbatched;
    - ``lengths``, an int64 tensor of shape ``(B)`` on the CPU, bounds each sequence of a padded
      batch: outputs past a sequence's end are zero, and ``h_n`` is the state at its end. The
      result and the gradients are those of a packed sequence, without packing.

    Raises:
        IndexError: a token id is outside ``[0, input_size)``; the message names it.
        ValueError: a length is outside ``[1, T]``.
    """

    accepts_tokens = True  # what charlm asks, instead of asking for the class

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        nonlinearity = args[3] if len(args) > 3 else kwargs.get("nonlinearity", "tanh")
        if nonlinearity == "sigmoid":
            # nn.RNN's constructor knows two; the mode is all that differs.
            if len(args) > 3:
                args = (*args[:3], "tanh", *args[4:])
            else:
                kwargs["nonlinearity"] = "tanh"
        super().__init__(*args, **kwargs)
        if nonlinearity == "sigmoid":
            self.nonlinearity = "sigmoid"
            self.mode = ops.MODES["sigmoid"]

    def extra_repr(self) -> str:
        text: str = super().extra_repr()
        return text + (", nonlinearity=sigmoid" if self.mode == "RNN_SIGMOID" else "")

    def forward(  # type: ignore[override]
        self, input: Tensor | PackedSequence, hx: Tensor | None = None, lengths: Any = None
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """Runs the stack of layers.

        Args:
            input: ``(T, B, input_size)``, ``(T, input_size)``, token ids, or a packed sequence;
                batch comes first where ``batch_first`` says so.
            hx: ``(num_layers * directions, B, hidden_size)`` initial state; zeros when None.
            lengths: ``(B)`` steps of each sequence of a padded batch; all of them when None.

        Returns:
            ``(output, h_n)`` as :class:`torch.nn.RNN` returns them.
        """
        if not _is_compiling():
            result = ops.fast_forward(self.__dict__, input, hx, lengths)
            if result is not None:
                return result
        return self._checked_forward(input, hx, lengths)

    def _checked_forward(
        self, input: Tensor | PackedSequence, hx: Tensor | None, lengths: Any
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """The long way: every kind of input, nn.RNN's checks in nn.RNN's order."""
        weights = self._current_weights()
        packed = isinstance(input, PackedSequence)
        data: Tensor = input.data if isinstance(input, PackedSequence) else input
        # Integers of more dimensions are no ids: nn.RNN's checks complain of them.
        tokens = data.dtype == torch.int64 and data.dim() < (2 if packed else 3)
        if not _is_compiling():
            stock = lengths is None and self.mode != "RNN_SIGMOID" and not tokens
            if stock and _is_foreign(data, hx, weights):
                return super().forward(input, hx)

        batch_sizes = sorted_indices = unsorted_indices = None
        batched = True
        if isinstance(input, PackedSequence):
            data, batch_sizes, sorted_indices, unsorted_indices = input
            if lengths is not None:
                raise ValueError("RNN: lengths cannot be given with a PackedSequence")
            if hx is not None and sorted_indices is not None:
                hx = hx.index_select(1, sorted_indices)
        else:
            dim = data.dim() + (1 if tokens else 0)
            if dim not in (2, 3):
                expected = "token ids to be 1D or 2D" if tokens else "input to be 2D or 3D"
                raise ValueError(f"RNN: Expected {expected}, got {data.dim()}D tensor instead")
            batched = dim == 3
            if not batched:
                data = data.unsqueeze(0 if self.batch_first else 1)
                if hx is not None:
                    if hx.dim() != 2:
                        raise RuntimeError(
                            "For unbatched 2-D input, hx should also be 2-D "
                            f"but got {hx.dim()}-D tensor"
                        )
                    hx = hx.unsqueeze(1)
            elif hx is not None and hx.dim() != 3:
                raise RuntimeError(
                    f"For batched 3-D input, hx should also be 3-D but got {hx.dim()}-D tensor"
                )
            if lengths is not None:
                lengths = torch.as_tensor(lengths)
                if lengths.dim() == 0 and not batched:
                    lengths = lengths.unsqueeze(0)
        self._check(data, hx, batch_sizes, tokens, weights)

        major = data.transpose(0, 1) if self.batch_first and not packed else data
        output, h_n = ops.rnn(
            major,
            hx,
            weights,
            batch_sizes,
            lengths,
            self.mode,
            self.bias,
            self.num_layers,
            float(self.dropout),
            self.training,
            self.bidirectional,
        )
        if packed:
            if unsorted_indices is not None:
                h_n = h_n.index_select(1, unsorted_indices)
            assert batch_sizes is not None
            return PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices), h_n
        if self.batch_first:
            output = output.transpose(0, 1)
        if not batched:
            output = output.squeeze(0 if self.batch_first else 1)
            h_n = h_n.squeeze(1)
        return output, h_n

    def _current_weights(self) -> list[Tensor]:
        """The weights as attributes give them now: parametrized, pruned, swapped or plain."""
        try:
            return [getattr(self, name) for name in self._flat_weights_names]
        except AttributeError:
            # A weight that was removed: nn.RNN goes on with the last one it saw.
            self._update_flat_weights()
            return list(self._flat_weights)  # type: ignore[arg-type]

    def _check(
        self,
        input: Tensor,
        hx: Tensor | None,
        batch_sizes: Tensor | None,
        tokens: bool,
        weights: list[Tensor],
    ) -> None:
        """nn.RNN's own checks of input and hx; what token ids lack is left out."""
        if not _is_compiling():
            self._update_flat_weights()
        if not tokens and not _is_compiling():
            self.check_input(input, batch_sizes)
        elif not tokens:
            # The same checks, without a flat weight list that tracing would have to guard.
            if input.dtype != weights[0].dtype and not torch.is_autocast_enabled(input.device.type):
                raise ValueError(
                    f"RNN input dtype ({input.dtype}) does not match weight dtype "
                    f"({weights[0].dtype})."
                )
            if input.shape[-1] != self.input_size:
                raise RuntimeError(
                    "input.size(-1) must be equal to input_size. "
                    f"Expected {self.input_size}, got {input.shape[-1]}"
                )
        if hx is not None:
            self.check_hidden_size(hx, self.get_expected_hidden_size(input, batch_sizes))


class RNNCell(nn.RNNCell):
    """Drop-in for :class:`torch.nn.RNNCell`, with ``nonlinearity='sigmoid'`` and token ids too."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """One step.

        Args:
            input: ``(B, input_size)`` or ``(input_size)``; or int64 ids of shape ``(B)`` or ``()``.
            hx: ``(B, hidden_size)`` or ``(hidden_size)``; zeros when None.

        Returns:
            The next state, of the shape of ``hx``.
        """
        if not _is_compiling():
            result = ops.fast_cell(self.__dict__, input, hx)
            if result is not None:
                return result
        return self._checked_forward(input, hx)

    def _checked_forward(self, input: Tensor, hx: Tensor | None) -> Tensor:
        weights = [self.weight_ih, self.weight_hh]
        if self.bias_ih is not None:
            weights += [self.bias_ih, self.bias_hh]
        tokens = input.dtype == torch.int64
        stock = not tokens and self.nonlinearity in ("tanh", "relu")
        if self.nonlinearity not in ops.MODES:
            return super().forward(input, hx)  # raises
        dim = input.dim() + (1 if tokens else 0)
        if stock and (
            (self.bias_ih is None) != (self.bias_hh is None)
            or dim not in (1, 2)
            or input.shape[-1] != self.weight_ih.shape[1]
            or input.dtype != self.weight_ih.dtype
            or (hx is not None and _is_odd_state(input, hx, self.hidden_size))
            or (not _is_compiling() and _is_foreign(input, hx, weights))
        ):
            return super().forward(input, hx)  # raises, or serves what the kernels do not
        if dim not in (1, 2):
            raise ValueError(f"RNNCell: Expected token ids to be 0D or 1D, got {input.dim()}D")
        batched = dim == 2
        if hx is not None and hx.dim() != (2 if batched else 1):
            raise ValueError(f"RNNCell: Expected hidden to be 1D or 2D, got {hx.dim()}D instead")
        step = input.unsqueeze(0) if batched else input.unsqueeze(0).unsqueeze(0)
        if hx is not None:
            hx = hx.unsqueeze(0) if batched else hx.unsqueeze(0).unsqueeze(0)
        mode = ops.MODES[self.nonlinearity]
        y, _ = ops.rnn_layer(step, hx, weights, None, None, mode, len(weights) == 4)
        return y.squeeze(0) if batched else y.squeeze(0).squeeze(0)


def _is_odd_state(input: Tensor, hx: Tensor, hidden_size: int) -> bool:
    """Whether hx is not simply (B, hidden_size) beside (B, input_size), or both without B."""
    return hx.shape != (*input.shape[:-1], hidden_size) or hx.dtype != input.dtype


def _is_foreign(input: Tensor, hx: Tensor | None, weights: list[Tensor]) -> bool:
    """Whether a tensor subclass is among these that would have to know our ops."""
    tensors = [input, *weights] if hx is None else [input, hx, *weights]
    return has_torch_function(tensors) or any(map(is_traceable_wrapper_subclass, tensors))


@dataclass(frozen=True)
class Explanation:
    """Which path a call takes, and why. ``str()`` of it is for people."""

    fused: bool
    reason: str
    isa: str
    threads: int
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def path(self) -> str:
        """``'fused'`` or ``'composite'``."""
        return "fused" if self.fused else "composite"

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.reason}"]
        if self.fused:
            lines.append(f"isa: {self.isa}")
            lines.append(f"threads: {self.threads}")
            lines += [f"{name}: {value}" for name, value in self.details.items()]
        return "\n".join(lines)


def explain(module: nn.Module, input: Any, hx: Tensor | None = None, **_: Any) -> Explanation:
    """Says whether ``module(input, hx)`` runs in the fused kernels, and why or why not.

    The answer comes from the rule by which the ops decide. It holds for a plain call: inside a
    ``torch.func`` transform, in forward-mode AD and for double backward the composite path runs.

    Args:
        module: an :class:`RNN` or :class:`RNNCell`; for any other module the answer is composite.
        input: what the module would be called with.
        hx: the initial state it would be called with.
    """

    def answer(reason: str | None) -> Explanation:
        details = {}
        if reason is None and weights[0].dtype.itemsize == 2:
            computed = ops.computed_in(weights[0].dtype)
            details["products"] = f"of {computed}, summed in float32".replace("torch.", "")
        return Explanation(
            fused=reason is None,
            reason=reason or "the CPU kernels serve these tensors",
            isa=ops.current_isa(),
            threads=torch.get_num_threads(),
            details=details,
        )

    weights: list[Tensor] = []

    if not isinstance(module, (RNN, RNNCell)):
        return answer(f"the module is a {type(module).__module__}.{type(module).__qualname__}")
    data = input.data if isinstance(input, PackedSequence) else input
    if isinstance(module, RNN):
        weights = module._current_weights()
    else:
        weights = [module.weight_ih, module.weight_hh]
        weights += [] if module.bias_ih is None else [module.bias_ih, module.bias_hh]
    if _is_foreign(data, hx, weights):
        return answer("a tensor is of a subclass that has its own rules")
    device = data.device.type
    if torch.is_autocast_enabled(device) and weights[0].dtype == torch.float32:
        low = torch.get_autocast_dtype(device)
        weights = [weight.to(low) for weight in weights]
    return answer(ops.why_composite(data, hx, weights))


_SWAPS: dict[type[nn.Module], type[nn.Module]] = {nn.RNN: RNN, nn.RNNCell: RNNCell}


@dataclass
class Replacement:
    """What :func:`replace_rnn` did.

    Attributes:
        changed: names of the modules that were swapped.
        left: names of the recurrent modules that were not, each with the reason.
    """

    changed: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    _modules: list[tuple[nn.Module, type[nn.Module]]] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Gives every swapped module its old class back."""
        for module, before in self._modules:
            module.__class__ = before
        self._modules.clear()

    def __str__(self) -> str:
        lines = [f"changed {name or '(the model itself)'}" for name in self.changed]
        lines += [f"left {name or '(the model itself)'}: {why}" for name, why in self.left.items()]
        return "\n".join(lines) or "no recurrent module found"


def replace_rnn(model: nn.Module) -> Replacement:
    """Makes every ``nn.RNN`` and ``nn.RNNCell`` in a model ours, in place.

    The module objects stay the same: only their class changes, as ours hold the same attributes.
    Parameters, buffers, hooks, the training flag, devices, and all references from optimizers and
    other modules are untouched.

    Returns:
        What was changed, what was left and why, and an ``undo()``.
    """
    report = Replacement()
    for name, module in _recurrent_modules(model):
        target = _SWAPS.get(type(module))
        if target is not None:
            report._modules.append((module, type(module)))
            module.__class__ = target
            report.changed.append(name)
        elif isinstance(module, (RNN, RNNCell)):
            report.left[name] = "it is charrnn_fast's already"
        elif isinstance(module, (nn.RNN, nn.RNNCell)):
            kind = type(module)
            report.left[name] = f"{kind.__module__}.{kind.__qualname__} is a subclass of its own"
        elif isinstance(module, torch.jit.ScriptModule):
            report.left[name] = "it is compiled by TorchScript"
        else:
            report.left[name] = f"{type(module).__name__} is not an Elman network"
    if not report.changed and not report.left:
        warnings.warn("replace_rnn found no recurrent module in the model", stacklevel=2)
    return report


def _recurrent_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        scripted = getattr(module, "original_name", "") in ("RNN", "RNNCell", "LSTM", "GRU")
        if isinstance(module, (nn.RNNBase, nn.RNNCellBase)) or (
            isinstance(module, torch.jit.ScriptModule) and scripted
        ):
            yield name, module


if TYPE_CHECKING:
    _: type[nn.RNN] = RNN
