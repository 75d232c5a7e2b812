"""One optimizer step: the algorithm, apart from folder, data, watchdog and report.

The trainer runs this, and so does whoever wants to record a step, prove it or time it.
"""

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dtron.checkpoint.files import Progress
from dtron.checkpoint.load import create_state
from dtron.config import Config
from dtron.data.loader import IGNORE_INDEX, Batch
from dtron.mesh import Mesh
from dtron.parallel.compose import ParallelModel
from dtron.train.balance import Balance
from dtron.train.forward import local_batches, to_device
from dtron.train.guard import StepGuard
from dtron.train.optimizer import clip_gradients, learning_rate_factor, squared_gradient_norm
from dtron.train.tally import Tally

__all__ = ["Step"]


@dataclass
class Step:
    """What a step needs, on one rank of a started process group.

    config: with the global batch resolved. optimizers: of `model.parts`. progress: counted up by each
    step. tally: sums for the metrics. balance: of a mixture of experts. stop_requested: whether a stop was requested on
    this rank.
    before_update: called when gradients are final and weights are about to change. after_update: when they have.
    phase: a context around each named phase of the step, for times and traces.
    """

    config: Config
    mesh: Mesh
    device: torch.device
    model: ParallelModel
    optimizers: list[torch.optim.Optimizer]
    guard: StepGuard
    progress: Progress
    tally: Tally
    balance: Balance | None = None
    stop_requested: Callable[[], bool] = lambda: False
    before_update: Callable[[], None] = lambda: None
    after_update: Callable[[], None] = lambda: None
    phase: Callable[[str], AbstractContextManager[Any]] = nullcontext

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Train on this rank's rows of the next global batch. Returns what `StepGuard.watch` reads, and the local loss.

        The local loss is this rank's part of the global one: the losses of all ranks, over tp, add up to it.
        """
        c, loss = self.config, self.model.loss
        self._seed_random(self.progress.step + 1)
        with self.phase("count labels"):
            valid, unlabelled = self._count_valid(batch.labels)
        loss.valid_tokens = valid
        loss.rows = None if batch.sources is None else []
        local_loss = torch.zeros((), device=self.device)
        size, gathered_keys = c.training.local_batch_size, self.model.gathered_keys
        forwards = local_batches(batch, size, c.parallelism, self.mesh, self.device, gathered_keys)
        with self.phase("forward-backward"):
            for i, arguments in enumerate(forwards):
                local_loss += self.model.forward_backward(*arguments, last=i == len(forwards) - 1)
            self.model.finish_gradients()
        self.tally.accumulate(batch, [labels for _, labels, *_ in forwards], loss.rows)
        counts = self.balance.take_counts() if self.balance else None

        stats = self._reduce(local_loss)
        stats = torch.cat((stats, self.guard.unlabelled() if unlabelled else self.guard.judge(stats)))
        self.before_update()
        self.progress.step += 1
        with self.phase("optimizer"):
            self._update(stats[1], unlabelled)
        self.after_update()
        if self.balance and counts is not None:
            self.balance.update_bias(counts, stats[3] == 0)
        self.progress.consumed += c.training.global_batch_size
        self.progress.tokens += c.training.global_batch_size * c.training.seq_len
        return stats, local_loss

    def _update(self, norm: Tensor, unlabelled: bool) -> None:
        """Clip and change the weights; unlabelled: there is nothing to learn from."""
        clip_gradients(self.optimizers, norm, self.config.training.max_norm)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate(self.progress.step, group.get("initial_lr"))
            if not unlabelled:
                optimizer.step()
            elif not optimizer.state:
                create_state(optimizer)  # a checkpoint is to hold it, whatever the first step was
            optimizer.zero_grad()

    def learning_rate(self, step: int, peak: float | None = None) -> float:
        """Learning rate of optimizer step `step` (from 1). peak: of parameters with one of their own."""
        c = self.config
        return (c.optimizer.lr if peak is None else peak) * learning_rate_factor(c.lr_scheduler, step, c.training.steps)

    def _count_valid(self, labels: Tensor) -> tuple[Tensor, bool]:
        """Labels that count in the whole global batch, at least 1, in fp32 like the loss they divide; are there none?

        Summed as int64. The host waits for the sum only where the rows of this rank, on the CPU, have no label.
        """
        local = (labels != IGNORE_INDEX).sum()
        count = to_device(local.clone(), self.device)
        dist.all_reduce(count)
        d = self.mesh.degrees
        return (count // (d.world // d.dp)).clamp(min=1).float(), not local and not count

    def _reduce(self, local_loss: Tensor) -> Tensor:
        """[loss, gradient norm, ranks with a stop request] of the global batch: one all-reduce, in float64.

        What is summed into the norm: every element of every gradient exactly once, see `squared_gradient_norm`.
        """
        d = self.mesh.degrees
        squares = squared_gradient_norm(self.model.named_parameters(), self.model.aliases, d.stage, self.device)
        stops = torch.full_like(squares, self.stop_requested())
        stats = torch.stack((local_loss.double() / d.tp, squares, stops))
        with self.phase("reduce loss and norm"):
            dist.all_reduce(stats)
        stats[1].sqrt_()
        return stats

    def _seed_random(self, step: int) -> None:
        """Random numbers of a step, which dropout draws for example, are a function of (seed, step, mesh coordinates).

        So nothing of them is saved, and a resume draws what the uninterrupted run would have. Every rank draws
        differently: those of one tensor-parallel group hold different parts of the sequence and different heads.
        """
        m = self.mesh
        key = f"{self.config.debug.seed} {step} {m.dp_rank} {m.cp_rank} {m.pp_rank} {m.tp_rank}"
        torch.manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1)
