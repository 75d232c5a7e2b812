"""Saving: every rank its own shards, through torch.distributed.checkpoint (DCP), in the background or not.

The names know no layout: `model.<parameter>` and `optimizer.<parameter>.<state>`, as in the plain model; the second
copy of a tied parameter is saved under the first one's name. A checkpoint gets its final name when the files of all
ranks and the manifest with their checksums are on disk; a save that fails on any rank leaves nothing behind.
"""

import copy
import time
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future as TorchFuture

from dtron import compat
from dtron.checkpoint.files import MANIFEST, Manifest, Progress, delete_old
from dtron.checkpoint.storage import StoragePath
from dtron.config.sections import Checkpoint
from dtron.errors import UserError
from dtron.parallel.compose import ParallelModel

__all__ = ["Saved", "Saver", "check_optimizer_state", "first_error", "named_tensors", "reason", "write_checkpoint"]

SAVE_TIMEOUT = timedelta(hours=2)  # ranks wait for the one with the slowest disk


@dataclass
class Saved:
    """How a save ended. `stall_s`: training stalled for; `save_s`: until all was durable; `error`: why it failed."""

    step: int
    stall_s: float
    save_s: float = 0.0
    bytes: int = 0
    error: str = ""
    warnings: tuple[str, ...] = ()


def named_tensors(
    model: ParallelModel, optimizers: list[torch.optim.Optimizer] | None
) -> Iterator[tuple[str, Tensor, torch.nn.Parameter]]:
    """Every tensor to save under its layout-free name, and its parameter; copies of a tied one have the same name."""
    for name, p in model.named_parameters():
        canonical = model.aliases.get(name, name)
        yield f"model.{canonical}", p.detach(), p
        for optimizer in optimizers or ():
            for key, value in optimizer.state.get(p, {}).items():
                if isinstance(value, Tensor):
                    yield f"optimizer.{canonical}.{key}", value, p


def check_optimizer_state(model: ParallelModel, optimizers: list[torch.optim.Optimizer]) -> None:
    """UserError if an optimizer keeps state that a checkpoint does not hold: all but tensors, and None."""
    for name, p in model.named_parameters():
        for optimizer in optimizers:
            for key, value in optimizer.state.get(p, {}).items():
                if not isinstance(value, Tensor | None):
                    raise UserError(
                        f"{type(optimizer).__name__} keeps {key} = {value!r} ({type(value).__name__}) for {name}, and "
                        "checkpoints hold tensors only: a resume would lose it; let the optimizer keep it as a tensor, "
                        "or set checkpoint.enable = false"
                    )


class Saver:
    """Writes the checkpoints of one run into `folder`, one at a time. Make it, and call it, on all ranks alike.

    assets: files for every checkpoint, by name; those of rank 0 count.
    """

    def __init__(self, folder: StoragePath, config: Checkpoint, assets: Mapping[str, bytes] | None = None) -> None:
        self._folder, self._config, self._assets = folder, config, assets or {}
        # Saves communicate through a group of their own: in the background, and with all the time that disks need.
        self._group = dist.new_group(backend="gloo", timeout=SAVE_TIMEOUT, group_desc=compat.OWN_TIMEOUT)
        self._background = config.async_mode != "disabled"
        self._copies = _Copies(pinned=config.async_mode == "async_with_pinned_mem")
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: tuple[Saved, Future[tuple[int, float, list[str]]]] | None = None

    @property
    def busy(self) -> bool:
        """A save is being written."""
        return self._pending is not None and not self._pending[1].done()

    def save(
        self, model: ParallelModel, optimizers: list[torch.optim.Optimizer] | None, progress: Progress
    ) -> list[Saved]:
        """Save; optimizers None: weights only. Returns what became of the save before, and of this one if it is over.

        A save that is still running is waited for. In the background this one continues after the return, from copies.
        """
        ended = self.wait()
        began = time.perf_counter()
        tensors = {name: tensor for name, tensor, _ in reversed(list(named_tensors(model, optimizers)))}
        manifest = Manifest(copy.deepcopy(progress), {})
        manifest.progress.model_only = optimizers is None
        if self._background:
            tensors = self._copies.take(tensors)
        future = self._thread.submit(self._write, tensors, manifest)
        saved = Saved(progress.step, 0.0)
        self._pending = saved, future
        if not self._background:
            future.exception()
        saved.stall_s = time.perf_counter() - began
        return [*ended, *self.poll()]

    def before_update(self) -> None:
        """Call before weights change: on a GPU, the update waits (the host does not) for copies still being made."""
        self._copies.before_update()

    def poll(self) -> list[Saved]:
        """What became of a save that is over, once; no waiting."""
        return [] if self.busy else self.wait()

    def wait(self) -> list[Saved]:
        """Wait for a save that is still running: what became of it."""
        if self._pending is None:
            return []
        (saved, future), self._pending = self._pending, None
        began = time.perf_counter()
        try:
            saved.bytes, saved.save_s, warnings = future.result()
            saved.warnings = tuple(warnings)
        # Whatever went wrong, the training continues and the user is warned. DCP's own error is no Exception.
        except (Exception, CheckpointException) as error:
            saved.error = reason(error)
        saved.stall_s += time.perf_counter() - began
        return [saved]

    def _write(self, tensors: dict[str, Tensor], manifest: Manifest) -> tuple[int, float, list[str]]:
        """On the background thread of every rank: (bytes in all, seconds, warnings)."""
        began = time.perf_counter()
        self._copies.finish()
        final = self._folder / f"step-{manifest.progress.step}"
        write_checkpoint(final, tensors, manifest, self._assets, self._group)
        warnings: list[str] = []
        if dist.get_rank() == 0:
            try:
                warnings = delete_old(self._folder, self._config.keep_latest_k, self._config.keep_every_n_steps)
            except (OSError, UserError) as error:  # the new checkpoint is whole all the same
                warnings = [f"old checkpoints in {self._folder} were not deleted: {error}"]
        return sum(size for size, _ in manifest.files.values()), time.perf_counter() - began, warnings


def write_checkpoint(
    final: StoragePath,
    tensors: dict[str, Tensor],
    manifest: Manifest,
    assets: Mapping[str, bytes],
    group: dist.ProcessGroup | None = None,
) -> None:
    """Write one checkpoint, on all ranks of `group`. A local one that fails leaves nothing behind."""
    partial = final
    if final.local:
        partial = final.parent / f"{final.name}.partial-{manifest.progress.attempt}"
    try:
        dcp.save(tensors, storage_writer=_writer(partial, final, manifest, assets), process_group=group)
    except BaseException:
        if dist.get_rank() == 0 and final.local and partial.exists():
            partial.remove()  # all ranks have stopped writing; a full disk is to have its space back
        raise


class _Copies:
    """The state as it was when it was taken, in CPU memory that is allocated once."""

    def __init__(self, pinned: bool) -> None:
        self._pinned = pinned and torch.cuda.is_available()
        self._buffers: dict[str, Tensor] = {}
        self._stream = torch.cuda.Stream() if self._pinned else None
        self._copied: torch.cuda.Event | None = None

    @torch.no_grad()
    def take(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copies of all local shards. In pinned memory they are complete only after `finish`."""
        if self._stream is None:
            return {name: self._copy(name, tensor) for name, tensor in tensors.items()}
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            copies = {name: self._copy(name, tensor) for name, tensor in tensors.items()}
            self._copied = self._stream.record_event()
        return copies

    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        shard = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if name not in self._buffers:
            pinned = self._pinned and shard.is_cuda
            self._buffers[name] = torch.empty_like(shard, device="cpu", pin_memory=pinned)
        buffer = self._buffers[name].copy_(shard, non_blocking=self._pinned)
        return compat.copy_of_dtensor(tensor, buffer) if isinstance(tensor, DTensor) else buffer

    def before_update(self) -> None:
        if self._copied is not None:
            torch.cuda.current_stream().wait_event(self._copied)

    def finish(self) -> None:
        """Wait, on the background thread, until the copies are complete."""
        if self._copied is not None:
            self._copied.synchronize()


@dataclass(frozen=True)
class _Written(WriteResult):
    """What DCP reports to its coordinator of each tensor, and of the file that holds it: bytes and CRC-32."""

    file: str
    file_bytes: int
    crc32: int


class _Verified:
    """Of a DCP writer: read back and sum up what was written; the coordinator writes the manifest, then the name."""

    partial: StoragePath
    final: StoragePath
    manifest: Manifest
    assets: Mapping[str, bytes]

    def write_data(self, plan: Any, planner: Any) -> TorchFuture[list[WriteResult]]:
        try:
            results = super().write_data(plan, planner).wait()  # type: ignore[misc]
        except RuntimeError as error:
            raise _of_the_disk(error) from None
        names = {result.storage_data.relative_path for result in results}
        sums = {name: ((self.partial / name).size(), (self.partial / name).crc32()) for name in names}
        future: TorchFuture[list[WriteResult]] = TorchFuture()
        future.set_result([
            _Written(r.index, r.size_in_bytes, r.storage_data, name, *sums[name])
            for r in results
            for name in [r.storage_data.relative_path]
        ])  # fmt: skip
        return future

    def finish(self, metadata: Any, results: list[list[_Written]]) -> None:
        super().finish(metadata, results)  # type: ignore[misc]
        files = {r.file: (r.file_bytes, r.crc32) for written in results for r in written}
        if lost := [name for name, (size, _) in files.items() if not self._is_here(name, size)]:
            raise OSError(
                f"{lost[0]}, which another rank has written, cannot be seen from rank 0: checkpoints need a folder "
                "that all machines share"
            )
        for name, content in self.assets.items():
            (self.partial / name).write(content)
            files[name] = len(content), zlib.crc32(content)
        files[".metadata"] = (self.partial / ".metadata").size(), (self.partial / ".metadata").crc32()
        self.manifest.files = files
        (self.partial / MANIFEST).write(self.manifest.to_json())
        if self.partial != self.final:
            self.partial.sync()
            self.partial.move(self.final)
            self.final.parent.sync()

    def _is_here(self, name: str, size: int) -> bool:
        file = self.partial / name
        return file.exists() and file.size() == size


class _LocalWriter(_Verified, dcp.FileSystemWriter):  # type: ignore[misc]
    pass


class _UrlWriter(_Verified, compat.FsspecWriter):  # type: ignore[misc]
    pass


def _writer(partial: StoragePath, final: StoragePath, manifest: Manifest, assets: Mapping[str, bytes]) -> Any:
    writer: Any = _LocalWriter(str(partial.local)) if partial.local else _UrlWriter(partial.url)
    writer.partial, writer.final, writer.manifest, writer.assets = partial, final, manifest, assets
    return writer


def _of_the_disk(error: BaseException) -> BaseException:
    """What the disk said, where torch.save then said "unexpected pos": sent to others, errors lose their context."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    return cause or error


def first_error(error: BaseException) -> BaseException:
    """Of DCP's summary, the error of the first rank."""
    failures = getattr(error, "failures", None)
    return failures[min(failures)][0] if failures else error


def reason(error: BaseException) -> str:
    """One line: of DCP's summary the first rank's error."""
    first, rank = first_error(error), min(getattr(error, "failures", None) or [None])
    if isinstance(first, UserError):
        return str(first)
    where = "" if rank is None else f"rank {rank}: "
    return f"{where}{type(first).__name__}: {first}".splitlines()[0]
