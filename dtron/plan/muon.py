"""The time of a step of Muon (`dtron/optim/muon.py`), which deals matrices out to ranks that orthogonalize them."""

import math
from dataclasses import dataclass

from dtron.optim.muon import BATCH_BYTES, BUCKET_BYTES
from dtron.plan.hardware import Constants, Hardware
from dtron.plan.layout import Layout, Sizes
from dtron.plan.matmul import matmul_s
from dtron.plan.network import Group, message_s

__all__ = ["muon_s", "newton_schulz_s"]

# Of each parameter of a rank, operation by operation: momentum 36 (lerp 12, copy 8, Nesterov's lerp 12, cast 4), update
# 26 (decay 8, sum 10, copy 8), to and from what is sent 8, norm 4.
BYTES = 74
KERNELS = 12  # of each matrix, or stack of whole experts, on each rank that has a part of it


def newton_schulz_s(m: int, n: int, steps: int, hw: Hardware, c: Constants) -> float:
    """Of a matrix m x n: in each step x @ x.T, its square, and that by x, m the shorter side."""
    m, n = sorted((m, n))
    return steps * (matmul_s(m, m, n, hw, c) + matmul_s(m, m, m, hw, c) + matmul_s(m, n, m, hw, c))


@dataclass(frozen=True)
class _Family:
    """`times` of each of `matrices`, each sharded over `ranks` ranks; pieces: in how many parts a rank has them."""

    matrices: list[tuple[int, int]]
    times: float
    ranks: int
    group: Group
    pieces: float


def _families(s: Sizes, a: Layout, hw: Hardware) -> list[_Family]:
    layers, shards = s.layers / a.pp, a.dp_shard * a.cp
    kv, heads = s.kv_heads * s.head_size, s.heads * s.head_size
    matrices, ffn = [(s.dim, heads)] * 2 + [(s.dim, kv)] * 2, [(s.dim, s.ffn)] * s.matrices
    matrices += [(s.dim, s.experts)] if s.experts else ffn
    matrices += [(s.dim, s.shared)] * 3 if s.shared else []
    ranks = a.tp * shards
    found = [_Family(matrices, layers, ranks, Group.of(ranks, 1, hw.gpus_per_node), layers * len(matrices))]
    if s.experts:
        # Whole experts are sharded over ranks where there are as many on each rank of ep, and stay there as a stack.
        here, spread = s.experts // a.ep, a.tp * shards // a.ep
        each, over = (here / spread, 1) if here >= spread else (here, spread)
        pieces = layers * len(ffn) * (1 if over == a.dp_replicate == 1 else each)
        found.append(_Family(ffn, layers * each, over, Group.of(over, a.ep, hw.gpus_per_node), pieces))
    return found


def muon_s(s: Sizes, a: Layout, hw: Hardware, c: Constants) -> float:
    """Of the matrices of a rank's blocks: rounds of a matrix for each rank of a mesh, the largest first, whose shards
    are sent to its owner and back in bf16; HSDP's copies take matrices in turn. While a bucket of them is computed the
    next is on its way, so the longer of both counts, and the other for one bucket. No faster than the host.
    """
    compute = sent = buckets = 0.0
    replicas = Group.of(a.dp_replicate, a.tp * a.dp_shard * a.cp, hw.gpus_per_node)
    for f in _families(s, a, hw):
        owners, rounds, dealt, kernels, own = f.ranks * a.dp_replicate, 0, 0.0, 0.0, 0.0
        work = BYTES * sum(m * n for m, n in f.matrices) * f.times / f.ranks / (hw.memory_rate * c.memory)
        cost = {shape: newton_schulz_s(*shape, a.muon_steps, hw, c) for shape in f.matrices}
        for shape in sorted(f.matrices, key=lambda shape: -cost[shape]):
            # What a round has room for beside larger ones takes no time of its own.
            more = math.ceil(max(0.0, f.times - (rounds * owners - dealt)) / owners)
            size = 2 * shape[0] * shape[1]
            kernels += (3 * a.muon_steps + 6) * math.ceil(more / max(1, BATCH_BYTES // size))
            work, rounds, dealt, own = work + more * cost[shape], rounds + more, dealt + f.times, own + more * size
        compute += max(work, (KERNELS * f.pieces + kernels) * c.launch_s)
        mine = max(1.0, min(own / BUCKET_BYTES, rounds))
        local = sum(m * n for m, n in f.matrices) * f.times / f.ranks
        sent += 2 * message_s(2 * local / a.dp_replicate, f.group, hw, c, messages=mine)
        sent += message_s(2 * local, replicas, hw, c, messages=mine)
        buckets += mine
    return max(compute, sent) + min(compute, sent) / buckets
