"""Activation recomputation: what the backward computes again instead of keeping in memory.

full: a block keeps its input only (Chen et al. 2016, arXiv 1604.06174). every n-th: the same for one
block in n. by operation: a block keeps the results that are dear to make, matmuls, attention and
reduce-scatters, and recomputes the cheap rest. Of the matmuls, `o` and `down` are recomputed all the same: their
results are summed into the residual stream, so nothing else needs them in the backward,
and with tensor parallel what follows them, the reduce-scatter, is kept.
"""

from collections import Counter
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from dtron import compat

__all__ = ["apply_recompute"]

_MATMUL = torch.ops.aten.mm.default
_KEPT = {
    compat.cpu_flash_attention,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.higher_order.flex_attention,
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
}
_RECOMPUTED_MATMULS = ("o_proj", "down_proj")


def apply_recompute(block: nn.Module, index: int, mode: str, option: str) -> nn.Module:
    """`block`, or a wrapper that recomputes it; index: the block's place, mode and option: [activation_checkpoint]."""
    if mode == "selective" and option == "op":
        linears = [name for name, module in block.named_modules() if isinstance(module, nn.Linear)]
        recomputed = frozenset(i for i, name in enumerate(linears) if name.endswith(_RECOMPUTED_MATMULS))
        contexts = partial(_selective_contexts, recomputed)
        return compat.checkpoint_wrapper(block, preserve_rng_state=False, context_fn=contexts)
    if mode == "full" or (mode == "selective" and index % int(option) == 0):
        return compat.checkpoint_wrapper(block, preserve_rng_state=False)
    return block


def _selective_contexts(recomputed: frozenset[int]) -> Any:
    """The contexts of one forward and its recomputation: matmuls are told apart by their order in the block."""
    seen: Counter[bool] = Counter()

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        keep = op in _KEPT
        if op is _MATMUL:
            keep = seen[ctx.is_recompute] not in recomputed
            seen[ctx.is_recompute] += 1
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
