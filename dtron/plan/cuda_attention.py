"""Attention with a mask as it is on CUDA, for dry runs: FlexAttention saves its output and one fp32 number a row.

On a CPU such attention has all its scores in memory, or a dense mask. FlexAttention's kernels do not run without a GPU,
so the flash operator stands in for them, which saves and returns as much.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from dtron.models import llama
from dtron.models.attention import CausalAttention

__all__ = ["flex_attention_stand_in"]

BLOCK = 128  # rows and columns of one entry in FlexAttention's mask
INDICES = 4  # int32 for each block: of partial and full ones, by rows and by columns


@contextlib.contextmanager
def flex_attention_stand_in() -> Iterator[None]:
    """Let masks and attention that has one take as much memory as on CUDA."""
    forward = CausalAttention.forward

    def attend(
        self: CausalAttention, q: Tensor, k: Tensor, v: Tensor, mask: Any = None, sinks: Tensor | None = None
    ) -> Tensor:
        if mask is None:
            return forward(self, q, k, v)
        causal, groups = q.size(2) == k.size(2), q.size(1) != k.size(1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=self.scale, enable_gqa=groups)
        if sinks is None:
            return out
        lse = q.new_empty(q.shape[:3], dtype=torch.float32)
        return out * torch.sigmoid(lse - sinks.float()[:, None])[..., None].type_as(out)

    with patch.object(CausalAttention, "forward", attend), patch.object(llama, "attention_mask", _block_mask):
        yield


def _block_mask(
    window: int | None, positions: Tensor, document_start: Tensor | None = None, keys: Tensor | None = None
) -> Tensor | None:
    """Of the size of FlexAttention's mask where there is one; arguments as of `attention_mask`."""
    n_keys = positions.size(1) if keys is None else keys.size(2)
    if document_start is None and (window is None or window >= n_keys):
        return None
    blocks = -(-positions.size(1) // BLOCK), -(-n_keys // BLOCK)
    return positions.new_empty((positions.size(0), INDICES, *blocks), dtype=torch.int32)
