"""Optimizers, the learning-rate schedule and clipping by the true global norm.

What is summed into the gradient norm: the square of every element of every gradient, exactly once. Each rank adds up
its local shards; a shard that c ranks hold counts 1/c on each, the second copy of a tied matrix counts nothing. The
sum over the world (`Step._reduce`) is the squared norm. Gradients are sums over ranks and microbatches already, since
the loss is divided by the number of labels in the whole global batch; none is averaged.
"""

import fnmatch
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dtron import compat, registry
from dtron.config import sections
from dtron.models.moe import Experts
from dtron.models.spec import layers_of
from dtron.optim.adamw import AdamW
from dtron.parallel.compose import ParallelModel

__all__ = ["block_matrices", "build_optimizers", "clip_gradients", "learning_rate_factor", "squared_gradient_norm"]


def build_optimizers(
    model: ParallelModel, c: sections.Optimizer, compiled: sections.Compile | None = None
) -> list[torch.optim.Optimizer]:
    """One optimizer a pipeline stage held here, each with a decayed and an undecayed group of parameters.

    Muon's are two: itself for the matrices of the blocks, and AdamW for all else.
    compiled: whether, and by what, those that are dtron's own are compiled.
    """
    optimizers = []
    for part in model.parts:
        here = {id(p) for p in part.parameters()}
        trained = [(name, p) for name, p in model.named_parameters() if id(p) in here and p.requires_grad]
        matrices = {id(p) for p in block_matrices(part)} if c.name == "Muon" else set[int]()
        for name, wanted in ((c.name, True), ("AdamW", False)) if c.name == "Muon" else ((c.name, False),):
            chosen = [(model.aliases.get(n, n), p) for n, p in trained if (id(p) in matrices) == wanted]
            if chosen:
                make = registry.look_up("optimizer", name, "optimizer.name")
                optimizers.append(make(_groups(chosen, c), c))
    for optimizer in optimizers:
        if compiled and compiled.enable and isinstance(optimizer, AdamW):
            optimizer.compile(compiled.backend)
    return optimizers


def _groups(named: list[tuple[str, nn.Parameter]], c: sections.Optimizer) -> list[dict[str, Any]]:
    """The parameters with weight decay and those without."""
    exempt = {id(p) for n, p in named if any(fnmatch.fnmatch(n, pattern) for pattern in c.weight_decay_exclude)}
    groups = [
        {"params": [p for _, p in named if id(p) not in exempt], "weight_decay": c.weight_decay},
        {"params": [p for _, p in named if id(p) in exempt], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def block_matrices(part: nn.Module) -> Iterator[Tensor]:
    """The matrices of a stage's blocks [out, in], and those of its experts [experts, out, in]."""
    for module in layers_of(part).modules():
        if isinstance(module, nn.Linear):
            yield module.weight
        elif isinstance(module, Experts):
            yield from (p for p in module.parameters(recurse=False) if p.ndim == 3)


def learning_rate_factor(c: sections.LRScheduler, step: int, steps: int) -> float:
    """Share of the peak learning rate at optimizer step `step` (from 1) of `steps`: warm-up, stable, decay."""
    total = c.total_steps or steps
    decay = total - c.warmup_steps if c.decay_ratio is None else round(total * c.decay_ratio)
    last_stable = total - decay + 1  # the decay leaves its peak after this step, and has not reached its end at `total`
    if step <= c.warmup_steps:
        return step / c.warmup_steps
    if step <= last_stable or decay <= 0:
        return 1.0
    progress = min(1.0, (step - last_stable) / decay)
    shapes = {
        "linear": 1 - progress,
        "sqrt": 1 - math.sqrt(progress),
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
    }
    return c.min_lr_factor + (1 - c.min_lr_factor) * shapes[c.decay_type]


@torch.no_grad()
def squared_gradient_norm(
    parameters: Iterable[tuple[str, nn.Parameter]], aliases: dict[str, str], stage_ranks: int, device: torch.device
) -> Tensor:
    """This rank's share of the squared global gradient norm; the sum over the world is the whole, exactly once.

    Works on local shards: DTensors of different meshes, or of different pipeline stages, cannot be added up otherwise.
    A shard held by several ranks of its mesh counts for 1/copies on each; second copies of tied parameters, whose
    gradients equal the first's, count for nothing. ValueError where a mesh does not span its stage.
    """
    shares: dict[int, list[Tensor]] = {}
    for name, p in parameters:
        if name in aliases or p.grad is None:
            continue
        grad = p.grad
        if not isinstance(grad, DTensor) or grad.device_mesh.size() != stage_ranks:
            raise ValueError(f"{name}: the gradient's mesh does not span the {stage_ranks} ranks of its stage")
        if any(place.is_partial() for place in grad.placements):
            raise ValueError(f"{name}: the gradient is not reduced: {grad.placements}")
        sizes = zip(grad.device_mesh.shape, grad.placements, strict=True)
        copies = math.prod(size for size, place in sizes if place.is_replicate())
        shares.setdefault(copies, []).append(grad.to_local())
    total = torch.zeros((), dtype=torch.float64, device=device)
    for copies, grads in shares.items():
        # In float32 a norm over 2^22 elements is off by 1e-4, and by another 1e-4 where the shards are smaller.
        norms = torch.stack(torch._foreach_norm(grads, 2, torch.float64))
        total += norms.to(total).square().sum() / copies
    return total


@torch.no_grad()
def clip_gradients(optimizers: Iterable[torch.optim.Optimizer], norm: Tensor, max_norm: float) -> None:
    """Let the optimizers' next step take gradients whose global norm, now `norm`, is at most `max_norm`.

    Fused Adam and dtron's own optimizers scale them inside the step, and `p.grad` stays as it is. For others gradients
    are scaled in place, by a pass of their own: 8 bytes per parameter.
    """
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0).float()
    for optimizer in optimizers:
        if compat.takes_scale_and_skip(optimizer):
            compat.divide_gradients_by(optimizer, 1 / factor)
            continue
        grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        shards = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]
        for device in {shard.device for shard in shards}:
            torch._foreach_mul_([shard for shard in shards if shard.device == device], factor.to(device))
