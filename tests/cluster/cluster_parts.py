"""Registered by the jobs of these tests: a slow dataset of random tokens."""

import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1] / "frontdoor"))
from frontdoor_parts import Uneven  # noqa: E402

from dtron.registry import register  # noqa: E402


class Slow(Uneven):
    """`pause_s` per sequence, so that a run lasts long enough to be interrupted."""

    pause_s = 0.0

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        time.sleep(self.pause_s)
        return super().__getitem__(i)


def slow(config: Any, section: Any, split: str, seq_len: int, vocab_size: int, log: Any) -> Slow:
    """`dataset_path`: milliseconds per sequence."""
    data = Slow(seq_len, vocab_size, *((0, 203) if split == "train" else (10**6, 19)))
    data.pause_s = float(section.dataset_path or 0) / 1e3 if split == "train" else 0.0
    return data


register("dataset", "slow", slow)
