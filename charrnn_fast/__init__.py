"""Fused CPU kernels for torch.nn.RNN, and a character model that trains with them."""

__version__ = "0.1.0"

from charrnn_fast.ops import available_isas, build_info, current_isa, use_isa
from charrnn_fast.rnn import RNN, Explanation, Replacement, RNNCell, explain, replace_rnn

__all__ = [
    "RNN",
    "Explanation",
    "RNNCell",
    "Replacement",
    "__version__",
    "available_isas",
    "build_info",
    "current_isa",
    "explain",
    "replace_rnn",
    "use_isa",
]
