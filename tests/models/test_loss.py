"""The chunked loss against float64, and that no whole logits exist."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dtron.models.loss import IGNORE_INDEX, VocabularyShard, cross_entropy, linear_cross_entropy, torch_kernel
from dtron.models.variants import Variant, scale_logits

TOKENS, DIM, VOCABULARY, CHUNK = 90, 16, 103, 32  # chunks of 30, 30 and 30
VARIANTS = {
    "plain": Variant(),
    "multiplied": Variant(logits_multiplier=0.3),
    "capped": Variant(logits_multiplier=1.7, logits_softcap=2.5),
}


def inputs(dtype: torch.dtype = torch.float32, bias: bool = True) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """hidden [N, E], weight [V, E], bias [V], which require gradients, and labels [N]."""
    random = torch.Generator().manual_seed(0)
    shapes = [(TOKENS, DIM), (VOCABULARY, DIM), *[(VOCABULARY,)] * bias]
    made = [torch.randn(shape, generator=random).to(dtype).requires_grad_() for shape in shapes]
    labels = torch.randint(0, VOCABULARY, (TOKENS,), generator=random)
    labels[::7] = IGNORE_INDEX
    return made[0], made[1], made[2] if bias else None, labels


def exact(variant: Variant, bias: bool = True, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Losses and gradients by autograd in float64, of inputs rounded to dtype."""
    hidden, weight, b, labels = inputs(dtype, bias)
    leaves = [t.detach().double().requires_grad_() for t in (hidden, weight, b) if t is not None]
    logits = scale_logits(variant, F.linear(*leaves))
    losses = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="none")
    return [losses.detach(), *torch.autograd.grad(losses.sum() / 77, leaves)]


def chunked(variant: Variant, bias: bool = True, dtype: torch.dtype = torch.float32, **more: Any) -> list[Tensor]:
    hidden, weight, b, labels = inputs(dtype, bias)
    loss, losses = linear_cross_entropy(hidden, weight, b, labels, torch.tensor(1 / 77), CHUNK, variant, **more)
    torch.testing.assert_close(loss, losses.sum() / 77)
    assert loss.dtype == losses.dtype == torch.float32 and not losses.requires_grad
    (2 * loss).backward()  # the gradient that comes in is used
    return [losses, *(t.grad / 2 for t in (hidden, weight, b) if t is not None)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_losses_and_gradients_are_those_of_float64(name: str, bias: bool):
    for got, expected in zip(chunked(VARIANTS[name], bias), exact(VARIANTS[name], bias), strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)


def test_compiled_it_is_the_same():
    kernel = torch.compile(torch_kernel, backend="aot_eager", fullgraph=True, dynamic=False)
    for name in ("plain", "capped"):
        for got, expected in zip(chunked(VARIANTS[name], kernel=kernel), exact(VARIANTS[name]), strict=True):
            torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got.detach().double() - expected).norm() / expected.norm())


def test_in_bf16_it_is_no_less_exact_than_the_plain_loss():
    """Sums over chunks are fp32: one rounding of the weight's gradient, however many chunks."""
    expected, got = exact(Variant(), False, torch.bfloat16), chunked(Variant(), False, torch.bfloat16)
    hidden, weight, _, labels = inputs(torch.bfloat16, False)
    losses = cross_entropy(F.linear(hidden, weight)[None], labels[None])[0]
    (losses.sum() / 77).backward()
    for ours, plain, truth in zip(got, (losses, hidden.grad, weight.grad), expected, strict=True):
        assert ours.dtype == plain.dtype
        assert relative_error(ours, truth) < 1.05 * relative_error(plain, truth)


class Largest(TorchDispatchMode):
    """The most elements of a tensor that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.elements = max(self.elements, *(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor)), 0)
        return out


@pytest.mark.parametrize("gradients", [False, True])
def test_no_logits_exist_but_those_of_a_chunk(gradients: bool):
    hidden, weight, bias, labels = inputs()
    with Largest() as largest, torch.set_grad_enabled(gradients):
        loss, _ = linear_cross_entropy(hidden, weight, bias, labels, torch.tensor(1.0), CHUNK)
        if gradients:
            loss.backward()
    assert largest.elements == 30 * VOCABULARY  # not TOKENS * VOCABULARY


def test_shards_of_the_vocabulary_give_the_whole():
    hidden, weight, bias, labels = inputs()
    logits = F.linear(hidden, weight, bias).detach()
    top = logits.amax(-1)
    own = logits.gather(1, labels.clamp(min=0)[:, None])[:, 0]
    sums = torch.stack(((logits - top[:, None]).exp().sum(-1), torch.where(labels < 0, 0.0, own - top)))
    shards, parts = logits.split([60, 43], 1), []

    def total(numbers: Tensor) -> Tensor:
        parts.append(numbers)
        return sums

    gradients = [shard.clone() for shard in shards]
    for first, shard in zip((0, 60), gradients, strict=True):
        here = VocabularyShard(first, lambda _: top, total)
        losses = torch_kernel(shard, labels, torch.tensor(1 / 77), Variant(), here, True)
        torch.testing.assert_close(losses.double(), exact(Variant())[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(parts[0] + parts[1], sums)
    plain = F.cross_entropy(logits.requires_grad_(), labels, ignore_index=IGNORE_INDEX, reduction="sum") / 77
    torch.testing.assert_close(torch.cat(gradients, 1), *torch.autograd.grad(plain, logits), rtol=1e-5, atol=1e-7)
