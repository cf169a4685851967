"""``RNNCell``: ``torch.nn``'s, with the computation in fused kernels."""

import torch
from torch import Tensor, nn
from torch._jit_internal import is_scripting

from charrnn_fast import ops
from charrnn_fast.tracing import fx_call, is_dense, is_foreign

_is_compiling = torch.compiler.is_compiling


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
        if is_scripting():
            return self._scripted(input, hx)
        if not _is_compiling():
            result = ops.fast_cell(self.__dict__, input, hx)
            if result is not None:
                return result
        return self._checked_forward(input, hx)

    def _scripted(self, input: Tensor, hx: Tensor | None) -> Tensor:
        """What TorchScript runs; the op checks the sizes."""
        one = input.dim() == (0 if input.dtype == torch.int64 else 1)
        step = (input.unsqueeze(0) if one else input).unsqueeze(0)
        if hx is not None:
            hx = (hx.unsqueeze(0) if one else hx).unsqueeze(0)
        weights = [self.weight_ih, self.weight_hh]
        if self.bias:
            weights += [self.bias_ih, self.bias_hh]
        mode = "RNN_" + self.nonlinearity.upper()
        y: Tensor = torch.ops.charrnn_fast.rnn_layer(
            step, hx, None, weights, None, None, None, mode, self.bias, False, False
        )[0]
        return y.squeeze(0).squeeze(0) if one else y.squeeze(0)

    def _checked_forward(self, input: Tensor, hx: Tensor | None) -> Tensor:
        if not _is_compiling() and (node := fx_call(self, input, hx)) is not None:
            return node  # type: ignore[no-any-return]
        weights = [self.weight_ih, self.weight_hh]
        if self.bias_ih is not None:
            weights += [self.bias_ih, self.bias_hh]
        tokens = input.dim() < 2 and input.dtype == torch.int64
        stock = not tokens and self.nonlinearity in ("tanh", "relu")
        if self.nonlinearity not in ops.MODES:
            return super().forward(input, hx)  # raises
        dim = input.dim() + (1 if tokens else 0)
        if stock and (
            (self.bias_ih is None) != (self.bias_hh is None)
            or dim not in (1, 2)
            or not is_dense(input)
            or self._has_odd_weights(weights)
            or input.shape[-1] != self.weight_ih.shape[1]
            or input.dtype != self.weight_ih.dtype
            or (hx is not None and _is_odd_state(input, hx, self.hidden_size))
            or (not _is_compiling() and torch.onnx.is_in_onnx_export())
            or (not _is_compiling() and is_foreign(input, hx, weights))
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
        bias = len(weights) == 4
        y = ops.rnn_layer(step, hx, None, weights, None, None, None, mode, bias)[0]
        state = ops.first_step(y)
        return state if batched else state.squeeze(0)

    def _has_odd_weights(self, weights: list[Tensor]) -> bool:
        """Whether nn.RNNCell would have to broadcast a bias, or to complain."""
        H = self.hidden_size
        expected = [(H, self.input_size), (H, H), (H,), (H,)]
        return any(a.shape != b for a, b in zip(weights, expected, strict=False))


def _is_odd_state(input: Tensor, hx: Tensor, hidden_size: int) -> bool:
    """Whether hx is not simply (B, hidden_size) beside (B, input_size), or both without B."""
    return hx.shape != (*input.shape[:-1], hidden_size) or hx.dtype != input.dtype
