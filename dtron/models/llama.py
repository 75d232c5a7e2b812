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

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dtron.models.attention import AttentionMask, AttentionSinks, CausalAttention, attention_mask
from dtron.models.moe import MixtureOfExperts, MoEConfig
from dtron.models.rope import Rope, RopeScaling, rope_table, rotate
from dtron.models.variants import (
    NORMS,
    NormOfHeads,
    NormPerHead,
    Variant,
    activation,
    add_to_residual,
    make_norm,
    scale_embedding,
    scale_logits,
)

__all__ = ["Llama", "LlamaConfig"]


LLAMA = Variant()  # of no other family


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
    partial_rotary_factor: float = 1.0  # share of a head's values that are rotated
    ropes: tuple[str, ...] = ()  # repeating pattern over the layers of "global", "local", "none"; (): global
    local_rope_theta: float = 10000.0  # of "local" layers, which are not scaled (Gemma 3)
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    qkv_bias: bool = False  # Qwen2's
    o_bias: bool = False
    mlp_bias: bool = False  # of all three matrices of a feed-forward
    head_bias: bool = False
    qk_norm: bool = False  # Qwen3's: queries and keys normalised per head, with the same weights for all
    qk_norm_whole: bool = False  # OLMoE's: over all heads together
    windows: tuple[int | None, ...] = ()  # a pattern that repeats over the layers: see `window`; (): none anywhere
    attention_scale: float | None = None  # of the scores; 1 / sqrt(head size) by default
    attention_softcap: float | None = None  # Gemma 2's: scores x become cap * tanh(x / cap)
    attention_sinks: bool = False  # gpt-oss's: a learned logit per head beside those of the keys
    moe: MoEConfig | None = None  # a mixture of experts in place of the feed-forwards
    variant: Variant = Variant()  # norms, activation and multipliers that are not Llama's
    init_std: float = 0.02

    @property
    def head_size(self) -> int:
        return self.head_dim or self.dim // self.n_heads

    @property
    def all_ropes(self) -> set[Rope | None]:
        return {self.rope(layer) for layer in range(self.n_layers)}

    def rope(self, layer: int) -> Rope | None:
        """Rotary embedding of a layer; None: it has no positions."""
        kind = self.ropes[layer % len(self.ropes)] if self.ropes else "global"
        size = int(self.head_size * self.partial_rotary_factor)
        if kind == "local":
            return Rope(self.local_rope_theta, size)
        return None if kind == "none" else Rope(self.rope_theta, size, self.rope_scaling)

    def window(self, layer: int) -> int | None:
        """To how many of the last tokens a layer attends, the token itself among them; None: to all before it."""
        return self.windows[layer % len(self.windows)] if self.windows else None

    def needs_masks(self, seq_len: int) -> bool:
        """Whether attention is more than causal at this length: windows are shorter, or scores are changed."""
        short = any((self.window(i) or seq_len) < seq_len for i in range(self.n_layers))
        return short or self.attention_softcap is not None or self.attention_sinks


class Attention(nn.Module):
    def __init__(self, c: LlamaConfig) -> None:
        super().__init__()
        self.head_size = c.head_size
        self.q_proj = nn.Linear(c.dim, c.n_heads * c.head_size, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.dim, c.n_kv_heads * c.head_size, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.dim, c.n_kv_heads * c.head_size, bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.n_heads * c.head_size, c.dim, bias=c.o_bias)
        self.q_norm: nn.Module | None = None
        self.k_norm: nn.Module | None = None
        if c.qk_norm:
            self.q_norm, self.k_norm = (make_norm(c.variant, c.head_size, c.norm_eps) for _ in range(2))
        if c.qk_norm_whole:
            self.q_norm = NormOfHeads(c.n_heads * c.head_size, eps=c.norm_eps)
            self.k_norm = NormOfHeads(c.n_kv_heads * c.head_size, eps=c.norm_eps)
        if c.variant.norm_per_head:
            self.q_norm, self.k_norm = (NormPerHead(n, c.head_size, c.norm_eps) for n in (c.n_heads, c.n_kv_heads))
        self.sinks = AttentionSinks(c.n_heads) if c.attention_sinks else None
        self.core = CausalAttention(c.attention_scale, c.attention_softcap)

    def forward(
        self, x: Tensor, cos: Tensor | None, sin: Tensor | None, mask: AttentionMask | None
    ) -> Tensor:  # x [B, S, E]
        # The number of heads is read from the projection: under tensor parallel it is this rank's number.
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)  # [B, S, H * D], twice [B, S, K * D]
        if isinstance(self.q_norm, NormOfHeads) and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (part.unflatten(-1, (-1, self.head_size)) for part in (q, k, v))  # [B, S, H, D], twice [B, S, K, D]
        if self.q_norm is not None and self.k_norm is not None and not isinstance(self.q_norm, NormOfHeads):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        sinks = None if self.sinks is None else self.sinks()
        out = self.core(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask, sinks)  # [B, H, S, D]
        projected: Tensor = self.o_proj(out.transpose(1, 2).flatten(2))  # [B, S, E]
        return projected


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate x) * up x); or another activation, or that of up x without a gate."""

    def __init__(self, dim: int, hidden: int, v: Variant = LLAMA, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=bias) if v.gated else None
        self.up_proj = nn.Linear(dim, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, dim, bias=bias)
        self.act_fn = activation(v)

    def forward(self, x: Tensor) -> Tensor:  # [B, S, E]
        if self.gate_proj is None:
            hidden = self.act_fn(self.up_proj(x))
        else:
            hidden = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        projected: Tensor = self.down_proj(hidden)
        return projected


class Block(nn.Module):
    input_layernorm: nn.Module
    post_attention_layernorm: nn.Module

    def __init__(self, c: LlamaConfig, index: int) -> None:
        super().__init__()
        self.variant = c.variant
        for name in NORMS[c.variant.norms]:  # input_layernorm and post_attention_layernorm
            self.add_module(name, make_norm(c.variant, c.dim, c.norm_eps))
        self.self_attn = Attention(c)
        self.mlp: nn.Module
        if c.moe is None or index < c.moe.n_dense_layers:
            self.mlp = FeedForward(c.dim, c.ffn_dim, c.variant, c.mlp_bias)
        else:
            if (c.variant.activation, c.variant.gated) != ("silu", True):
                raise ValueError(f"experts have no activation {c.variant.activation}; expected a gated silu")
            shared = FeedForward(c.dim, c.moe.shared_dim, c.variant) if c.moe.shared_dim else None
            self.mlp = MixtureOfExperts(c.dim, c.moe, shared)

    def forward(self, x: Tensor, cos: Tensor | None, sin: Tensor | None, mask: AttentionMask | None = None) -> Tensor:
        """x [B, S, E], cos and sin [B, S, 1, D/2], mask from attention_mask -> [B, S, E]."""
        if self.variant.norms != "before" or self.variant.residual_multiplier != 1:
            return add_to_residual(self.variant, self, x, lambda h: self.self_attn(h, cos, sin, mask))
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
        self.norm = make_norm(config.variant, config.dim, config.norm_eps)
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=config.head_bias)
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
        windows = {name: self.config.window(int(name)) for name in self.layers}
        if document_start is None and self.config.needs_masks(0):  # at any length
            document_start = torch.zeros_like(positions)
        masks = {w: attention_mask(w, positions, document_start, keys) for w in set(windows.values())}
        if document_start is not None:
            positions = positions - document_start
        ropes = {name: self.config.rope(int(name)) for name in self.layers}
        tables = {rope: rope_table(rope, positions) for rope in set(ropes.values())}  # of layers alike, once
        h: Tensor = x if self.embed_tokens is None else scale_embedding(self.config.variant, self.embed_tokens(x))
        for name, block in self.layers.items():
            h = block(h, *tables[ropes[name]], masks[windows[name]])
        h = h if self.norm is None else self.norm(h)
        return h if self.lm_head is None else self.logits(h)

    def logits(self, h: Tensor) -> Tensor:
        """Hidden states [B, S, E] after the last norm -> [B, S, V]."""
        return scale_logits(self.config.variant, self.lm_head(h))
