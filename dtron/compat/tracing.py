"""Private APIs of traces and memory snapshots, 2.11 and 2.13."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.autograd import profiler
from torch.profiler import record_function

__all__ = ["dump_memory_snapshot", "record_memory_history", "span"]


def span(name: str) -> AbstractContextManager[Any]:
    """`record_function(name)` while a profiler records, else nothing: a look at a flag. Waits for a public flag."""
    return record_function(name) if profiler._is_profiler_enabled else nullcontext()


def record_memory_history(max_entries: int | None) -> None:
    """Record allocations and frees of CUDA memory with their Python stacks, the last max_entries; None: stop.

    Waits for a public one, as the next.
    """
    if max_entries is None:
        torch.cuda.memory._record_memory_history(enabled=None)
    else:
        torch.cuda.memory._record_memory_history(max_entries=max_entries)


def dump_memory_snapshot(file: str) -> None:
    """Write what was recorded and what is held, for pytorch.org/memory_viz."""
    torch.cuda.memory._dump_snapshot(file)
