"""The phases of an optimizer step: named in traces, and timed."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dtron.compat.tracing import span

__all__ = ["Phases"]


class Phases:
    """`with phases(NAME):` around each phase of a step, each name once per step.

    On CUDA the times are those of events, which the GPU notes in passing and nothing waits for; on a CPU the clock's.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._events: dict[str, tuple[torch.cuda.Event, torch.cuda.Event]] = {}
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began_s = time.perf_counter()
        if self._cuda:
            if name not in self._events:
                self._events[name] = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._events[name][0].record()
        with span(name):
            yield
        if self._cuda:
            self._events[name][1].record()
        self._seconds[name] = time.perf_counter() - began_s

    def seconds(self) -> dict[str, float]:
        """Of each phase in the last step. On CUDA only after its end was waited for, as reading its loss does."""
        if not self._cuda:
            return dict(self._seconds)
        return {name: start.elapsed_time(end) / 1000 for name, (start, end) in self._events.items()}
