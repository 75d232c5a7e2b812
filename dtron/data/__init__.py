"""Data: the order of samples (`order`), the embedded corpus (`corpus`), batches for one rank (`loader`)."""

from dtron.data.corpus import TokenDataset, load_stdlib, prepare_stdlib, unigram_entropy
from dtron.data.loader import IGNORE_INDEX, SequenceDataset, StepLoader, ValidationLoader, check_dataloader
from dtron.data.order import Permutation, sample_indices

__all__ = [
    "IGNORE_INDEX",
    "Permutation",
    "SequenceDataset",
    "StepLoader",
    "TokenDataset",
    "ValidationLoader",
    "check_dataloader",
    "load_stdlib",
    "prepare_stdlib",
    "sample_indices",
    "unigram_entropy",
]
