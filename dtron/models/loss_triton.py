"""The `Kernel` of the chunked loss in Triton: one read of the logits for the statistics, one read and one write after.

A program takes one row of the logits. The first kernel keeps a running maximum and the sum of exponentials below it
(Milakov and Gimelshein 2018, arXiv 1805.02867); the second writes the gradient over the logits. Between them shards of
the vocabulary meet. Its results are tested on CPUs in Triton's interpreter (TRITON_INTERPRET=1).

It has not been run on a GPU, so `torch_kernel` is the default; `scripts/bench/loss.py` compares them.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dtron.models.loss import IGNORE_INDEX, VocabularyShard
from dtron.models.variants import Variant

__all__ = ["triton_kernel"]

BLOCK = 4096  # columns at a time
WARPS = 8


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _scaled(x: Any, multiplier: Any, cap: Any, HAS_CAP: tl.constexpr) -> Any:
    """The logits that the loss sees; with a cap, cap * tanh(x / cap)."""
    x = x * multiplier
    if HAS_CAP:
        x = cap * (2 * tl.sigmoid(2 * x / cap) - 1)
    return x


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _statistics(
    logits: Any, at: Any, tops: Any, sums: Any, owns: Any, stride: Any, vocabulary: tl.constexpr, multiplier: Any,
    cap: Any, HAS_CAP: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Of each row: its maximum, the sum of exp(x - maximum), and the label's x, minus infinity where it is not here."""
    row = tl.program_id(0).to(tl.int64)
    start, columns = logits + row * stride, tl.arange(0, BLOCK)
    label = tl.load(at + row)
    top, total, own = -float("inf"), 0.0, -float("inf")
    for first in range(0, vocabulary, BLOCK):
        column = first + columns
        inside = column < vocabulary
        x = tl.load(start + column, mask=inside, other=0.0).to(tl.float32)
        x = tl.where(inside, _scaled(x, multiplier, cap, HAS_CAP), -float("inf"))
        larger = tl.maximum(top, tl.max(x, 0))
        total = total * tl.exp(top - larger) + tl.sum(tl.exp(x - larger), 0)
        own = tl.maximum(own, tl.max(tl.where(column == label, x, -float("inf")), 0))
        top = larger
    tl.store(tops + row, top)
    tl.store(sums + row, total)
    tl.store(owns + row, own)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _gradient(
    logits: Any, at: Any, log_sums: Any, weights: Any, stride: Any, vocabulary: tl.constexpr, multiplier: Any, cap: Any,
    HAS_CAP: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Over each logit: weight * (its probability - 1 where it is the label's), times the slope of its scaling."""
    row = tl.program_id(0).to(tl.int64)
    start, columns = logits + row * stride, tl.arange(0, BLOCK)
    label, log_sum, weight = tl.load(at + row), tl.load(log_sums + row), tl.load(weights + row)
    for first in range(0, vocabulary, BLOCK):
        column = first + columns
        inside = column < vocabulary
        x = _scaled(tl.load(start + column, mask=inside, other=0.0).to(tl.float32), multiplier, cap, HAS_CAP)
        d = weight * (tl.exp(x - log_sum) - tl.where(column == label, 1.0, 0.0)) * multiplier
        if HAS_CAP:
            d = d * (1 - (x / cap) * (x / cap))
        tl.store(start + column, d.to(logits.dtype.element_ty), mask=inside)


def triton_kernel(
    logits: Tensor, labels: Tensor, scale: Tensor, variant: Variant, shard: VocabularyShard, gradient: bool
) -> Tensor:
    """See `Kernel` in `dtron/models/loss.py`."""
    rows, vocabulary = logits.shape
    top, sums, own = (torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(3))
    at, valid = labels - shard.first, labels != IGNORE_INDEX
    scaling = logits.stride(0), vocabulary, variant.logits_multiplier, variant.logits_softcap or 1.0
    options = {"HAS_CAP": variant.logits_softcap is not None, "BLOCK": BLOCK, "num_warps": WARPS}
    _statistics[(rows,)](logits, at, top, sums, own, *scaling, **options)
    here = own > -torch.inf
    highest = shard.maximum(top.clone())
    # Of all shards, below the highest maximum.
    parts = torch.stack((sums * torch.exp(top - highest), torch.where(here, own - highest, 0.0)))
    sums, own = shard.total(parts).unbind()
    log_sums = highest + sums.log()
    if gradient:
        weight = torch.where(valid, scale, 0.0)
        _gradient[(rows,)](logits, at, log_sums, weight, *scaling, **options)
    return torch.where(valid, sums.log() - own, 0.0)
