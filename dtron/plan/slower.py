"""Why layouts that fit are slower than the fastest, and what another batch would change: lines of `dtron plan`."""

import dataclasses
from collections.abc import Iterable

from dtron.plan.search import FAMILIES, Candidate, Search

__all__ = ["near_batch", "slower_lines"]

TERMS = {
    "matmul_s": "matmuls",
    "attention_s": "attention",
    "memory_bound_s": "memory-bound work",
    "recompute_s": "recomputation",
    "tensor_s": "tensor parallel",
    "context_s": "context parallel",
    "expert_s": "the exchange of experts' rows",
    "data_s": "data parallel",
    "bubble_s": "the bubble",
    "pipeline_s": "the pipeline's messages",
    "optimizer_s": "the optimizer",
    "other_s": "launching kernels",
}
WITHIN = 0.05  # of the batch that is given, one with more factors of two is looked for


def slower_lines(found: Search) -> list[str]:
    """A line for each dimension and for recomputation: of each value that fits, the share of the fastest layout's speed
    that its own fastest reaches, and the term that takes most longer."""
    first = found.candidates[0]
    lines = []
    for name in FAMILIES:
        best = found.families[name]
        own = getattr(first.layout, name)
        words = [f"{value} {_beside(first, best[value])}" for value in sorted(best) if value != own]
        if words:
            lines.append(f"{name} {own}; {', '.join(words)}")
    return lines


def _beside(first: Candidate, other: Candidate) -> str:
    share = other.time.tokens_per_s / first.time.tokens_per_s
    # The batch is the same, so a step's seconds compare.
    before, after = (dataclasses.asdict(c.time) for c in (first, other))
    name = max(TERMS, key=lambda term: after[term] - before[term])
    more = after[name] - before[name]
    if share > 0.995 or more <= 0:
        return f"{share:.0%}"
    return f"{share:.0%} ({TERMS[name]} +{more:.2g} s)"


def near_batch(batch: int, gpus: int) -> int | None:
    """The batch within 5% with the largest power of two, up to the GPUs', and the nearest; None if it is `batch`."""

    def twos(n: int) -> int:
        return min(n & -n, _power(gpus))

    around: Iterable[int] = range(max(1, round(batch * (1 - WITHIN))), round(batch * (1 + WITHIN)) + 1)
    best = max(around, key=lambda n: (twos(n), -abs(n - batch)))
    return best if twos(best) > twos(batch) else None


def _power(n: int) -> int:
    """The largest power of two up to n."""
    return int(2 ** (n.bit_length() - 1))
