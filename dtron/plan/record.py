"""What a dry run records of one optimizer step on one rank: memory, messages and floating-point operations."""

import dataclasses
import json
from dataclasses import dataclass
from typing import NamedTuple

__all__ = ["KINDS", "Collective", "Message", "Moment", "Peak", "Reserved", "StepRecord"]

# What memory is held for. Activations are also counted for each block. Temporaries: of a backward, of the optimizer and
# of whatever belongs to no module.
KINDS = (
    "parameters",
    "gradients",
    "optimizer state",
    "gathered weights",
    "reduction buffers",
    "activations",
    "recomputed activations",
    "receive buffers",
    "logits and loss",
    "batch",
    "temporaries",
)


@dataclass(frozen=True)
class Peak:
    """The moment at which most memory is held.

    total: bytes. parts: bytes of each of `KINDS` that is held. activations: bytes of each module, such as layers.3.
    phase: forward, recompute, backward or update. module: that allocated last, empty for none; operation: by which.
    """

    total: int
    phase: str
    module: str
    operation: str
    parts: dict[str, int]
    activations: dict[str, int]


@dataclass(frozen=True)
class Moment:
    """Between two operations of a step. event: of the step's allocations and frees, how many came before. phase, parts:
    see `Peak`.
    """

    event: int
    phase: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Reserved:
    """What CUDA's caching allocator is modelled to hold at most (`allocator.py`), after some steps.

    allocated: bytes in blocks, whose sizes are rounded. reserved: of CUDA, by default; expandable: with expandable
    segments.
    """

    allocated: int
    reserved: int
    expandable: int


class Message(NamedTuple):
    """One message of one rank, see `Collective`; with an empty dimension an operation (`dtron/explain/journal.py`).

    module: the block or child of the model that is at work, empty for none; part: which part of it. unit: of FSDP,
    whose weights are gathered or gradients reduced, such as layers.3; empty for others. peer: world rank that a send
    goes to or a receive comes from, else -1. flops, shapes: of an operation.
    """

    dimension: str
    ranks: int
    operation: str
    phase: str
    bytes: int
    module: str = ""
    part: str = ""
    unit: str = ""
    peer: int = -1
    flops: int = 0
    shapes: str = ""


@dataclass(frozen=True)
class Collective:
    """Messages of one kind in one step.

    dimension: of the mesh, such as tp or dp_shard_cp, or world. ranks: of the group. operation: all_gather,
    reduce_scatter, all_reduce, all_to_all, broadcast, send or receive. phase: see `Peak`, or pipeline for what stages
    pass to each other. bytes: of all `count` messages, each the whole: a gather's result, a reduce-scatter's input.
    """

    dimension: str
    ranks: int
    operation: str
    phase: str
    count: int
    bytes: int


@dataclass(frozen=True)
class StepRecord:
    """One rank's step.

    layout: in words. start_bytes: held between two steps. flops: of each phase, as they are done: attention in full,
    recomputation included. replayed: forwards of blocks that were not run, since an equal one had been recorded.
    timeline: what is held over the step, some hundred moments.
    """

    layout: str
    rank: int
    world: int
    stages: tuple[int, ...]
    peak: Peak
    start_bytes: int
    collectives: tuple[Collective, ...]
    flops: dict[str, int]
    replayed: int
    timeline: tuple[Moment, ...]
    reserved: Reserved

    def as_json(self) -> str:
        """One JSON object, with the names of the fields."""
        return json.dumps(dataclasses.asdict(self))
