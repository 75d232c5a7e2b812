"""A loss or gradient norm that is NaN or infinite stops the run, named by step and rank, without a wait a step."""

import math

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["FiniteCheck"]


class FiniteCheck:
    """Watches each step's [loss, norm], which are equal on all ranks, so all ranks decide alike.

    On CUDA the values are copied to the host while the next step runs and looked at after it; on CPU at once.
    """

    def __init__(self, device: torch.device, world_size: int) -> None:
        self._cuda, self._world_size = device.type == "cuda", world_size
        self._pending: tuple[int, Tensor, Tensor, torch.cuda.Event | None] | None = None

    def watch(self, step: int, stats: Tensor, share: Tensor) -> None:
        """stats: [loss, norm] of `step`; share: this rank's part of the loss, which tells whose it was.

        Raises FloatingPointError for this step on CPU, for the one before on CUDA.
        """
        previous = self._pending
        event = None
        if self._cuda:
            stats = stats.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._pending = (step, stats, share, event)
        if not self._cuda:
            self.finish()
        elif previous is not None:
            self._check(*previous)

    def finish(self) -> None:
        """Check what is still unread."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._check(*pending)

    def _check(self, step: int, stats: Tensor, share: Tensor, event: torch.cuda.Event | None) -> None:
        if event is not None:
            event.synchronize()
        loss, norm = stats.tolist()
        if math.isfinite(loss) and math.isfinite(norm):
            return
        finite: list[bool] = [True] * self._world_size
        dist.all_gather_object(finite, bool(torch.isfinite(share)))
        ranks = ", ".join(str(rank) for rank, good in enumerate(finite) if not good)
        where = (
            f"the loss of rank {ranks} is not finite"
            if ranks
            else "the loss is finite on every rank, its gradient is not"
        )
        raise FloatingPointError(f"step {step}: loss {loss}, gradient norm {norm}: {where}")
