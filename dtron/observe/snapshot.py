"""Memory snapshots: every allocation and free of CUDA memory in the last steps, for pytorch.org/memory_viz."""

import logging
from pathlib import Path

import torch

from dtron.compat import tracing
from dtron.config.sections import Profiling

__all__ = ["MemorySnapshots"]

log = logging.getLogger(__name__)

MAX_ENTRIES = 100_000  # allocations and frees that are kept, as in torchtitan; a step of 8B has some 30,000


class MemorySnapshots:
    """A context whose `.step()` follows the optimizer steps; does nothing if `profiling.enable_memory_snapshot` is off.

    Every `profile_freq` steps a snapshot lands in
    `run_folder/save_memory_snapshot_folder/iteration_N/rank_R.pickle`, and one in `iteration_N_oom` where step N ran
    out of memory. `steps_done`: steps before this attempt began. On a CPU, which has no such record, rank 0 says so.
    """

    def __init__(
        self, config: Profiling, run_folder: Path | str, rank: int, device: torch.device, *, steps_done: int = 0
    ) -> None:
        self._on = config.enable_memory_snapshot and device.type == "cuda"
        if config.enable_memory_snapshot and not self._on and rank == 0:
            log.warning(
                "profiling.enable_memory_snapshot = true has no effect: snapshots are of CUDA memory, and this run is "
                "on a CPU"
            )
        self._folder = Path(run_folder) / config.save_memory_snapshot_folder
        self._freq, self._rank, self._step = config.profile_freq, rank, steps_done

    def __enter__(self) -> "MemorySnapshots":
        if self._on:
            tracing.record_memory_history(MAX_ENTRIES)
        return self

    def step(self) -> None:
        """An optimizer step is done."""
        self._step += 1
        if self._on and self._step % self._freq == 0:
            self._write(f"iteration_{self._step}")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self._on:
            if isinstance(error, torch.OutOfMemoryError):
                self._write(f"iteration_{self._step + 1}_oom")
            tracing.record_memory_history(None)

    def _write(self, name: str) -> None:
        file = self._folder / name / f"rank_{self._rank}.pickle"
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            tracing.dump_memory_snapshot(str(file))
        except OSError as problem:
            log.warning("the memory snapshot %s could not be written: %s; the training continues", file, problem)
