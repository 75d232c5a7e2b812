"""What differs between ranks, reduced for a row of metrics: memory, the times of phases, who keeps others waiting.

Every rank waits in the two all-reduces of a step over the whole world, of the count of labels before the forward and of
loss and norm after the backward. The rank that comes last waits least: it is the slowest one, and the longest wait of
another says by how much. With pipeline parallel the stages end at different times by design, so only ranks of the first
stage are compared.
"""

import contextlib
import logging
import socket
from typing import Any

import torch
import torch.distributed as dist

from dtron.mesh import Mesh
from dtron.observe.device import memory_statistics
from dtron.observe.phases import Phases
from dtron.ranks.world import World

__all__ = ["WAITS", "Slowest"]

log = logging.getLogger(__name__)

WAITS = ("count labels", "reduce loss and norm")  # the phases that are collectives of the world
TIMED = {"forward-backward": "forward_backward_s", "optimizer": "optimizer_s"}
SHARE, LEAST_S = 0.1, 0.1  # of a step, and seconds: a wait that is worth a line
IN_A_ROW = 5  # logged steps
LONGEST_US = 2**40
RANKS = 2**21


class Slowest:
    """Made on every rank; `reduce` is called on all of them together."""

    def __init__(self, world: World, mesh: Mesh, device: torch.device) -> None:
        self._world, self._device = world, device
        self._compared = world.size > 1 and mesh.pp_rank == 0
        self._last, self._times, self._named = -1, 0, set[int]()
        world.store.set(f"host/{world.rank}", socket.gethostname())

    def reduce(self, phases: Phases) -> dict[str, Any]:
        """Keys of a row: the most of any rank, and `slowest_rank` with `longest_wait_s`; one all-reduce, on the CPU."""
        memory, seconds = memory_statistics(self._device), phases.seconds()
        times = [round(1e6 * seconds.get(name, 0.0)) for name in TIMED]
        wait = min(round(1e6 * sum(seconds.get(name, 0.0) for name in WAITS)), LONGEST_US - 1)
        # Of the ranks' codes the largest is that of the rank that waited least.
        code = (LONGEST_US - wait) * RANKS + self._world.rank if self._compared else 0
        wait = wait if self._compared else 0
        most = torch.tensor([*memory.values(), *times, wait, code], dtype=torch.int64)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        *values, wait, code = most.tolist()
        row: dict[str, Any] = dict(zip(memory, values, strict=False))
        row |= {key: us / 1e6 for key, us in zip(TIMED.values(), values[len(memory) :], strict=True)}
        if self._world.size > 1:
            row |= {"longest_wait_s": wait / 1e6, "slowest_rank": code % RANKS}
        return row

    def warn(self, row: dict[str, Any], step_s: float) -> None:
        """On rank 0: name a rank, once, for which others waited long in several logged steps in a row."""
        if "slowest_rank" not in row or self._world.rank != 0:
            return
        rank, wait_s = row["slowest_rank"], row["longest_wait_s"]
        if wait_s < max(SHARE * step_s, LEAST_S):
            self._last, self._times = -1, 0
            return
        self._last, self._times = rank, self._times + 1 if rank == self._last else 1
        if self._times == IN_A_ROW and rank not in self._named:
            self._named.add(rank)
            log.warning(
                "rank %d on %s is the slowest: others waited up to %.3g s of a step of %.3g s for it, in the last %d "
                "logged steps",
                rank, self._host(rank), wait_s, step_s, IN_A_ROW,
            )  # fmt: skip

    def _host(self, rank: int) -> str:
        with contextlib.suppress(RuntimeError):  # the store has gone, which this is not the place to report
            if self._world.store.check([f"host/{rank}"]):
                return self._world.store.get(f"host/{rank}").decode()
        return "an unknown host"
