"""Two contestants that take turns: what step.py and moe.py measure of a training step.

Not a program: see step.py.
"""

import contextlib
import dataclasses
import gc
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from watch import watch, watch_cpu

from dtron.cluster.preflight.measure import MATMUL_SIZE, Timer
from dtron.observe.device import max_memory_bytes, reset_max_memory
from dtron.ranks.world import World

__all__ = ["Contestant", "Figures", "Step", "compete", "matmul_rate", "median_ratio"]

Step = Callable[[], torch.Tensor]  # one optimizer step; returns the loss of the global batch


@dataclasses.dataclass
class Figures:
    """Of one contestant: for each block, wall seconds and CPU seconds (of all ranks) per step; the most memory of any
    rank.

    max_memory_bytes is reserved by torch's allocator on CUDA, of which allocated_bytes were in use at the peak, after
    `retries` of failed allocations; on CPU it is resident in the process. watched: of --bench.profile.
    """

    step_s: list[float] = dataclasses.field(default_factory=list)
    step_cpu_s: list[float] = dataclasses.field(default_factory=list)
    max_memory_bytes: int = 0
    allocated_bytes: int | None = None
    retries: int | None = None
    first_loss: float | None = None
    first_step_s: float | None = None
    watched: dict[str, Any] | None = None
    error: str | None = None


class Contestant:
    """One of the two, built when it is needed. alone: on this rank only, so that nothing waits for the others."""

    def __init__(self, build: Callable[[], Step], device: torch.device, options: Any, alone: bool = False) -> None:
        self.figures = Figures()
        self._build, self._device, self._options, self._alone = build, device, options, alone
        self._step: Step | None = None

    def start(self) -> None:
        """Build and warm up; running out of memory is a result too."""
        torch.compiler.reset()  # else the blocks of every build would fill one cache of compiled code, up to its limit
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        _forget_peak(self._device)
        with self._memory_errors():
            self._step = self._build()
            began = time.perf_counter()
            loss = self._step().item()
            self.figures.first_loss = loss
            self.figures.first_step_s = time.perf_counter() - began
            for _ in range(self._options.warmup - 1):
                self._step()

    def block(self) -> None:
        """Time a block of steps."""
        if self.figures.error or self._step is None:
            return
        with self._memory_errors():
            self._wait()
            began, cpu_began = time.perf_counter(), time.process_time()
            for _ in range(self._options.steps):
                self._step()
            cpu_s = (time.process_time() - cpu_began) / self._options.steps
            self._wait()
            self.figures.step_s.append((time.perf_counter() - began) / self._options.steps)
            self.figures.step_cpu_s.append(self._over_ranks(cpu_s, dist.ReduceOp.SUM))

    def finish(self) -> None:
        """Watch a step if asked to, note the memory, and free everything."""
        if self._options.profile and self._step is not None:
            self._note_memory()  # before the profiler's own
            cuda = self._device.type == "cuda"
            self.figures.watched = watch(self._step, self._device) if cuda else watch_cpu(self._step)
        self._note_memory()
        self._step = None

    def _note_memory(self) -> None:
        figures, device = self.figures, self._device
        if figures.watched is not None:
            return
        most = self._over_ranks(float(max_memory_bytes(device)), dist.ReduceOp.MAX)
        figures.max_memory_bytes = max(figures.max_memory_bytes, int(most))
        if device.type == "cuda":
            counts = torch.cuda.memory_stats(device)
            figures.allocated_bytes = max(figures.allocated_bytes or 0, torch.cuda.max_memory_allocated(device))
            figures.retries = max(figures.retries or 0, counts["num_alloc_retries"])

    def _over_ranks(self, mine: float, op: Any) -> float:
        if self._alone:
            return mine
        value = torch.tensor(mine, dtype=torch.float64, device=self._device)
        dist.all_reduce(value, op)
        return value.item()

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        if not self._alone:
            dist.barrier()

    @contextlib.contextmanager
    def _memory_errors(self) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError:
            self.figures.error, self._step = "out of memory", None


def _forget_peak(device: torch.device) -> None:
    """Start counting the memory peak anew; on a CPU only Linux can."""
    reset_max_memory(device)
    if device.type == "cpu" and os.path.exists("/proc/self/clear_refs"):
        Path("/proc/self/clear_refs").write_text("5")  # "Peak RSS": proc(5)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of square products, the best of 5 blocks: the ceiling of what a step can reach on this machine."""
    n = MATMUL_SIZE[device.type]
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    timer, calls = Timer(device), 10
    timer.elapsed(lambda: a @ b, calls)
    return 2 * n**3 * calls / min(timer.elapsed(lambda: a @ b, calls).wall_s for _ in range(5))


def compete(contestants: dict[str, Contestant], world: World, rounds: int) -> None:
    """Let them take turns, and fill in their figures. They are built anew for each turn where two share one device."""
    rebuilt = len(contestants) > 1 and world.size == 1
    for turn in range(rounds):
        for name in list(contestants) if turn % 2 == 0 else reversed(contestants):
            contestant = contestants[name]
            if turn == 0 or rebuilt:
                contestant.start()
            dist.barrier()  # rank 0 may be alone with the plain loop, and the others wait
            contestant.block()
            dist.barrier()
            if turn == rounds - 1 or rebuilt:
                contestant.finish()


def median_ratio(figures: dict[str, Figures], field: str, inverse: bool = False) -> float | None:
    """Median over the rounds of dtron's figure over the plain loop's; None without both."""
    if len(figures) < 2:
        return None
    pairs = zip(getattr(figures["dtron"], field), getattr(figures["plain"], field), strict=False)
    ratios = [plain / ours if inverse else ours / plain for ours, plain in pairs if plain]
    return statistics.median(ratios) if ratios else None
