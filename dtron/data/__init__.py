"""Data, from text to batches.

`sources` reads documents, `tokenizer` makes token ids of them, `prepare` keeps these on disk as `shards`, `packed` cuts
sequences from the shards, or `stream` straight from a source; `order` is the order of the samples, and `loader` gives
every rank its batches. `corpus` is the source that is always there.
"""

import importlib
from typing import Any

__all__ = ["IGNORE_INDEX", "SequenceDataset", "TokenDataset", "open_store"]

_HOMES = {"IGNORE_INDEX": "loader", "SequenceDataset": "loader", "TokenDataset": "packed", "open_store": "shards"}


def __getattr__(name: str) -> Any:
    """Import what is asked for only: a process that tokenizes has no use for torch, which takes it seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
