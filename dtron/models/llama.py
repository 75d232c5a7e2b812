"""Llama in plain PyTorch: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Single-device code that knows nothing of parallelism. Two properties make it easy to split from
outside: a child that is None is skipped (a pipeline stage keeps its own children only), and
positions are an argument (a context-parallel rank holds a part of the sequence).
Parameter names and the rotary layout are those of Hugging Face's LlamaForCausalLM without the
`model.` prefix, so weights need no permutation. Sources: Touvron et al. 2023 (arXiv 2302.13971),
Su et al. 2021 (RoPE, arXiv 2104.09864), Dubey et al. 2024 (arXiv 2407.21783); for the flags, the Qwen
team 2024 (Qwen2, arXiv 2407.10671) and 2025 (Qwen3, arXiv 2505.09388).

Shape letters: B sequences, S tokens, E hidden size, H query heads, K key/value heads, D head size.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from dtron.models.moe import MixtureOfExperts, MoEConfig

__all__ = [
    "AttentionMask",
    "CausalAttention",
    "Llama",
    "LlamaConfig",
    "NormOfHeads",
    "RopeScaling",
    "document_mask",
    "rope_frequencies",
]

AttentionMask = Tensor | BlockMask  # from document_mask


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretching of the low rotary frequencies (arXiv 2407.21783, HF `rope_type = "llama3"`)."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclass(frozen=True)
class LlamaConfig:
    """Dimensions of a Llama-like model, and the flags that make it another family's."""

    vocab_size: int
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    ffn_dim: int
    head_dim: int | None = None  # dim / n_heads by default
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    qkv_bias: bool = False  # Qwen2's
    qk_norm: bool = False  # Qwen3's: queries and keys normalised per head
    qk_norm_whole: bool = False  # OLMoE's: over all heads together
    moe: MoEConfig | None = None  # a mixture of experts in place of the feed-forwards
    init_std: float = 0.02

    @property
    def head_size(self) -> int:
        return self.head_dim or self.dim // self.n_heads


def rope_frequencies(config: LlamaConfig, device: torch.device | None = None) -> Tensor:
    """Rotary angular frequencies, in radians per token: [D/2] in fp32."""
    d = config.head_size
    freq = config.rope_theta ** (-torch.arange(0, d, 2, device=device, dtype=torch.float32) / d)  # [D/2]
    if (s := config.rope_scaling) is None:
        return freq
    # Wavelengths beyond the trained context are stretched by `factor`, short ones kept, those between blended.
    turns = s.original_max_position * freq / (2 * math.pi)
    blend = ((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)).clamp(0, 1)
    return freq * (blend + (1 - blend) / s.factor)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [B, S, heads, D] by cos, sin [B, S, 1, D/2]; in fp32, back in x's dtype."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).type_as(x)


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


class NormOfHeads(nn.RMSNorm):
    """Of queries or keys, over all heads together (OLMoE). Its type tells tensor parallel, which splits the heads."""


class Attention(nn.Module):
    def __init__(self, c: LlamaConfig) -> None:
        super().__init__()
        self.head_size = c.head_size
        self.q_proj = nn.Linear(c.dim, c.n_heads * c.head_size, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.dim, c.n_kv_heads * c.head_size, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.dim, c.n_kv_heads * c.head_size, bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.n_heads * c.head_size, c.dim, bias=False)
        self.q_norm = self.k_norm = None
        if c.qk_norm:
            self.q_norm, self.k_norm = (nn.RMSNorm(c.head_size, eps=c.norm_eps) for _ in range(2))
        if c.qk_norm_whole:
            self.q_norm = NormOfHeads(c.n_heads * c.head_size, eps=c.norm_eps)
            self.k_norm = NormOfHeads(c.n_kv_heads * c.head_size, eps=c.norm_eps)
        self.core = CausalAttention()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: AttentionMask | None) -> Tensor:  # x [B, S, E]
        # The number of heads is read from the projection: under tensor parallel it is this rank's number.
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)  # [B, S, H * D], twice [B, S, K * D]
        if isinstance(self.q_norm, NormOfHeads) and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (part.unflatten(-1, (-1, self.head_size)) for part in (q, k, v))  # [B, S, H, D], twice [B, S, K, D]
        if self.q_norm is not None and self.k_norm is not None and not isinstance(self.q_norm, NormOfHeads):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        out = self.core(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask)  # [B, H, S, D]
        projected: Tensor = self.o_proj(out.transpose(1, 2).flatten(2))  # [B, S, E]
        return projected


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate x) * up x)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # [B, S, E]
        projected: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return projected


class Block(nn.Module):
    def __init__(self, c: LlamaConfig, index: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(c.dim, eps=c.norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = nn.RMSNorm(c.dim, eps=c.norm_eps)
        self.mlp: nn.Module
        if c.moe is None or index < c.moe.n_dense_layers:
            self.mlp = FeedForward(c.dim, c.ffn_dim)
        else:
            shared = FeedForward(c.dim, c.moe.shared_dim) if c.moe.shared_dim else None
            self.mlp = MixtureOfExperts(c.dim, c.moe, shared)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: AttentionMask | None = None) -> Tensor:
        """x [B, S, E], cos and sin [B, S, 1, D/2], mask from document_mask -> [B, S, E]."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x


class Llama(nn.Module):
    """The whole model; a pipeline stage is the same object with the other stages' children set to None or removed."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleDict({str(i): Block(config, i) for i in range(config.n_layers)})
        self.norm = nn.RMSNorm(config.dim, eps=config.norm_eps)
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(
        self, x: Tensor, positions: Tensor | None = None, document_start: Tensor | None = None,
        keys: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Token ids [B, S] (or a stage's hidden states [B, S, E]) -> logits [B, S, V] (or hidden states).

        positions: [B, S] of the tokens in their sequence; 0..S-1 where not given.
        document_start: [B, S] the position at which each token's document starts. Where given, attention stays inside
        a document and the rotary embedding counts from its start.
        keys: [B, 2, Sk] document_start and positions of the keys' tokens, where they are not those of x.
        """
        if positions is None:
            positions = torch.arange(x.size(1), device=x.device).expand(x.size(0), -1)
        mask = None
        if document_start is not None:
            keys = torch.stack((document_start, positions), 1) if keys is None else keys
            mask = document_mask(document_start, positions, keys)
            positions = positions - document_start
        angle = positions[..., None, None].float() * rope_frequencies(self.config, positions.device)  # [B, S, 1, D/2]
        cos, sin = angle.cos(), angle.sin()
        h: Tensor = x if self.embed_tokens is None else self.embed_tokens(x)  # [B, S, E]
        for block in self.layers.values():
            h = block(h, cos, sin, mask)
        h = h if self.norm is None else self.norm(h)
        h = h if self.lm_head is None else self.lm_head(h)  # [B, S, V]
        return h
