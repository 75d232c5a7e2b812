"""Causal attention, and the masks of packed documents.

Shape letters: B sequences, S tokens, H query heads, K key/value heads, D head size.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

__all__ = ["AttentionMask", "CausalAttention", "document_mask"]

AttentionMask = Tensor | BlockMask  # from document_mask


@cache
def _compiled(function: Any) -> Any:
    """FlexAttention and its masks are fast, and use little memory, only when compiled."""
    return torch.compile(function)


def document_mask(document_start: Tensor, positions: Tensor, keys: Tensor) -> AttentionMask:
    """Who may attend to whom: a token to those of its own document, up to itself.

    document_start, positions: [B, Sq] of the queries' tokens; keys: [B, 2, Sk], the same two of the keys' tokens.
    Returns, on CPU, bool [B, 1, Sq, Sk] for scaled_dot_product_attention; on CUDA FlexAttention's block-sparse
    mask, with which blocks between different documents are not computed (Dong et al. 2024, arXiv 2412.05496).
    """
    key_start, key_positions = keys.unbind(1)  # [B, Sk] each
    if not document_start.is_cuda:
        same_document = document_start[:, :, None] == key_start[:, None]  # [B, Sq, Sk]
        return (same_document & (positions[:, :, None] >= key_positions[:, None]))[:, None]  # [B, 1, Sq, Sk]

    def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (document_start[b, q] == key_start[b, k]) & (positions[b, q] >= key_positions[b, k])

    sizes = document_start.size(0), None, document_start.size(1), keys.size(2)
    block_mask: BlockMask = _compiled(create_block_mask)(allowed, *sizes, document_start.device)
    return block_mask


class CausalAttention(nn.Module):
    """softmax(QK^T / sqrt(D)) V with a causal mask, or a document mask.

    A module, so that context parallel can wrap just this.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None = None) -> Tensor:
        """q [B, H, S, D], k and v [B, K, S, D], mask from document_mask -> [B, H, S, D]."""
        grouped = q.size(1) != k.size(1)
        if isinstance(mask, BlockMask):
            attend = flex_attention if torch.compiler.is_compiling() else _compiled(flex_attention)
            out: Tensor = attend(q, k, v, block_mask=mask, enable_gqa=grouped)
            return out
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
