"""Data, from text to batches.

`sources` finds the documents and `formats` reads their files; `tokenizer` turns text into token ids. `prepare` writes
these to disk as `shards` (`encode` in worker processes, `journal` for resuming) and `packed` cuts sequences from them;
or `stream` cuts them straight from a source, whose documents `router` deals out. `order` is the order of the samples,
and `loader` gives every rank its batches. `corpus` is the source that is always there.
"""

import importlib
from typing import Any

__all__ = ["IGNORE_INDEX", "SequenceDataset", "TokenDataset", "open_store"]

_HOMES = {"IGNORE_INDEX": "loader", "SequenceDataset": "loader", "TokenDataset": "packed", "open_store": "shards"}


def __getattr__(name: str) -> Any:
    """Import only what is used: a process that tokenizes does not need torch, whose import takes seconds."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
