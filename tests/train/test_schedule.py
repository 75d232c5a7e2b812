"""The learning-rate schedule and the groups of parameters that decay."""

import itertools
import math

import pytest
import torch
from torch import nn

from dtron.config.sections import LRScheduler, Optimizer
from dtron.train.optimizer import build_optimizers, learning_rate_factor


def torchtitan(current_step: int, steps: int, warmup: int, ratio: float | None, shape: str, least: float) -> float:
    """The factor of torchtitan's lr_lambda (v0.2, components/lr_scheduler.py); its current_step counts from 0."""
    decay_steps = round(steps * ratio) if ratio is not None else steps - warmup
    stable_steps = steps + 1 - warmup - decay_steps  # a virtual last step, so that the rate does not drop to 0
    warmup_stable_steps = warmup + stable_steps
    if current_step < warmup:
        return (current_step + 1) / warmup
    if current_step < warmup_stable_steps:
        return 1.0
    progress = float((current_step + 1) - warmup_stable_steps) / decay_steps
    if shape == "linear":
        factor = 1 - progress
    elif shape == "sqrt":
        factor = 1 - math.sqrt(progress)
    else:
        factor = 0.5 * (1.0 + math.cos(math.pi * progress))
    return least + (1 - least) * factor


@pytest.mark.parametrize("shape", ["linear", "sqrt", "cosine"])
def test_schedule_is_torchtitans(shape: str) -> None:
    for warmup, ratio, least in itertools.product((0, 1, 7), (None, 0.0, 0.25, 0.65), (0.0, 0.1)):
        c = LRScheduler(warmup_steps=warmup, decay_ratio=ratio, decay_type=shape, min_lr_factor=least)  # type: ignore[arg-type]
        got = [learning_rate_factor(c, step + 1, 20) for step in range(20)]
        assert got == pytest.approx([torchtitan(step, 20, warmup, ratio, shape, least) for step in range(20)]), c
        assert max(got) == 1.0 and min(got) > 0


def test_three_phases_by_hand() -> None:
    c = LRScheduler(warmup_steps=2, decay_ratio=0.4, min_lr_factor=0.2)
    got = [learning_rate_factor(c, step, 10) for step in range(1, 11)]
    assert got == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4])


def test_schedule_of_its_own_length() -> None:
    """total_steps takes the place of training.steps; beyond it the least rate stays."""
    c = LRScheduler(warmup_steps=1, total_steps=5, min_lr_factor=0.1)
    assert learning_rate_factor(c, 3, 1000) == learning_rate_factor(c, 3, 5) < 1
    assert [learning_rate_factor(c, step, 1000) for step in (6, 7, 500)] == pytest.approx([0.1] * 3)


class Tiny(nn.Module):
    """What `build_optimizers` needs of a ParallelModel, with a second copy of a tied matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.embed, self.head = nn.LayerNorm(3, bias=False), nn.Linear(3, 3, False), nn.Linear(3, 3, False)
        self.parts, self.aliases = [self], {"head.weight": "embed.weight"}


def shrunk(exclude: list[str]) -> dict[str, float]:
    """Share that a step at learning rate 0.1 with decay 0.5 and no gradient leaves of each parameter."""
    model = Tiny()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    (optimizer,) = build_optimizers(model, Optimizer(lr=0.1, weight_decay=0.5, weight_decay_exclude=exclude))  # type: ignore[arg-type]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    return {name: (p.detach() / before[name]).mean().item() for name, p in model.named_parameters()}


def test_weight_decay_exclude() -> None:
    assert shrunk([]) == pytest.approx({"norm.weight": 0.95, "embed.weight": 0.95, "head.weight": 0.95})
    assert shrunk(["*norm*"]) == pytest.approx({"norm.weight": 1.0, "embed.weight": 0.95, "head.weight": 0.95})
    # A tied copy goes by the name of the matrix, so that both copies stay the same.
    assert shrunk(["embed.*"]) == pytest.approx({"norm.weight": 0.95, "embed.weight": 1.0, "head.weight": 1.0})
    assert shrunk(["*"]) == pytest.approx({"norm.weight": 1.0, "embed.weight": 1.0, "head.weight": 1.0})
