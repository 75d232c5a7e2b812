"""What each rank of the layout does: the trainer's own steps, and after each every weight against the truth's."""

import contextlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from dtron import compat
from dtron.data.loader import Batch
from dtron.parallel.materialize import initialize
from dtron.plan.dryrun import build_step
from dtron.train.step import Step
from dtron.verify.draws import Draw, recorded_draws, without_dropout
from dtron.verify.outputs import Outputs, recorded_outputs
from dtron.verify.plain import Truth, global_batch
from dtron.verify.small import NOISE, NOISY, Proof

__all__ = ["Seen", "train_layout"]

TIMEOUT_S = 60  # for ranks that wait for different things


@dataclass
class Seen:
    """Of one rank, after each step: loss and gradient norm of the whole world; of each parameter held here how far it
    is from the truth's, as a share of the way that the whole parameter has gone since the start.

    elements: of each parameter, how many are held here. outputs: of the modules in the first step. draws: of dropout,
    in one step more.
    """

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    off: list[dict[str, float]] = field(default_factory=list)
    elements: dict[str, int] = field(default_factory=dict)
    outputs: Outputs = field(default_factory=dict)
    draws: list[Draw] = field(default_factory=list)


def train_layout(proof: Proof, truth: Truth) -> Seen:
    """Train as the truth was trained, on this rank of a started process group."""
    steps = len(truth.losses)
    proof = proof.with_learning_rate(truth.lr, steps + 1)
    step = build_step(proof.setup, contextlib.nullcontext)
    compat.set_timeout(TIMEOUT_S)
    model = step.model
    _initialize(step, proof)
    seen = Seen()
    for number in range(steps):
        with without_dropout(), recorded_outputs(model.parts) as outputs:
            stats, _ = step(_rows_of(step, proof, truth, number))
        seen.outputs = seen.outputs or outputs
        seen.losses.append(stats[0].item())
        seen.norms.append(stats[1].item())
        seen.off.append(_compare(step, truth, number, seen.elements))
    with recorded_draws(model.parts) as draws:
        step(_rows_of(step, proof, truth, steps))
    seen.draws = draws
    return seen


@torch.no_grad()
def _initialize(step: Step, proof: Proof) -> None:
    """As the plain model's."""
    named = [(step.model.aliases.get(name, name), p) for name, p in step.model.named_parameters()]
    seed = proof.setup.config.debug.seed
    initialize(((name + NOISY, p) for name, p in named), lambda name: NOISE, seed)
    noise = [_local(p).clone() for _, p in named]
    initialize(named, proof.std, seed)
    for (_, p), value in zip(named, noise, strict=True):
        _local(p).add_(value)


def _rows_of(step: Step, proof: Proof, truth: Truth, number: int) -> Batch:
    batch = global_batch(proof, truth.seed, number)
    each = len(batch.tokens) // step.mesh.degrees.dp
    rows = slice(step.mesh.dp_rank * each, (step.mesh.dp_rank + 1) * each)
    starts = batch.document_start
    return Batch(batch.tokens[rows], batch.labels[rows], None if starts is None else starts[rows])


@torch.no_grad()
def _compare(step: Step, truth: Truth, number: int, elements: dict[str, int]) -> dict[str, float]:
    off = {}
    for name, p in step.model.named_parameters():
        first = step.model.aliases.get(name, name)
        whole, start = truth.weights[number][first], truth.start[first]
        difference = (_local(p) - _shard(whole, p)).norm()
        # What did not move, such as a frozen parameter, is held against its own length.
        way = (whole - start).norm() or whole.norm() or torch.ones(())
        off[name] = (difference / way).item()
        elements[name] = _local(p).numel()
    return off


def _local(tensor: Any) -> Tensor:
    local: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local


def _shard(whole: Tensor, p: Tensor) -> Tensor:
    """This rank's part of a whole tensor, as `p` is sharded."""
    if not isinstance(p, DTensor):
        return whole
    return _local(distribute_tensor(whole, p.device_mesh, p.placements, src_data_rank=None))
