"""Keeping the experts of a mixture busy, in a way that no layout, microbatch or restart changes.

Two ways, both functions of whole sequences or of the whole global batch:
* the sequence-wise balance loss (DeepSeek-V3, arXiv 2412.19437, eq. 17 to 20), `training.expert_balance_loss`. The loss
  over a microbatch that others use depends on how the batch was cut;
* a bias on the scores, for the choice only (arXiv 2408.15664), of models that have one: after each step it rises for
  experts with less than the mean of the rows and falls for the others, by `training.expert_bias_rate`.

The number of rows of each expert is counted by the backward (`MixtureOfExperts.load`) and summed over the world once
per step. It also makes the metrics.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dtron import compat
from dtron.config import Config
from dtron.config.sections import Training
from dtron.models.moe import MixtureOfExperts, MoEConfig
from dtron.parallel.compose import ParallelModel
from dtron.ranks.agree import warn_on_rank_0

__all__ = ["Balance", "unread_keys"]

IDLE_STEPS = 100  # an expert without a row for this long is named in a warning


def unread_keys(c: Training, experts: MoEConfig | None) -> list[str]:
    """A line for each key of the balance that was changed and that this model does not read."""
    read = {"expert_balance_loss": experts is not None, "expert_bias_rate": bool(experts and experts.balancing_bias)}
    needs = {"expert_balance_loss": "experts", "expert_bias_rate": "experts with a bias that balances them"}
    changed = [name for name, is_read in read.items() if not is_read and getattr(c, name) != getattr(Training(), name)]
    return [f"training.{name} has no effect: the model has no {needs[name]}" for name in changed]


class Balance:
    """Counts, bias and metrics of the experts. Make it on all ranks, when the model has its weights.

    config: with the global batch resolved. n_layers: of the whole model.
    """

    def __init__(
        self, model: ParallelModel, config: Config, experts: MoEConfig, n_layers: int, device: torch.device
    ) -> None:
        c = config.training
        self._rate = c.expert_bias_rate
        self._rows_per_step = c.global_batch_size * c.seq_len * experts.top_k  # of each layer
        self._layers: dict[int, MixtureOfExperts] = {}
        for part in model.parts:
            for name, module in part.named_modules():
                if isinstance(module, MixtureOfExperts):
                    self._layers[int(compat.clean_name(name).split(".")[1])] = module
                    # A parameter, so that the weights' half of a split backward reaches it too; made now, so that
                    # nothing shards it.
                    module.load = nn.Parameter(torch.zeros(experts.n_experts, device=device))
                    module.aux_weight = c.expert_balance_loss / c.global_batch_size
        shape = n_layers, experts.n_experts
        self._first = experts.n_dense_layers
        self._sum = torch.zeros(shape, dtype=torch.int64, device=device)  # since the last row of metrics
        self._idle = torch.zeros(shape, dtype=torch.int64, device=device)  # steps without a row, up to now
        self._steps, self._named = 0, set[tuple[int, int]]()

    @torch.no_grad()
    def take_counts(self) -> Tensor:
        """Rows of each expert in the step whose backward has ended, over all ranks: [layers, experts], 0 if dense."""
        counts = torch.zeros_like(self._sum)
        for index, moe in self._layers.items():
            assert isinstance(moe.load, nn.Parameter)
            if moe.load.grad is not None:
                counts[index] = moe.load.grad.long()
                moe.load.grad = None
        dist.all_reduce(counts)
        self._sum += counts
        self._idle = torch.where(counts > 0, 0, self._idle + 1)
        self._steps += 1
        return counts

    @torch.no_grad()
    def update_bias(self, counts: Tensor, applied: Tensor) -> None:
        """Move the biases by the counts of a step; `applied`, bool []: false where the step is skipped, all of it."""
        for index, moe in self._layers.items():
            if (bias := moe.gate.e_score_correction_bias) is not None:
                n = counts[index].float()
                bias.add_(self._rate * torch.sign(n.mean() - n) * applied)

    def counted(self) -> Tensor:
        """[2, layers, experts] on the device: rows since the last row of metrics, steps without one up to now."""
        return torch.stack((self._sum, self._idle))

    def reduce(self, counted: Tensor) -> dict[str, Any]:
        """The metrics since the last call, for a row; warns of experts that have been idle for long.

        counted: what `counted` gave, on the CPU, in float64.
        expert_busiest/LAYER: the busiest expert's rows over the mean. expert_entropy/LAYER: of the load, 1 where it is
        even, 0 where one expert has all. expert_dropped_rows: rows that no expert was given. expert_load: the shares
        [layers, experts] over the mean, for a picture.
        """
        counts, idle = counted[:, self._first :]
        expected = self._rows_per_step * self._steps * len(counts)
        load = counts / counts.mean(1, keepdim=True).clamp(min=1e-9)
        share = load / load.size(1)
        entropy = -torch.special.xlogy(share, share).sum(1) / math.log(max(load.size(1), 2))
        row: dict[str, Any] = {}
        for i, (busiest, even) in enumerate(zip(load.max(1).values.tolist(), entropy.tolist(), strict=True)):
            row |= {f"expert_busiest/{self._first + i}": busiest, f"expert_entropy/{self._first + i}": even}
        row |= {"expert_dropped_rows": expected - int(counts.sum()), "expert_load": load}
        self._warn_of_idle(idle)
        self._sum.zero_()
        self._steps = 0
        return row

    def _warn_of_idle(self, steps: Tensor) -> None:
        found = (steps >= IDLE_STEPS).nonzero().tolist()
        for layer, expert in found:
            if (layer, expert) not in self._named:
                warn_on_rank_0(
                    f"layer {self._first + layer}: expert {expert} has had no token for {int(steps[layer, expert])} "
                    "steps; raise training.expert_balance_loss, or start with a lower learning rate"
                )
        self._named = {(layer, expert) for layer, expert in found}
