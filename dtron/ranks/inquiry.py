"""Asking all ranks, through the rendezvous store, what they are waiting for; afterwards all of them end.

Of several ranks that would ask, the first has the word, and so has a rank that failed before.
"""

import json
import time
from typing import Any

import torch.distributed as dist

from dtron.ranks.failure import FIRST_FAILURE

__all__ = ["Inquiry"]


class Inquiry:
    """One question to the ranks of a store, by `name`. Every method talks to the store and may raise its errors."""

    def __init__(self, store: dist.Store, name: str, rank: int, size: int) -> None:
        self._store, self._name, self._rank, self._size = store, name, rank, size

    def begin(self) -> bool:
        """Ask, unless another rank has failed or asked before: then False."""
        mine = f"{self._name} of rank {self._rank}"  # more than the rank: its main thread fails too and stays silent
        if self._store.compare_set(FIRST_FAILURE, "", mine).decode() != mine:
            return False
        self._store.set(self._name, mine)
        return True

    def asked(self) -> bool:
        """Whether some rank has asked."""
        return self._store.check([self._name])

    def answer(self, state: dict[str, Any]) -> None:
        """Say where this rank is, as JSON holds it."""
        self._store.set(f"{self._name}/{self._rank}", json.dumps(state))

    def collect(self, within_s: float) -> dict[int, dict[str, Any] | None]:
        """The ranks' answers; None for a rank that gave none within `within_s` seconds."""
        answers: dict[int, dict[str, Any] | None] = dict.fromkeys(range(self._size))
        end = time.monotonic() + within_s
        while (missing := [rank for rank, answer in answers.items() if answer is None]) and time.monotonic() < end:
            for rank in missing:
                if self._store.check([f"{self._name}/{rank}"]):
                    answers[rank] = json.loads(self._store.get(f"{self._name}/{rank}"))
            time.sleep(0.05)
        return answers

    def end(self, text: str = "") -> None:
        """Let the other ranks end; text: what to tell their torchrun."""
        self._store.set(f"{self._name}/over", text)

    def wait_for_end(self, longest_s: float) -> str | None:
        """The text of `end`; None if it did not come within `longest_s` seconds."""
        end = time.monotonic() + longest_s
        while time.monotonic() < end:
            if self._store.check([f"{self._name}/over"]):
                return self._store.get(f"{self._name}/over").decode()
            time.sleep(0.05)
        return None
