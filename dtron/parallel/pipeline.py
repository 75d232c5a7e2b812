"""Pipeline parallel: the layers cut into stages, microbatches flowing through torch's schedules.

A stage is the whole meta model with the other stages' children removed, so parameter names stay
those of the model. Rules that make torch's silent traps impossible:
gradients are never rescaled (`scale_grads=False`: the loss is already divided by the tokens of the
global batch); evaluation has stages and a schedule of its own (the training schedule's `eval()` drops
accumulated gradients under FSDP, and V-shaped ones have none); the dtype of receive buffers is the compute
dtype of mixed precision, and each stage's output is held against it, or it is found by running the stages
once; receives are never deferred; a tied matrix has a copy on the first and on the last stage, whose
gradients are summed before clipping.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class

from dtron import compat
from dtron.config.sections import Config, Parallelism
from dtron.mesh import Mesh
from dtron.models.spec import ModelConfig, ModelSpec, layers_of
from dtron.parallel.loss import plain_loss
from dtron.parallel.schedules import schedule_stages

__all__ = ["Pipeline", "StagePlan", "hidden_states", "keep_modules", "plan_stages", "split_by_cost"]

# Arguments of the model that every stage is given, in their order.
EXTRA_INPUTS = ("positions", "document_start", "keys")


@dataclass(frozen=True)
class StagePlan:
    """Which modules every stage keeps and which stages every pipeline rank holds."""

    modules: list[list[str]]
    of_rank: list[tuple[int, ...]]
    rows: list[list[str]] | None = None  # cells of a CSV schedule

    @property
    def n_stages(self) -> int:
        return len(self.modules)


# --- the split


def plan_stages(
    p: Parallelism, model: nn.Module, block_costs: Sequence[float], head_cost: float, embed_cost: float
) -> StagePlan:
    """Split a whole meta model. Costs are in any one unit, FLOPs per token for example; block_costs: of every layer."""
    layers = list(layers_of(model))
    of_rank, rows = schedule_stages(p, len(layers))
    n_stages = sum(len(stages) for stages in of_rank)
    if p.module_fqns_per_model_part:
        return StagePlan(p.module_fqns_per_model_part, of_rank, rows)
    first, last = p.pipeline_parallel_first_stage_less_layers, p.pipeline_parallel_last_stage_less_layers
    usual = block_costs[-1]  # a mixture of experts may begin with dense layers
    embed_cost = embed_cost if first is None else first * usual
    head_cost = head_cost if last is None else last * usual
    counts = split_by_cost(block_costs, n_stages, embed_cost, head_cost)
    before, after = _outer_modules(model)
    parts, at = [], 0
    for stage, count in enumerate(counts):
        names = [f"layers.{i}" for i in layers[at : at + count]]
        at += count
        parts.append((before if stage == 0 else []) + names + (after if stage == n_stages - 1 else []))
    return StagePlan(parts, of_rank, rows)


def split_by_cost(layers: Sequence[float], n_stages: int, first: float, last: float) -> list[int]:
    """Layers per stage, at least one, that minimise the cost of the bottleneck stage.

    layers: the cost of each. first, last: what the first and the last stage cost besides.
    """
    counts, extra = [1] * n_stages, [0.0] * n_stages
    extra[0] += first
    extra[-1] += last
    if len(set(layers)) > 1:
        return _split_unequal(layers, extra)
    # Layers cost the same, so giving each to the cheapest stage is optimal. Where costs are equal, the first stage is
    # the last to get one: it keeps the activations of the most microbatches.
    order = [*range(1, n_stages), 0]
    for _ in range(len(layers) - n_stages):
        counts[min(order, key=lambda stage: counts[stage] * layers[0] + extra[stage])] += 1
    return counts


def _split_unequal(layers: Sequence[float], extra: Sequence[float]) -> list[int]:
    """The same for layers of different costs; extra: what each stage costs besides."""
    until = [0.0, *itertools.accumulate(layers)]
    # best[n]: the bottleneck of the stages so far where they hold the first n layers, and their counts.
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for more in extra:
        best = {
            n: min(
                (max(cost, until[n] - until[held] + more), [*counts, n - held])
                for held, (cost, counts) in best.items()
                if held < n
            )
            for n in range(len(best[min(best)][1]) + 1, len(layers) + 1)
        }
    return best[len(layers)][1]


def _outer_modules(model: nn.Module) -> tuple[list[str], list[str]]:
    """Children that come before and after `layers` in the model's definition."""
    names = [name for name, _ in model.named_children()]
    at = names.index("layers")
    return names[:at], names[at + 1 :]


def keep_modules(model: nn.Module, names: Sequence[str]) -> nn.Module:
    """Turn a whole meta model into a stage: children not named become None, layers not named are removed."""
    for name, _ in list(model.named_children()):
        if name != "layers" and name not in names:
            setattr(model, name, None)
    kept = {name.removeprefix("layers.") for name in names if name.startswith("layers.")}
    layers = layers_of(model)
    for index in list(layers):
        if index not in kept:
            del layers[index]
    return model


# --- the schedule

LossFn = Callable[[Any, Tensor], Tensor]


class Pipeline:
    """This rank's stages of one model and the schedules that train and evaluate them.

    microbatches: how many make a training batch, and how many an evaluation batch. hidden: for the same two, on meta,
    what a stage passes to the next for one microbatch; None: the stages find out by messages, in a first run.
    """

    def __init__(
        self, parts: Sequence[nn.Module], plan: StagePlan, p: Parallelism, pp: DeviceMesh,
        microbatches: tuple[int, int], device: torch.device, loss_fn: LossFn,
        hidden: tuple[Tensor, Tensor] | None = None,
    ) -> None:  # fmt: skip
        self.indices = plan.of_rank[pp.get_local_rank()]
        self.has_first, self.has_last = 0 in self.indices, plan.n_stages - 1 in self.indices
        self._ends = [next(r for r, s in enumerate(plan.of_rank) if end in s) for end in (0, plan.n_stages - 1)]
        self._group = pp.get_group()

        def make(microbatches: int, hidden: Tensor | None) -> Any:
            stages = [
                compat.Stage(part, index, plan.n_stages, device, self._group, hidden)
                for part, index in zip(parts, self.indices, strict=True)
            ]
            if plan.rows:
                return compat.CsvSchedule(stages, microbatches, plan.rows, loss_fn=loss_fn, scale_grads=False)
            cls = get_schedule_class(p.pipeline_parallel_schedule)
            single = issubclass(cls, PipelineScheduleSingle)
            return cls(stages[0] if single else stages, microbatches, loss_fn=loss_fn, scale_grads=False)

        self._train, self._evaluate = map(make, microbatches, hidden or (None, None))
        compat.keep_forward_only(self._evaluate)
        if hidden:
            compat.start_without_messages(self._train)
            compat.start_without_messages(self._evaluate)
            # NCCL's communicator of the group, which batched messages need: it is made by all ranks at once, and a
            # schedule's batches need not be of all ranks.
            dist.all_reduce(torch.zeros((), device=device), group=self._group)

    def forward_backward(self, tokens: Tensor, labels: Tensor, *extra_inputs: Tensor) -> Tensor:
        """Add the gradients of tokens [B, S], in microbatches; returns the loss, on ranks without the last stage 0.

        extra_inputs [B, ...]: the model's further arguments, as `EXTRA_INPUTS` names them.
        """
        return self._run(self._train.step, tokens, labels, extra_inputs)

    @torch.no_grad()
    def evaluate(self, tokens: Tensor, labels: Tensor, *extra_inputs: Tensor) -> Tensor:
        """The summed loss of a batch without gradients; leaves accumulated gradients alone."""
        return self._run(self._evaluate.eval, tokens, labels, extra_inputs)

    def _run(self, run: Callable[..., Any], tokens: Tensor, labels: Tensor, extra_inputs: tuple[Tensor, ...]) -> Tensor:
        losses: list[Tensor] = []
        inputs = (tokens,) if self.has_first else ()
        target = labels if self.has_last else None
        named = dict(zip(EXTRA_INPUTS, extra_inputs, strict=False))
        run(*inputs, target=target, losses=losses if self.has_last else None, return_outputs=False, **named)
        if not losses:
            return torch.zeros((), device=tokens.device)
        return torch.stack([plain_loss(loss) for loss in losses]).sum()

    def sum_tied_gradients(self, embedding: nn.Parameter | None, head: nn.Parameter | None) -> None:
        """Add up the gradients of the two copies of a tied matrix; a rank passes those it holds, None for others."""
        copies = [p for p in (embedding, head) if p is not None]
        if len(copies) == 2:
            total = _local_gradient(copies[0]) + _local_gradient(copies[1])
            for p in copies:
                _local_gradient(p).copy_(total)
        elif copies:
            mine = _local_gradient(copies[0])
            other = torch.empty_like(mine)
            peer = dist.get_global_rank(self._group, self._ends[1] if self.has_first else self._ends[0])
            # A pair of point-to-point messages in the pipeline's own group: no group more for tied models.
            for work in dist.batch_isend_irecv(
                [dist.P2POp(dist.isend, mine, peer, self._group), dist.P2POp(dist.irecv, other, peer, self._group)]
            ):
                work.wait()
            mine.add_(other)


def _local_gradient(p: nn.Parameter) -> Tensor:
    assert p.grad is not None
    return p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad


def hidden_states(
    spec: ModelSpec, model_config: ModelConfig, config: Config, mesh: Mesh
) -> tuple[Tensor, Tensor] | None:
    """What stages pass to each other, on meta, in training and in evaluation; None where the model alone knows."""
    if not spec.standard_hidden_states:
        return None
    rows, dtype = config.parallelism.pipeline_parallel_microbatch_size, config.training.mixed_precision_param
    lengths = config.training.seq_len, config.validation.seq_len or config.training.seq_len
    shapes = [(rows, length // mesh.degrees.cp // mesh.degrees.tp, model_config.dim) for length in lengths]
    train, evaluate = (torch.empty(shape, dtype=getattr(torch, dtype), device="meta") for shape in shapes)
    return train, evaluate
