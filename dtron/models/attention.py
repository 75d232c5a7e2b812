"""Causal attention: the masks of packed documents and sliding windows, a scale, a soft cap and attention sinks.

Sources: for the windows Jiang et al. 2023 (Mistral, arXiv 2310.06825); for the soft cap the Gemma team 2024 (Gemma 2,
arXiv 2408.00118); for the sinks OpenAI 2025 (gpt-oss, arXiv 2508.10925).

Shape letters: B sequences, S tokens, H query heads, K key/value heads, D head size.
"""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

__all__ = ["AttentionMask", "AttentionSinks", "CausalAttention", "attention_mask", "dense_mask"]

AttentionMask = Tensor | BlockMask  # from attention_mask


@cache
def _compiled(function: Any) -> Any:
    """FlexAttention and its masks are fast, and use little memory, only when compiled."""
    return torch.compile(function)


def attention_mask(
    window: int | None, positions: Tensor, document_start: Tensor | None = None, keys: Tensor | None = None
) -> AttentionMask | None:
    """Who may attend to whom: a token to the last `window` ones of its own document, itself among them.

    positions: [B, Sq] of the queries' tokens; document_start [B, Sq] and keys [B, 2, Sk]: see `Llama.forward`.
    Returns None where causal order says it all; else, on CPU, bool [B, 1, Sq, Sk] for scaled_dot_product_attention, and
    on CUDA FlexAttention's block-sparse mask, with which blocks between different documents, or outside the window,
    are not computed (Dong et al. 2024, arXiv 2412.05496).
    """
    key_positions = positions if keys is None else keys[:, 1]  # [B, Sk]
    # A document is a run of positions, so the first token that a query sees says everything.
    first = document_start
    if window is not None and window < key_positions.size(1):
        first = positions - window + 1
        first = first if document_start is None else torch.maximum(first, document_start)
    if first is None:
        return None
    if not first.is_cuda:
        return dense_mask(first, positions, key_positions)
    seen_from = first

    def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (key_positions[b, k] >= seen_from[b, q]) & (key_positions[b, k] <= positions[b, q])

    sizes = positions.size(0), None, positions.size(1), key_positions.size(1)
    block_mask: BlockMask = _compiled(create_block_mask)(allowed, *sizes, first.device)
    return block_mask


def dense_mask(first: Tensor, positions: Tensor, key_positions: Tensor) -> Tensor:
    """bool [B, 1, Sq, Sk]: keys from position `first` [B, Sq] to that of the query itself."""
    visible = (key_positions[:, None] >= first[:, :, None]) & (key_positions[:, None] <= positions[:, :, None])
    return visible[:, None]


class AttentionSinks(nn.Module):
    """A logit of every query head for nothing at all: a head's weights over the keys may then add up to less than 1."""

    def __init__(self, n_heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_heads).normal_(0, 0.02))

    def forward(self) -> Tensor:
        """[H]; under tensor parallel, of this rank's heads."""
        return self.weight


class CausalAttention(nn.Module):
    """softmax(scale QK^T) V with a causal mask or the one given. A module, so that context parallel can wrap just this.

    scale: 1 / sqrt(D) by default. softcap: C, scores x become C tanh(x / C).
    """

    def __init__(self, scale: float | None = None, softcap: float | None = None) -> None:
        super().__init__()
        self.scale, self.softcap = scale, softcap

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None = None, sinks: Tensor | None = None
    ) -> Tensor:
        """q [B, H, S, D], k and v [B, K, S, D], mask from attention_mask, sinks [H] -> [B, H, S, D].

        With a soft cap or sinks a mask is needed: `Llama.forward` makes one.
        """
        if isinstance(mask, BlockMask):
            return self._flex(q, k, v, mask, sinks)
        if self.softcap is None and sinks is None:
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale, enable_gqa=q.size(1) != k.size(1)
            )
        assert mask is not None
        return self.in_steps(q, k, v, mask, sinks)

    def in_steps(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sinks: Tensor | None) -> Tensor:
        """By the formula, with all scores in memory: what no kernel of the CPU has. mask: bool, of [B, H, Sq, Sk]."""
        k, v = (part.repeat_interleave(q.size(1) // k.size(1), 1) for part in (k, v))
        scores = (q @ k.mT).float() * (q.size(-1) ** -0.5 if self.scale is None else self.scale)  # [B, H, Sq, Sk]
        scores = self._capped(scores).masked_fill(~mask, -torch.inf)
        if sinks is not None:
            column = sinks.float()[:, None, None].expand(*scores.shape[:3], 1)
            scores = torch.cat((scores, column), -1)
        weights = scores.softmax(-1)[..., : k.size(2)].type_as(v)
        return weights @ v

    def _flex(self, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, sinks: Tensor | None) -> Tensor:
        attend = flex_attention if torch.compiler.is_compiling() else _compiled(flex_attention)
        modify = None if self.softcap is None else lambda score, b, h, i, j: self._capped(score)
        more = {"block_mask": mask, "scale": self.scale, "enable_gqa": q.size(1) != k.size(1)}
        if sinks is None:
            out: Tensor = attend(q, k, v, modify, **more)
            return out
        out, aux = attend(q, k, v, modify, **more, return_aux=AuxRequest(lse=True))
        # exp(lse) / (exp(lse) + exp(sink)) is the keys' share of all weights.
        return out * torch.sigmoid(aux.lse - sinks.float()[:, None])[..., None].type_as(out)

    def _capped(self, scores: Tensor) -> Tensor:
        return scores if self.softcap is None else self.softcap * torch.tanh(scores / self.softcap)
