"""What the front-door tests register: data of random tokens, and parts that fail at a chosen rank and step."""

import os
import signal
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dtron.data.loader import IGNORE_INDEX
from dtron.errors import UserError
from dtron.registry import cross_entropy, register

RANK = int(os.environ.get("RANK", 0))


@dataclass
class Uneven:
    """Sequence i, the same everywhere: skewed random tokens, a random share of them without a label."""

    seq_len: int
    vocab_size: int
    first: int
    length: int
    tokenizer_json: str | None = None

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        random = np.random.default_rng(self.first + i)
        text = np.minimum(random.geometric(0.1, self.seq_len + 1), self.vocab_size - 1).astype(np.int64)
        labels = text[1:].copy()
        labels[: random.integers(self.seq_len)] = IGNORE_INDEX  # whole shards of a split sequence have no label
        return text[:-1], labels


class Failing(Uneven):
    """Does something else than give data, on one rank, from one step on; `dataset_path` is "WHAT RANK STEP".

    "rest all STEP": every rank sleeps once, then computes once, for 6 seconds each.
    """

    def arm(self, order: str, rows: int, ahead: int) -> None:
        """rows: of a step; ahead: steps whose rows are read before they are needed."""
        self.what, rank, step = order.split()
        steps = int(step) - 1 + (ahead if self.what == "kill" else 0)  # a kill does not wait until its step comes
        self.left = rows * steps if rank in (str(RANK), "all") else 10**9

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        self.left -= 1
        if self.what == "rest":
            if self.left in (-1, -2):
                rest(compute=self.left == -2)
        elif self.left < 0:
            if self.what == "raise":
                raise ArithmeticError("the disk is on fire")
            if self.what == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(1000)
        return super().__getitem__(i)


def rest(compute: bool) -> None:
    if not compute:
        time.sleep(6)
    end = time.monotonic() + 6
    while compute and time.monotonic() < end:
        torch.ones(512, 512) @ torch.ones(512, 512)


def uneven(config: Any, section: Any, split: str, seq_len: int, vocab_size: int, log: Any) -> Uneven:
    return Uneven(seq_len, vocab_size, *((0, 203) if split == "train" else (10**6, 19)))


def failing(config: Any, section: Any, split: str, seq_len: int, vocab_size: int, log: Any) -> Uneven:
    what, rank, _ = section.dataset_path.split()
    if what == "refuse" and rank == str(RANK):
        raise UserError(f"the data of rank {RANK} is missing; copy it there")
    data = Failing(seq_len, vocab_size, first=0, length=203)
    data.arm(section.dataset_path, config.training.local_batch_size, config.training.dataloader.prefetch_factor)
    return data


class NotANumber:
    """Cross entropy that is NaN on rank 1 from its third call on."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        self.calls += 1
        bad = RANK == 1 and self.calls >= 3
        return cross_entropy(logits * torch.nan if bad else logits, labels)


def dropping(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy under dropout."""
    return cross_entropy(torch.nn.functional.dropout(logits, 0.2), labels)


class Stuck:
    """Cross entropy that does not come back on rank 1, from its hundredth call on, some steps after the first."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        self.calls += 1
        if RANK == 1 and self.calls >= 100:
            time.sleep(1000)
        return cross_entropy(logits, labels)


register("dataset", "uneven", uneven)
register("loss", "dropping", dropping)
register("dataset", "failing", failing)
register("loss", "nan_on_rank_1", NotANumber())
register("loss", "stuck_on_rank_1", Stuck())
