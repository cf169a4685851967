"""A character-level language model around one recurrent module, ours or PyTorch's."""

from .checkpoint import Pretrained, from_pretrained, save_pretrained
from .data import builtin_text, load_corpus
from .errors import TrainingDiverged, UsageError
from .evaluate import evaluate, evaluate_stream
from .model import CharRNN, ModelConfig, build_model
from .options import TrainOptions
from .sample import SampleOptions, sample, stream
from .train import Trainer, train
from .vocabulary import ByteVocabulary, Vocabulary

__all__ = [
    "ByteVocabulary",
    "CharRNN",
    "ModelConfig",
    "Pretrained",
    "SampleOptions",
    "TrainOptions",
    "Trainer",
    "TrainingDiverged",
    "UsageError",
    "Vocabulary",
    "build_model",
    "builtin_text",
    "evaluate",
    "evaluate_stream",
    "from_pretrained",
    "load_corpus",
    "sample",
    "save_pretrained",
    "stream",
    "train",
]
