"""A step on real ranks, as a dry run takes it to be: rows that are alike, experts in balance."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from dtron.data.loader import Batch
from dtron.models import moe
from dtron.plan.dryrun import build_step
from dtron.train.setup import Setup
from dtron.train.step import Step


def step_and_batch(setup: Setup) -> tuple[Step, Batch]:
    """On this rank of a started process group."""
    step = build_step(setup, contextlib.nullcontext)
    with torch.no_grad():
        for _, p in step.model.named_parameters():
            p.fill_(0.01)
    rows = step.config.training.global_batch_size // setup.degrees.dp
    tokens, labels = torch.zeros(2, rows, step.config.training.seq_len, dtype=torch.int64).unbind()
    return step, Batch(tokens, labels)


@contextlib.contextmanager
def balanced_experts() -> Iterator[None]:
    """Every expert is chosen as often as the others; the router's choice is made too, for the memory it needs."""
    choose = moe.choose_experts

    def chosen(scores: Tensor, bias: Tensor | None, c: moe.MoEConfig) -> Tensor:
        out = choose(scores, bias, c)
        return out.copy_(torch.arange(out.numel()).remainder_(c.n_experts).view(out.shape))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moe, "choose_experts", chosen)
        yield
