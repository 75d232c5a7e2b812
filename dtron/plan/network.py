"""The time of a collective, by NCCL's own model: the bytes of the slowest link, and a latency for each hop.

Gathers, scatters and exchanges are rings, with one hop for each rank; all-reduces of many nodes are trees. The
latencies are those by which NCCL chooses its protocols (src/graph/tuning.cc, 2.27).
"""

import math
from dataclasses import dataclass

from dtron.plan.hardware import Constants, Hardware

__all__ = ["Group", "contended", "message_s"]


@dataclass(frozen=True)
class Protocol:
    """Seconds at the start, and of a hop within a node and between nodes; share of the link's rate."""

    base_s: float
    inside_s: float
    between_s: float
    rate: float


PROTOCOLS = Protocol(14e-6, 1.9e-6, 4.0e-6, 120 / 128), Protocol(8.4e-6, 3.4e-6, 14e-6, 1.0)  # LL128, Simple


@dataclass(frozen=True)
class Group:
    """Ranks that communicate; here: how many of them are in one node."""

    ranks: int
    here: int

    @classmethod
    def of(cls, ranks: int, stride: int, per_node: int) -> "Group":
        """stride: ranks of the world from one to the next."""
        return cls(ranks, max(1, min(ranks, per_node // stride)))

    @property
    def nodes(self) -> float:
        return self.ranks / self.here


def contended(nodes: float, c: Constants) -> float:
    """By how much longer messages take between so many nodes."""
    return 1 + c.contention * math.log2(nodes / 2) if nodes > 2 else 1.0


def message_s(size: float, group: Group, hw: Hardware, c: Constants, tree: bool = False, messages: float = 1) -> float:
    """A gather, scatter or exchange of `size` bytes in all; tree: an all-reduce, of twice as much.

    messages: into how many the bytes are divided.
    """
    n, nodes = group.ranks, group.nodes
    if n == 1:
        return 0.0
    moved = size * (n - 1) / n * (2 if tree else 1)
    rate = hw.link_rate * c.link
    if nodes > 1:
        rate = min(rate, hw.network_rate * c.network * group.here) / contended(nodes, c)
    if tree:
        inside, between = 2.0 * (group.here - 1), 2 * math.log2(nodes)
    else:
        inside, between = n - nodes, nodes - 1
    return min(
        moved / rate / p.rate + messages * (p.base_s + inside * p.inside_s + between * p.between_s) for p in PROTOCOLS
    )
