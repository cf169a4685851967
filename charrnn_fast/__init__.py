"""Fused CPU kernels for torch.nn's RNN, LSTM and GRU, and a character model that trains with them.

A scripted, exported or packaged program that holds one of the modules runs where this package has
been imported before it is loaded: that registers the ops.
"""

__version__ = "0.2.0"

from charrnn_fast.cell import GRUCell, LSTMCell, RNNCell
from charrnn_fast.explanation import Explanation, explain
from charrnn_fast.gru import GRU
from charrnn_fast.lstm import LSTM
from charrnn_fast.ops import available_isas, build_info, current_isa, use_isa
from charrnn_fast.replacement import Replacement, replace_rnn
from charrnn_fast.rnn import RNN

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Explanation",
    "GRUCell",
    "LSTMCell",
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
