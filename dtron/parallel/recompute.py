"""Activation recomputation: what the backward computes again instead of keeping in memory.

full: a block keeps its input only (Chen et al. 2016, arXiv 1604.06174). every n-th: the same for one block in n.
by operation: a block keeps the results that are expensive to compute, those of matmuls, attention, reduce-scatters and
all-to-alls, and recomputes the cheap rest. Of the matmuls, `o` and `down` are not kept: their
results are added to the residual stream, so nothing else needs them in the backward, and with tensor parallel
what follows them, the reduce-scatter, is kept. Where a norm follows they are needed, and kept without tensor parallel.
memory budget: the compiler chooses what a block keeps, by a share of its bytes, and does it all.

The state of the random number generators is restored for every recomputation, whatever the model: a model from
outside, or one that a converter changed, may draw random numbers anywhere (dropout, for example), and a recomputation
that draws other ones gives wrong gradients silently. It costs microseconds per block.
"""

import logging
from collections import Counter
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from dtron import compat
from dtron.compat import ring  # noqa: F401 dtron::ring_attention
from dtron.models import moe  # and with it dtron::grouped_product
from dtron.models.flops import matmul_parameters

__all__ = ["apply_recompute", "recomputed_flops_per_token"]

# Of an nn.Linear without and with a bias, and in float8.
_MATMULS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten._scaled_mm.default}
_KEPT = {
    compat.cpu_flash_attention,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.higher_order.flex_attention,
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
    torch.ops._c10d_functional.all_to_all_single.default,
    torch.ops._dtensor.shard_dim_alltoall.default,
    torch.ops.aten._grouped_mm.default,
    torch.ops.aten._scaled_grouped_mm.default,
    torch.ops.dtron.grouped_product.default,
    torch.ops.dtron.ring_attention.default,
}
_RECOMPUTED_MATMULS = ("o_proj", "down_proj")


def apply_recompute(block: nn.Module, index: int, mode: str, option: str) -> nn.Module:
    """`block`, or a wrapper that recomputes it; index: of the block in the model; mode, option: of the configuration.

    They are activation_checkpoint.mode and activation_checkpoint.selective_ac_option.
    """
    if mode == "selective" and option == "op":
        # Every rank that compiles would warn of operations in place, which blocks do not have.
        logging.getLogger("torch._higher_order_ops.wrap").addFilter(_is_no_known_warning)
        contexts = partial(_selective_contexts, _recomputed(block))
        return compat.checkpoint_wrapper(block, preserve_rng_state=True, context_fn=contexts)
    if mode == "full" or (mode == "selective" and index % int(option) == 0):
        return compat.checkpoint_wrapper(block, preserve_rng_state=True)
    return block


def _is_no_known_warning(record: logging.LogRecord) -> bool:
    return "context_fn is passed to torch.utils.checkpoint" not in record.getMessage()


def recomputed_flops_per_token(block: nn.Module, index: int, attention: float, mode: str, option: str) -> float:
    """FLOPs per token of one block that its backward computes again; the arguments are those of `apply_recompute`.

    attention: forward and backward FLOPs per token of the block's attention, of which the forward is a third. The last
    product, where only its sum with the residual is needed, is not computed again: recomputation stops before it.
    """
    linears = [m for m in block.modules() if isinstance(m, nn.Linear)]
    last = [block, *(m for m in block.modules() if isinstance(m, nn.Linear | moe.Experts))][-1]
    needed = hasattr(block, "post_feedforward_layernorm") or isinstance(last, moe.Experts)
    if mode == "selective" and option == "op":
        again = [linears[i] for i in sorted(_recomputed(block))]
        return 2.0 * sum(m.weight.numel() for m in again if needed or m is not last)
    if mode == "full" or (mode == "selective" and index % int(option) == 0):
        return 2.0 * (matmul_parameters(block) - (0 if needed else matmul_parameters(last))) + attention / 3
    return 0.0


def _recomputed(block: nn.Module) -> frozenset[int]:
    """The matmuls of a block that are not kept, by their order."""
    linears = [(name, module) for name, module in block.named_modules() if isinstance(module, nn.Linear)]
    norm_follows = hasattr(block, "post_feedforward_layernorm")
    return frozenset(
        i
        for i, (name, linear) in enumerate(linears)
        if name.endswith(_RECOMPUTED_MATMULS) and (isinstance(linear.weight, DTensor) or not norm_follows)
    )


def _selective_contexts(recomputed: frozenset[int]) -> Any:
    """The contexts of one forward and its recomputation: matmuls are identified by their order in the block."""
    seen: Counter[bool] = Counter()

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        keep = op in _KEPT and not _has_dropout(op, args, kwargs)
        if op in _MATMULS:
            keep = seen[ctx.is_recompute] not in recomputed
            seen[ctx.is_recompute] += 1
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)  # type: ignore[no-untyped-call]


def _has_dropout(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an attention operation has dropout. If it were kept, the recomputation would not draw its random numbers
    again, and what draws after it would get them.
    """
    schema = getattr(op, "_schema", None)  # flex_attention has none, and no dropout
    names = [argument.name for argument in schema.arguments] if schema else []
    given: dict[str, Any] = dict(zip(names, args, strict=False)) | kwargs
    return bool(given.get("dropout_p"))
