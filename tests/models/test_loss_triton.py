"""The Triton kernel of the loss, in Triton's interpreter, against float64."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_loss import CHUNK, VARIANTS, chunked, exact, inputs, relative_error  # type: ignore[import-not-found]

from dtron.models.loss import VocabularyShard, cross_entropy
from dtron.models.variants import Variant

pytest.importorskip("triton", reason="triton, which torch for CPUs comes without, is not installed")


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Any:
    """With blocks of fewer columns than the vocabulary has."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("run with TRITON_INTERPRET=1, or on a machine without a GPU")
    from dtron.models import loss_triton

    monkeypatch.setattr(loss_triton, "BLOCK", 64)
    return loss_triton.triton_kernel


@pytest.mark.parametrize("name", VARIANTS)
def test_losses_and_gradients_are_those_of_float64(kernel: Any, name: str):
    for got, expected in zip(chunked(VARIANTS[name], kernel=kernel), exact(VARIANTS[name]), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)


def test_in_bf16_it_is_nearly_as_exact_as_the_plain_loss(kernel: Any):
    """The interpreter cuts what it stores in bf16 off, where a GPU rounds it."""
    expected = exact(Variant(), False, torch.bfloat16)
    got = chunked(Variant(), False, torch.bfloat16, kernel=kernel)
    hidden, weight, _, labels = inputs(torch.bfloat16, False)
    (cross_entropy(F.linear(hidden, weight)[None], labels[None]).sum() / 77).backward()
    for ours, plain, truth in zip(got[1:], (hidden.grad, weight.grad), expected[1:], strict=True):
        assert relative_error(ours, truth) < 1.5 * relative_error(plain, truth)


def test_shards_of_the_vocabulary_give_the_whole(kernel: Any):
    hidden, weight, bias, labels = inputs()
    logits = F.linear(hidden, weight, bias).detach()[:CHUNK]
    labels = labels[:CHUNK]
    shards = [shard.clone() for shard in logits.split([60, 43], 1)]
    top = logits.amax(-1)
    parts: list[torch.Tensor] = []

    def run(total: Callable[[torch.Tensor], Any], gradient: bool) -> list[torch.Tensor]:
        places = [VocabularyShard(first, lambda _: top, total) for first in (0, 60)]
        return [
            kernel(shard, labels, torch.tensor(1 / 77), Variant(), place, gradient)
            for shard, place in zip(shards, places, strict=True)
        ]

    def note(part: torch.Tensor) -> torch.Tensor:
        parts.append(part)
        return part

    run(note, False)
    for losses in run(lambda _: parts[0] + parts[1], True):
        torch.testing.assert_close(losses.double(), exact(Variant())[0][:CHUNK], rtol=1e-5, atol=1e-6)
    plain = F.cross_entropy(logits.requires_grad_(), labels, reduction="sum") / 77
    torch.testing.assert_close(torch.cat(shards, 1), *torch.autograd.grad(plain, logits), rtol=1e-5, atol=1e-7)
