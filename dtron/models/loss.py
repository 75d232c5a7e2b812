"""Cross-entropy of the next token: of whole logits, or with the head in chunks, so that whole logits never exist.

The logits of a microbatch are the largest tensor of a training: 2048 tokens of a 128k vocabulary take 0.5 GB in bf16,
and a plain loss holds them several times, in fp32 too. In chunks there are those of `rows` tokens at a time, and their
gradient is written over them at once: the head's forward and backward, and the loss between, are one function, which
keeps the gradients of hidden states and head until the backward asks for them. Nothing is computed twice. (Hsu et al.
2024, arXiv 2410.10989; Wijmans et al. 2024, arXiv 2411.09009.)

Losses and the sums over chunks are fp32; products have the dtype of the hidden states, as a plain head's have.

Shape letters: N tokens, C tokens of a chunk, E hidden size, V vocabulary, or a rank's shard of it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from dtron.models.variants import Variant, logits_slope, scale_logits

__all__ = ["IGNORE_INDEX", "Kernel", "VocabularyShard", "cross_entropy", "linear_cross_entropy", "torch_kernel"]

IGNORE_INDEX = -100  # label of a position without loss: the default of torch's cross entropy


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p(label) of every token [B, S], in fp32; logits [B, S, V], labels [B, S]; 0 where IGNORE_INDEX."""
    flat = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="none")
    return flat.view(labels.shape)


def _alone(numbers: Tensor) -> Tensor:
    return numbers


@dataclass(frozen=True)
class VocabularyShard:
    """Which rows of the head are here: those from `first` on; by default all.

    maximum, total: [C] or [2, C] fp32 -> the same over all shards.
    """

    first: int = 0
    maximum: Callable[[Tensor], Tensor] = _alone
    total: Callable[[Tensor], Tensor] = _alone


# (logits [C, V], labels [C], scale [], variant, shard, gradient) -> losses [C] in fp32, 0 where IGNORE_INDEX. Where
# `gradient` is true, that of scale * the sum of the losses is written over the logits.
Kernel = Callable[[Tensor, Tensor, Tensor, Variant, VocabularyShard, bool], Tensor]


def torch_kernel(
    logits: Tensor, labels: Tensor, scale: Tensor, variant: Variant, shard: VocabularyShard, gradient: bool
) -> Tensor:
    """The `Kernel` in torch's operations; in eager it takes 4 bytes more for each logit, compiled none."""
    slope = logits_slope(variant, logits) if gradient else None
    x = scale_logits(variant, logits.float())  # [C, V]; in fp32 and unscaled these are the logits themselves
    top = shard.maximum(x.amax(-1))  # [C]
    at = labels - shard.first
    here, at = (at >= 0) & (at < x.size(1)), at.clamp(0, x.size(1) - 1)[:, None]
    x = x.sub_(top[:, None])
    own = torch.where(here, x.gather(1, at)[:, 0], 0.0)
    x = x.exp_()
    sums, own = shard.total(torch.stack((x.sum(-1), own))).unbind()
    valid = labels != IGNORE_INDEX
    if gradient:  # of each logit: scale * (its probability - 1 where it is the label's)
        weight = torch.where(valid, scale, 0.0)
        x = _subtract_at(x.mul_((weight / sums)[:, None]), at, torch.where(here, weight, 0.0)[:, None])
        logits.copy_(x if slope is None else x.mul_(slope))
    return torch.where(valid, sums.log() - own, 0.0)


def _subtract_at(x: Tensor, at: Tensor, value: Tensor) -> Tensor:
    """x [C, V] less value [C, 1] in column at [C, 1] of each row."""
    if torch.compiler.is_compiling():  # a comparison is part of the kernel around it, a scatter is one of its own
        return torch.where(torch.arange(x.size(1), device=x.device) == at, x - value, x)
    return x.scatter_add_(1, at, -value)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to total, which is fp32, in place, without rounding the product."""
    if a.is_cuda and a.dtype != total.dtype:  # cuBLAS sums 16-bit products in fp32; so do torch 2.11 to 2.13
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        torch.addmm(total, a.to(total.dtype), b.to(total.dtype), out=total)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, scale: Tensor, rows: int,
        kernel: Callable[[Tensor, Tensor, Tensor, bool], Tensor], gradients: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        losses = torch.empty(labels.shape, dtype=torch.float32, device=labels.device)
        ctx.mark_non_differentiable(losses)
        chunks = -(-len(labels) // rows)
        if not gradients:
            for h, y, out in zip(*(t.chunk(chunks) for t in (hidden, labels, losses)), strict=True):
                out.copy_(kernel(F.linear(h, weight, bias), y, scale, False))
            return losses.sum() * scale, losses
        of_hidden = torch.empty_like(hidden)
        of_weight = torch.zeros_like(weight, dtype=torch.float32)
        of_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        for h, g, y, out in zip(*(t.chunk(chunks) for t in (hidden, of_hidden, labels, losses)), strict=True):
            logits = F.linear(h, weight, bias)  # [C, V], from the kernel on their gradient
            out.copy_(kernel(logits, y, scale, True))
            torch.mm(logits, weight, out=g)
            _add_product(of_weight, logits.t(), h)
            if of_bias is not None:
                of_bias += logits.sum(0, dtype=torch.float32)
            del logits  # else it would be there beside the next
        # In the dtype that autograd wants: with a pipeline many microbatches may wait for their backward.
        ctx.save_for_backward(of_hidden, of_weight.to(weight.dtype), None if bias is None else of_bias.to(bias.dtype))  # type: ignore[union-attr]
        return losses.sum() * scale, losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        made = (None if t is None else t * gradients[0].to(t.dtype) for t in ctx.saved_tensors)
        return (*made, None, None, None, None, None)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, scale: Tensor, rows: int,
    variant: Variant = Variant(), shard: VocabularyShard = VocabularyShard(), kernel: Kernel = torch_kernel,  # noqa: B008
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(scale * the sum of all losses [], losses [N] without gradient), both fp32, of the head's logits in chunks.

    hidden [N, E], weight [V, E], bias [V], labels [N], scale [] fp32. rows: most tokens of a chunk; chunks are of equal
    size. With a shard of the vocabulary, labels are of the whole one, and the gradient of hidden is this shard's part.
    """

    def of_chunk(logits: Tensor, labels: Tensor, scale: Tensor, gradient: bool) -> Tensor:
        return kernel(logits, labels, scale, variant, shard, gradient)

    # Inside of a Function it is always off, and needs_input_grad is true even in evaluations.
    gradients = torch.is_grad_enabled()
    made = _LinearCrossEntropy.apply(hidden, weight, bias, labels, scale, rows, of_chunk, gradients)  # type: ignore[no-untyped-call]
    return cast(tuple[Tensor, Tensor], made)
