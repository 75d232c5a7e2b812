"""What a rank measures: its matmul and memory rates, its groups' collectives, and the links to its neighbours.

Each figure has a time budget: the number of calls and the message sizes follow from the duration of the first call.
Ranks that measure together use the slowest one's duration, so that all make the same calls.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from dtron import compat
from dtron.cluster.preflight.guard import Guard
from dtron.mesh import Mesh

__all__ = ["Dimension", "Elapsed", "Meter", "Timer", "bus_factor", "dimensions", "link_rounds"]

BLOCKS = 5  # the median of this many blocks is taken, so that a pause in one of them does not count
MAX_CALLS = 200  # per block
RATE_BUDGET_S = 0.6  # for the matmul, and for the memory copy
MESSAGE_BUDGET_S = 0.12  # for a collective, or a round of links, at one size
MAX_CALL_S = 0.25  # a message that would take longer is not sent
MIN_BYTES = 4  # its time is the latency
MESSAGE_BYTES = {
    "cpu": (MIN_BYTES, 64 << 10, 1 << 20, 16 << 20),
    "cuda": (MIN_BYTES, 64 << 10, 1 << 20, 16 << 20, 256 << 20),
}
MATMUL_SIZE = {"cpu": 512, "cuda": 8192}  # rows and columns
COPY_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
OPS = ("all_reduce", "all_gather")


def bus_factor(op: str, ranks: int) -> float:
    """Bus bandwidth divided by bytes per second: the traffic of the slowest link, comparable across numbers of ranks.

    NCCL-tests, doc/PERFORMANCE.md: 2(n-1)/n for all-reduce, (n-1)/n for all-gather, whose bytes are those gathered, and
    1 for send/recv.
    """
    return {"all_reduce": 2 * (ranks - 1) / ranks, "all_gather": (ranks - 1) / ranks, "send_recv": 1.0}[op]


class Elapsed(NamedTuple):
    """Wall-clock seconds and CPU seconds; on CUDA both are the device's time."""

    wall_s: float
    cpu_s: float


class Timer:
    """Times work on a device: with the clock on CPU, with CUDA events on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def elapsed(self, run: Callable[[], Any], calls: int) -> Elapsed:
        """Time of `calls` consecutive calls, synchronized once at the end."""
        if self._cuda:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            for _ in range(calls):
                run()
            end.record()
            end.synchronize()
            return Elapsed(begin.elapsed_time(end) / 1e3, begin.elapsed_time(end) / 1e3)
        start, cpu_start = time.perf_counter(), time.process_time()
        for _ in range(calls):
            run()
        return Elapsed(time.perf_counter() - start, time.process_time() - cpu_start)


@dataclass(frozen=True)
class Dimension:
    """Names of the mesh dimensions with this group (tp; or world and dp_shard_cp), the group and its ranks."""

    names: tuple[str, ...]
    group: dist.ProcessGroup
    ranks: list[int]


def dimensions(mesh: Mesh) -> list[Dimension]:
    """This rank's groups of more than one rank, the world last; dimensions of the same ranks are measured once."""
    d = mesh.degrees
    groups: dict[str, Any] = {}
    if d.pp > 1:
        groups["pp"] = mesh.pp.get_group()
    if d.dp_replicate > 1:
        groups["dp_replicate"] = mesh.fsdp.get_group("dp_replicate")
    if d.dp_shard * d.cp > 1:
        groups["dp_shard_cp"] = mesh.fsdp.get_group("dp_shard_cp")
    if mesh.cp is not None:
        groups["cp"] = mesh.cp.get_group()
    if d.tp > 1:
        groups["tp"] = mesh.tp.get_group()
    if d.world > 1:
        groups["world"] = dist.group.WORLD
    found: dict[tuple[int, ...], list[str]] = {}
    for name, group in groups.items():
        found.setdefault(tuple(dist.get_process_group_ranks(group)), []).append(name)
    return [Dimension(tuple(names), groups[names[0]], list(ranks)) for ranks, names in found.items()]


def link_rounds(ranks: Sequence[int], machine_of: Sequence[int], in_order: bool) -> list[list[tuple[int, int]]]:
    """The pairs of a group that exchange messages, in rounds in which every rank has at most one partner.

    Neighbours in the ring of the group. A group with several ranks on each of several machines has a ring within each
    machine, and one across the machines per local rank, so that every network card is used; not if in_order, as a
    pipeline sends from rank to rank.
    """
    by_machine: dict[int, list[int]] = {}
    for rank in ranks:
        by_machine.setdefault(machine_of[rank], []).append(rank)
    parts = list(by_machine.values())
    if in_order or len(parts) == 1 or len(parts[0]) == 1 or len({len(part) for part in parts}) > 1:
        return _ring(ranks)
    inside, across = [_ring(part) for part in parts], [_ring(rail) for rail in zip(*parts, strict=True)]
    return [[pair for ring in rings for pair in ring[i]] for rings in (inside, across) for i in range(len(rings[0]))]


def _ring(ranks: Sequence[int]) -> list[list[tuple[int, int]]]:
    if len(ranks) == 2:
        return [[(ranks[0], ranks[1])]]
    pairs = [(rank, ranks[(i + 1) % len(ranks)]) for i, rank in enumerate(ranks)]
    last = [pairs.pop()] if len(ranks) % 2 else []
    return [part for part in (pairs[::2], pairs[1::2], last) if part]


class Meter:
    """Measures on one rank of an initialized process group, or on a single process without one."""

    def __init__(self, device: torch.device, guard: Guard, timer: Timer | None = None) -> None:
        self._device, self._guard, self._timer = device, guard, timer or Timer(device)
        self._distributed = dist.is_initialized() and dist.get_world_size() > 1

    def matmul(self, dtype: torch.dtype) -> dict[str, float]:
        """matmul_flops_per_s of square matrices; matmul_flops_per_cpu_s, which does not depend on shared cores."""
        n = MATMUL_SIZE[self._device.type]
        a, b, c = (torch.randn(n, n, device=self._device).to(dtype) for _ in range(3))
        wall_s, cpu_s = self._time_locally(lambda: torch.mm(a, b, out=c))
        return {"matmul_flops_per_s": 2 * n**3 / wall_s, "matmul_flops_per_cpu_s": 2 * n**3 / cpu_s}

    def memory(self) -> dict[str, float]:
        """memory_bytes_per_s of a copy, bytes read and written both counted, as STREAM does; memory_bytes_per_cpu_s.

        The copy may fit into the caches of some CPUs.
        """
        size = COPY_BYTES[self._device.type]
        if self._device.type == "cuda":
            size = min(size, torch.cuda.mem_get_info(self._device)[0] // 4)
        source, target = (torch.ones(max(1, size // 4), device=self._device) for _ in range(2))
        wall_s, cpu_s = self._time_locally(lambda: target.copy_(source))
        return {"memory_bytes_per_s": 2 * source.nbytes / wall_s, "memory_bytes_per_cpu_s": 2 * source.nbytes / cpu_s}

    def _time_locally(self, run: Callable[[], Any]) -> Elapsed:
        """Per call, after a warm-up: a kernel's first use is slow, and so is the clock of an idle device."""
        self._timer.elapsed(run, 1)
        calls = self._calls(self._timer.elapsed(run, 1).wall_s, RATE_BUDGET_S)
        self._timer.elapsed(run, calls)
        return self._median(run, calls)

    def collective(self, op: str, dimension: Dimension) -> list[dict[str, float]]:
        """bytes and seconds per call at every measured size; for all_gather, the bytes gathered."""
        n, group = len(dimension.ranks), dimension.group

        def prepare(size: int) -> tuple[int, Callable[[], Any]]:
            if op == "all_reduce":
                whole = torch.zeros(size // 4, device=self._device)
                return size, lambda: dist.all_reduce(whole, group=group)
            part = torch.zeros(-(-size // (4 * n)), device=self._device)
            whole = torch.zeros(n * part.numel(), device=self._device)
            return whole.nbytes, lambda: compat.all_gather_single(whole, part, group=group)

        return self._sizes(f"{op} in {' = '.join(dimension.names)}", dimension.ranks, prepare)

    def links(self, dimension: Dimension, machine_of: Sequence[int]) -> list[dict[str, Any]]:
        """ranks (the pair) and sizes, as `collective` returns them, of messages in both directions at once.

        As in a pipeline's schedule: a batch of one isend and one irecv.
        """
        rounds = link_rounds(dimension.ranks, machine_of, in_order="pp" in dimension.names)
        mine = dist.get_rank()
        found = []
        for i in range(round(self._max_over_ranks(len(rounds)))):
            pair = next((pair for pair in rounds[i] if mine in pair), None) if i < len(rounds) else None
            sizes = self._link(pair, mine, dimension)
            if pair is not None:
                found.append({"ranks": list(pair), "sizes": sizes})
        return found

    def _link(self, pair: tuple[int, int] | None, mine: int, dimension: Dimension) -> list[dict[str, float]]:
        what = f"send/recv in {' = '.join(dimension.names)}"
        if pair is None:  # the others measure
            return self._sizes(what, [], lambda size: (size, lambda: None))
        peer = pair[0] if mine == pair[1] else pair[1]

        def prepare(size: int) -> tuple[int, Callable[[], Any]]:
            out, into = (torch.zeros(size // 4, device=self._device) for _ in range(2))

            def exchange() -> None:
                both = [
                    dist.P2POp(dist.isend, out, peer, dimension.group),
                    dist.P2POp(dist.irecv, into, peer, dimension.group),
                ]
                for work in dist.batch_isend_irecv(both):
                    work.wait()

            return size, exchange

        return self._sizes(what, list(pair), prepare)

    def _sizes(
        self, what: str, ranks: list[int], prepare: Callable[[int], tuple[int, Callable[[], Any]]]
    ) -> list[dict[str, float]]:
        """prepare: returns the bytes and the call for a size."""
        found: list[dict[str, float]] = []
        last: tuple[int, float] | None = None
        for size in MESSAGE_BYTES[self._device.type]:
            if last is not None and last[0] > MIN_BYTES and last[1] * size / last[0] > MAX_CALL_S:
                break
            counted, run = prepare(size)
            self._guard.set_current(what, ranks)
            self._timer.elapsed(run, 1)  # establishes connections
            once = self._max_over_ranks(self._timer.elapsed(run, 1).wall_s)
            self._guard.set_current(what, ranks)
            found.append({"bytes": counted, "seconds": self._median(run, self._calls(once, MESSAGE_BUDGET_S)).wall_s})
            last = size, once
        return found

    def _calls(self, once_s: float, budget_s: float) -> int:
        """Calls per block; equal on all ranks that pass the same time."""
        return max(1, min(MAX_CALLS, int(budget_s / BLOCKS / max(once_s, 1e-9))))

    def _median(self, run: Callable[[], Any], calls: int) -> Elapsed:
        blocks = [self._timer.elapsed(run, calls) for _ in range(BLOCKS)]
        return Elapsed(*(statistics.median(each) / calls for each in zip(*blocks, strict=True)))

    def _max_over_ranks(self, mine: float) -> float:
        """The maximum over all ranks."""
        if not self._distributed:
            return mine
        self._guard.set_waiting()
        number = torch.tensor(mine, dtype=torch.float32, device=self._device)
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return number.item()
