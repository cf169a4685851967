"""Fused CPU kernels for torch.nn.RNN, and a character model that trains with them."""

__version__ = "0.1.0"

from charrnn_fast.cell import RNNCell
from charrnn_fast.explanation import Explanation, explain
from charrnn_fast.ops import available_isas, build_info, current_isa, use_isa
from charrnn_fast.replacement import Replacement, replace_rnn
from charrnn_fast.rnn import RNN

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
