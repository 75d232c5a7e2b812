"""From a batch to the model: the arguments of each forward, and the mean loss over a validation set."""

import time
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from dtron.config import Config
from dtron.config.sections import Parallelism
from dtron.data.loader import IGNORE_INDEX, Batch
from dtron.mesh import Mesh
from dtron.parallel.compose import ParallelModel
from dtron.parallel.context import gathered_positions, local_positions

__all__ = ["StopCheck", "local_batches", "mean_loss", "to_device", "to_host"]

LOOK_S = 1.0  # from one look for a requested stop to the next


def local_batches(
    batch: Batch, size: int, p: Parallelism, mesh: Mesh, device: torch.device, gathered_keys: bool = False
) -> list[tuple[Tensor, ...]]:
    """The arguments of each forward, on the device: tokens, labels, positions [size, S / cp].

    Under document masks also document_start [size, S / cp] and, with gathered_keys (see `ParallelModel`), keys
    [size, 2, S]; with these document_start is always given, all 0 without document masks.
    """
    cp, (tokens, labels, document_start, _) = mesh.degrees.cp, batch
    rows, length = tokens.shape
    head_tail = bool(p.context_parallel_load_balancer)
    positions = local_positions(length, mesh.cp_rank, cp, head_tail)
    if gathered_keys and document_start is None:
        document_start = torch.zeros_like(tokens)
    arguments = [tokens, labels] if document_start is None else [tokens, labels, document_start]
    if cp > 1:  # a copy, which is not made without need: memory that the loader pinned stays pinned
        arguments = [t[:, positions] for t in arguments]
        if document_start is not None:
            everywhere = gathered_positions(length, cp, head_tail)
            arguments.append(torch.stack((document_start[:, everywhere], everywhere.expand(rows, -1)), 1))
    tokens, labels, *extra_inputs = (to_device(t, device) for t in arguments)
    forwards = (tokens, labels, to_device(positions, device).expand(rows, -1), *extra_inputs)
    return list(zip(*(t.split(size) for t in forwards), strict=True))


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """`host`, in CPU memory, on the device, without waiting: copies from memory that is not pinned would."""
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


def to_host(*device_tensors: Tensor) -> list[Tensor]:
    """Their values in CPU memory, in float64. The host waits for the device once for all of them."""
    flat = torch.cat([t.double().flatten() for t in device_tensors]).cpu()
    parts = flat.split([t.numel() for t in device_tensors])
    return [part.view(t.shape) for part, t in zip(parts, device_tensors, strict=True)]


def mean_loss(
    model: ParallelModel, batches: Iterable[Batch], config: Config, mesh: Mesh, device: torch.device,
    after_batch: Callable[[Tensor], bool],
) -> tuple[float, int] | None:  # fmt: skip
    """(nats per token, tokens) over the labels that count in all `batches`, a validation set's, on every rank.

    after_batch: is given this rank's share of [summed loss, tokens] so far, and says, on all ranks alike, whether to
    stop: then None.
    """
    d = mesh.degrees
    model.loss.valid_tokens = torch.ones((), device=device)
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in batches:
        total[1] += (batch.labels != IGNORE_INDEX).sum().double() / (d.world // d.dp)
        size, p = config.validation.local_batch_size, config.parallelism
        for arguments in local_batches(batch, size, p, mesh, device, model.gathered_keys):
            total[0] += model.evaluate(*arguments) / d.tp
        if after_batch(total):
            return None
    dist.all_reduce(total)
    loss, count = total.tolist()
    return loss / count, round(count)


class StopCheck:
    """Whether a stop was requested on some rank; called after each batch of an evaluation, on every rank.

    The ranks look together, about once in `LOOK_S` by the slowest one's clock: a look at every batch would make a GPU
    wait for its host.
    """

    def __init__(self, requested: Callable[[], bool]) -> None:
        self._requested = requested
        self._done = self._looked = 0
        self._next, self._since = 1, time.perf_counter()

    def __call__(self, total: Tensor) -> bool:
        """total: see `mean_loss`."""
        self._done += 1
        if self._done < self._next:
            return False
        seen = total.new_tensor([self._requested(), time.perf_counter() - self._since])
        dist.all_reduce(seen, dist.ReduceOp.MAX)
        stop, seconds = seen.tolist()
        in_time = int(LOOK_S * (self._done - self._looked) / max(seconds, 1e-6))  # batches
        self._next = self._done + max(1, min(self._done, in_time))  # at most twice as many: early ones mislead
        self._looked, self._since = self._done, time.perf_counter()
        return stop > 0
