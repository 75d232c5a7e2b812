"""The time of a step of Muon (`dtron/optim/muon.py`), which deals matrices out to ranks that orthogonalize them."""

from dtron.plan.hardware import Constants, Hardware
from dtron.plan.layout import Layout, Sizes
from dtron.plan.matmul import matmul_s
from dtron.plan.network import Group, message_s

__all__ = ["muon_s", "newton_schulz_s"]

# Of each parameter of a rank, operation by operation: momentum 36 (lerp 12, copy 8, Nesterov's lerp 12, cast 4), update
# 26 (decay 8, sum 10, copy 8), to and from what is sent 8, norm 4.
BYTES = 74
KERNELS = 12  # of each matrix, on each rank that has a part of it


def newton_schulz_s(m: int, n: int, steps: int, hw: Hardware, c: Constants) -> float:
    """Of a matrix m x n: in each step x @ x.T, its square, and that by x, m the shorter side."""
    m, n = sorted((m, n))
    return steps * (matmul_s(m, m, n, hw, c) + matmul_s(m, m, m, hw, c) + matmul_s(m, n, m, hw, c))


def muon_s(s: Sizes, a: Layout, hw: Hardware, c: Constants) -> float:
    """Of the matrices of a rank's blocks: rounds of a matrix for each rank of a mesh, the largest first, whose shards
    are sent to its owner and back in bf16; HSDP's copies take matrices in turn. No faster than the host.
    """
    layers, shards = s.layers / a.pp, a.dp_shard * a.cp
    kv, heads = s.kv_heads * s.head_size, s.heads * s.head_size
    matrices = [(s.dim, heads)] * 2 + [(s.dim, kv)] * 2
    ffn = [(s.dim, s.ffn)] * s.matrices
    matrices += [] if s.experts else ffn
    matrices += [(s.dim, s.shared)] * 3 if s.shared else []
    matrices += [(s.dim, s.experts)] if s.experts else []
    found = _family_s(matrices, layers, a.tp * shards, Group.of(a.tp * shards, 1, hw.gpus_per_node), a, hw, c)
    if s.experts:
        # Whole experts are sharded over ranks where there are as many on each rank of ep; what is whole is not sent.
        here, spread = s.experts // a.ep, a.tp * shards // a.ep
        each, ranks = (here / spread, 1) if here >= spread else (here, spread)
        found += _family_s(ffn, layers * each, ranks, Group.of(ranks, a.ep, hw.gpus_per_node), a, hw, c)
    return found


def _family_s(
    matrices: list[tuple[int, int]], times: float, ranks: int, group: Group, a: Layout, hw: Hardware, c: Constants
) -> float:
    """`times` of each of `matrices`, each sharded over `ranks` ranks, with a copy on each of HSDP's."""
    owners, dealt = ranks * a.dp_replicate, 0.0
    compute, rounds = 0.0, 0.0
    cost = {shape: newton_schulz_s(*shape, a.muon_steps, hw, c) for shape in matrices}
    for shape in sorted(matrices, key=lambda shape: -cost[shape]):
        # What a round has room for beside larger ones takes no time of its own.
        started = max(0.0, times - (rounds * owners - dealt)) / owners
        started = float(-(-started // 1))
        compute, rounds, dealt = compute + started * cost[shape], rounds + started, dealt + times
    local = sum(m * n for m, n in matrices) * times / ranks
    replicas = Group.of(a.dp_replicate, a.tp * a.dp_shard * a.cp, hw.gpus_per_node)
    sent = 2 * message_s(2 * local / a.dp_replicate, group, hw, c, messages=rounds)
    sent += message_s(2 * local, replicas, hw, c, messages=rounds)
    moved = BYTES * local / (hw.memory_rate * c.memory)
    return max(compute + moved, KERNELS * len(matrices) * times * c.launch_s) + sent
