"""What is decided on every step's loss and gradient norm, without waiting for the device: update, skip it, or stop.

The numbers are equal on all ranks, so all ranks decide alike. The update itself is skipped on the device; the host
reads on CPU at once, on CUDA one step later, what was decided.
"""

import torch
from torch import Tensor

from dtron import compat
from dtron.checkpoint.files import Progress
from dtron.config.sections import Training
from dtron.errors import UserError
from dtron.ranks.agree import from_all_ranks, warn_on_rank_0

__all__ = ["StepGuard"]

MEMORY = 0.98  # of the running mean of the gradient norm: it forgets in about 50 steps
JUDGED_AFTER = 20  # steps; before, the norm falls too fast to say what is a spike
MAX_SKIPPED_IN_A_ROW = 10
NONFINITE, SPIKE, UNLABELLED = 1.0, 2.0, 3.0


class StepGuard:
    """`stop_requested`: a stop was requested on some rank; known after `watch` or `finish`.

    UserError if steps are to be skipped and an optimizer cannot.
    """

    def __init__(
        self,
        config: Training,
        optimizers: list[torch.optim.Optimizer],
        progress: Progress,
        device: torch.device,
    ) -> None:
        self._config, self._optimizers, self._progress = config, optimizers, progress
        self._cuda = device.type == "cuda"
        self._norm = torch.tensor([progress.norm_mean, progress.norm_weight], dtype=torch.float64, device=device)
        self._pending: tuple[int, Tensor, Tensor, torch.cuda.Event | None] | None = None
        self.stop_requested = False
        self._skips = [
            kind
            for kind, skipped in (
                (NONFINITE, config.on_nonfinite == "skip"),
                (SPIKE, config.spike_factor > 0 and config.on_spike == "skip"),
            )
            if skipped
        ]
        if self._skips and not all(map(compat.takes_scale_and_skip, optimizers)):
            raise UserError(
                "training.on_nonfinite = skip and training.on_spike = skip need an optimizer that can leave out a step "
                "on the device: AdamW or Adam with optimizer.implementation = fused; set them to stop, or "
                "training.spike_factor to 0"
            )

    @torch.no_grad()
    def judge(self, stats: Tensor) -> Tensor:
        """stats [loss, gradient norm] of the global batch -> [0, NONFINITE or SPIKE; mean norm so far].

        Sets what the optimizers' next step does. A spike is a norm of more than `spike_factor` times the mean of the
        norms before it, each weighing 0.98 of the next.
        """
        loss, norm = stats[0], stats[1]
        mean, weight = self._norm.unbind()
        finite = loss.isfinite() & norm.isfinite()
        judged = weight >= 1 - MEMORY**JUDGED_AFTER - 1e-9
        spike = finite & judged & (norm * weight > self._config.spike_factor * mean) & (self._config.spike_factor > 0)
        verdict = torch.where(finite, spike * SPIKE, NONFINITE).to(stats.dtype)
        counted = torch.stack((mean * MEMORY + norm * (1 - MEMORY), weight * MEMORY + (1 - MEMORY)))
        self._norm = torch.where(verdict == 0, counted, self._norm)
        if self._skips:
            found = sum((verdict == kind for kind in self._skips), torch.zeros_like(finite)).float()
            for optimizer in self._optimizers:
                compat.skip_update_where(optimizer, found)
        return torch.stack((verdict, mean / weight))

    def unlabelled(self) -> Tensor:
        """What `judge` would return of a step without a label in the whole global batch; its norm of 0 is not counted.

        Whoever calls this leaves out the update, which any optimizer allows: weight decay alone would shrink the model.
        """
        mean, weight = self._norm.unbind()
        return torch.stack((torch.full_like(mean, UNLABELLED), mean / weight))

    def watch(self, step: int, stats: Tensor, local_loss: Tensor) -> None:
        """stats: [loss, norm, ranks with a stop request, verdict, mean norm] of `step`; local_loss: this rank's.

        Raises FloatingPointError where a verdict is to end the run: of this step on CPU, of the one before on CUDA.
        """
        previous = self._pending
        event = None
        if self._cuda:
            stats = stats.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._pending = (step, stats, local_loss, event)
        if not self._cuda:
            self.finish()
        elif previous is not None:
            self._read(*previous)

    def finish(self) -> None:
        """Read what is still unread, and note it in the progress that is saved."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._read(*pending)
        self._progress.norm_mean, self._progress.norm_weight = self._norm.tolist()

    def _read(self, step: int, stats: Tensor, local_loss: Tensor, event: torch.cuda.Event | None) -> None:
        if event is not None:
            event.synchronize()
        loss, norm, stop, verdict, mean = stats.tolist()
        self.stop_requested |= stop > 0
        progress = self._progress
        if verdict == 0:
            progress.skipped_in_a_row = 0
            return
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        if verdict == UNLABELLED:
            self._note_unlabelled(step)
            return
        text = f"step {step}: loss {loss}, gradient norm {norm}: "
        if verdict == SPIKE:
            text += f"a spike, over training.spike_factor {self._config.spike_factor} times the running mean {mean:.4g}"
        else:
            text += self._whose(local_loss)
        if verdict not in self._skips:
            key = "training.on_spike" if verdict == SPIKE else "training.on_nonfinite"
            raise FloatingPointError(f"{text}; {key} = skip would leave such steps out")
        if progress.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise FloatingPointError(f"{text}; {MAX_SKIPPED_IN_A_ROW} steps in a row were skipped")
        warn_on_rank_0(f"{text}; its update is skipped ({progress.skipped} so far)")

    def _note_unlabelled(self, step: int) -> None:
        """Warn of the first of several in a row. UserError at the last that is borne, or if the run has no other."""
        in_a_row = self._progress.skipped_in_a_row
        why = "no label to predict in the whole global batch: every one is masked (-100)"
        if in_a_row >= min(MAX_SKIPPED_IN_A_ROW, self._config.steps):
            raise UserError(
                f"step {step}: {why}, in {in_a_row} step(s) in a row, which taught the model nothing; look at the "
                f"labels of the data: prompts, which are masked, may fill training.seq_len {self._config.seq_len}"
            )
        if in_a_row == 1:
            warn_on_rank_0(f"step {step}: {why}; its update is skipped ({self._progress.skipped} so far)")

    def _whose(self, local_loss: Tensor) -> str:
        finite = from_all_ranks(bool(torch.isfinite(local_loss)))
        ranks = ", ".join(str(rank) for rank, good in enumerate(finite) if not good)
        if ranks:
            return f"the loss of rank {ranks} is not finite"
        return "the loss is finite on every rank, its gradient is not"
