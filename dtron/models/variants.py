"""The parts in which families differ from Llama, each plain single-device PyTorch, chosen by a `Variant`.

Names of modules are those of Hugging Face's models. Sources: OLMo 2 (arXiv 2501.00656), Gemma 2 (arXiv 2408.00118) and
3 (arXiv 2503.19786), Granite 3 (its config.json), Cohere (its config.json), StableLM 2 (arXiv 2402.17834), Nemotron-4
(arXiv 2402.16819), Apertus (arXiv 2509.14233).

Shape letters: B sequences, S tokens, E hidden size, H heads, D head size, V vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "NORMS",
    "NormPerHead",
    "NormOfHeads",
    "Variant",
    "XIELU",
    "activation",
    "add_to_residual",
    "logits_slope",
    "make_norm",
    "scale_embedding",
    "scale_logits",
    "softplus_inverse",
]


@dataclass(frozen=True)
class Variant:
    """What is not Llama's; the default of each field is.

    norm: rms; rms_1p: of 1 + weight, in fp32 (Gemma); layer: LayerNorm without bias (Cohere), layer_bias (StableLM 2);
        layer_1p: with bias and 1 + weight (Nemotron).
    norms: where they stand: before attention and feed-forward; after them, on what is added to the residual stream
        (OLMo 2, EXAONE 4); both (Gemma 2 and 3, GLM-4); parallel: one, before the two, which are added together
        (Cohere).
    norm_per_head: queries and keys have LayerNorms with weights of their own for each head (Cohere, StableLM 2).
    activation: of the feed-forward; gated: it multiplies the up projection.
    embedding_multiplier: of the embedding's output (Granite); sqrt: the square root of E, rounded to the dtype (Gemma).
    residual_multiplier: of what attention and feed-forward add (Granite).
    logits_multiplier: Cohere's; Granite's is the inverse of its logits_scaling.
    logits_softcap: logits x become cap * tanh(x / cap) (Gemma 2).
    """

    norm: Literal["rms", "rms_1p", "layer", "layer_bias", "layer_1p"] = "rms"
    norms: Literal["before", "after", "both", "parallel"] = "before"
    norm_per_head: bool = False
    activation: Literal["silu", "gelu_tanh", "relu2", "xielu"] = "silu"
    gated: bool = True
    embedding_multiplier: float | Literal["sqrt"] = 1.0
    residual_multiplier: float = 1.0
    logits_multiplier: float = 1.0
    logits_softcap: float | None = None


# --- norms

# The norms of a block, by where they stand. In Llama's names post_attention_layernorm is before the feed-forward, in
# the others' it is after the attention.
NORMS: dict[str, tuple[str, ...]] = {
    "before": ("input_layernorm", "post_attention_layernorm"),
    "after": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "both": (
        "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm",
    ),
    "parallel": ("input_layernorm",),
}  # fmt: skip


class _RMSNorm1P(nn.RMSNorm):
    """RMSNorm whose weights are around 0: normal * (1 + weight), in fp32."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        normal = F.rms_norm(x.float(), self.normalized_shape, None, self.eps)
        return (normal * (1 + self.weight.float())).type_as(x)


class _LayerNorm1P(nn.LayerNorm):
    """LayerNorm whose weights are around 0."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight + 1, self.bias, self.eps)


class NormOfHeads(nn.RMSNorm):
    """Of queries or keys, over all heads together (OLMo). Its type tells tensor parallel, which splits the heads."""


class NormPerHead(nn.Module):
    """LayerNorm of queries or keys within each head, whose weights [H, D] are each head's own."""

    def __init__(self, n_heads: int, head_size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_heads, head_size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:  # [B, S, H, D]
        return self.normalise(x, self.weight)

    def normalise(self, x: Tensor, weight: Tensor) -> Tensor:
        """`forward` with a given weight [H, D]."""
        normal = F.layer_norm(x.float(), x.shape[-1:], eps=self.eps)
        return (normal * weight.float()).type_as(x)


def make_norm(v: Variant, size: int, eps: float) -> nn.Module:
    """Over the last dimension, of this size."""
    if v.norm == "layer":
        return nn.LayerNorm(size, eps=eps, bias=False)
    makers = {"rms": nn.RMSNorm, "rms_1p": _RMSNorm1P, "layer_bias": nn.LayerNorm, "layer_1p": _LayerNorm1P}
    norm: nn.Module = makers[v.norm](size, eps=eps)
    return norm


# --- the residual stream


def add_to_residual(v: Variant, block: Any, x: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
    """A block whose norms or multiplier are not Llama's. x [B, S, E]; attend: its attention -> [B, S, E]."""

    def plus(x: Tensor, h: Tensor) -> Tensor:
        return x + h if v.residual_multiplier == 1 else x + h * v.residual_multiplier

    if v.norms == "parallel":
        h = block.input_layernorm(x)
        return plus(plus(x, attend(h)), block.mlp(h))
    if v.norms == "after":
        x = plus(x, block.post_attention_layernorm(attend(x)))
        return plus(x, block.post_feedforward_layernorm(block.mlp(x)))
    if v.norms == "both":
        x = plus(x, block.post_attention_layernorm(attend(block.input_layernorm(x))))
        return plus(x, block.post_feedforward_layernorm(block.mlp(block.pre_feedforward_layernorm(x))))
    x = plus(x, attend(block.input_layernorm(x)))
    return plus(x, block.mlp(block.post_attention_layernorm(x)))


# --- activations


class XIELU(nn.Module):
    """alpha_p x^2 + beta x for positive x, alpha_n (exp(x) - 1 - x) + beta x for the others (arXiv 2411.13010).

    Two learned numbers; alphas are positive by softplus, and that of the negative side is at least beta.
    """

    BETA, EPS = 0.5, -1e-6  # stored with Apertus' weights, never trained
    INITIAL = {"alpha_p": 0.8, "alpha_n": 0.8 - BETA}  # before softplus is undone

    def __init__(self) -> None:
        super().__init__()
        self.alpha_p, self.alpha_n = (nn.Parameter(torch.empty(1)) for _ in range(2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for name, value in self.INITIAL.items():
            nn.init.constant_(self.get_parameter(name), softplus_inverse(value))

    def forward(self, x: Tensor) -> Tensor:
        return self.of(x, self.alpha_p, self.alpha_n)

    def of(self, x: Tensor, alpha_p: Tensor, alpha_n: Tensor) -> Tensor:
        """`forward` with given parameters [1]."""
        positive = F.softplus(alpha_p) * x * x
        negative = (torch.expm1(x.clamp(max=self.EPS)) - x) * (self.BETA + F.softplus(alpha_n))
        return torch.where(x > 0, positive, negative) + self.BETA * x


def softplus_inverse(x: float) -> float:
    """log(exp(x) - 1)."""
    return math.log(math.expm1(x))


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _relu_squared(x: Tensor) -> Tensor:
    return F.relu(x).square()


def activation(v: Variant) -> Callable[[Tensor], Tensor]:
    """Of a feed-forward."""
    if v.activation == "xielu":
        return XIELU()
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "silu": F.silu,
        "gelu_tanh": _gelu_tanh,
        "relu2": _relu_squared,
    }
    return functions[v.activation]


# --- the ends of the model


def scale_embedding(v: Variant, h: Tensor) -> Tensor:
    """h [B, S, E] times the multiplier."""
    if v.embedding_multiplier == "sqrt":
        return h * h.new_full((), h.size(-1) ** 0.5)
    return h if v.embedding_multiplier == 1 else h * v.embedding_multiplier


def scale_logits(v: Variant, logits: Tensor) -> Tensor:
    """logits [B, S, V] with multiplier and soft cap."""
    if v.logits_multiplier != 1:
        logits = logits * v.logits_multiplier
    return logits if v.logits_softcap is None else torch.tanh(logits / v.logits_softcap) * v.logits_softcap


def logits_slope(v: Variant, logits: Tensor) -> Tensor | float | None:
    """The derivative of `scale_logits` at logits [..., V]; None: 1."""
    if v.logits_softcap is None:
        return None if v.logits_multiplier == 1 else v.logits_multiplier
    return (1 - torch.tanh(logits.float() * (v.logits_multiplier / v.logits_softcap)).square()) * v.logits_multiplier
