"""Rotary positions (RoPE): frequencies, their scaling for longer contexts, cosines and sines, the rotation itself.

Source: Su et al. 2021 (arXiv 2104.09864); those of the scalings are named at each. Fields and values are those of
`rope_scaling` in a Hugging Face config.json.
Shape letters: B sequences, S tokens, D how many values of a head are rotated.
"""

import math
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

__all__ = [
    "SCALINGS",
    "DynamicScaling",
    "LengthScaling",
    "LinearScaling",
    "Llama3Scaling",
    "LongRopeScaling",
    "Rope",
    "RopeScaling",
    "YarnScaling",
    "for_length",
    "rope_frequencies",
    "rope_table",
    "rotate",
]


@dataclass(frozen=True)
class Rope:
    """The rotary embedding of a layer. size: D, how many values of a head are rotated, its first ones."""

    theta: float
    size: int
    scaling: "RopeScaling | None" = None

    @property
    def mistake(self) -> str:
        """Why heads cannot be rotated so; empty where they can."""
        if self.size < 2 or self.size % 2:
            return f"the head size {self.size}, as far as it is rotated, is odd; the rotary embedding needs pairs"
        if isinstance(s := self.scaling, LongRopeScaling):
            for name, divisors in ("short_factor", s.short_factor), ("long_factor", s.long_factor):
                if len(divisors) != self.size // 2:
                    return f"{name} has {len(divisors)} numbers; expected {self.size // 2}, one for each rotated pair"
        return ""

    def frequencies(self, theta: float | None = None, device: torch.device | None = None) -> Tensor:
        """Angular frequencies without scaling, in radians per token, of this base or another: [D/2] in fp32."""
        exponents = torch.arange(0, self.size, 2, device=device, dtype=torch.float32) / self.size
        return (self.theta if theta is None else theta) ** -exponents


@dataclass(frozen=True)
class RopeScaling:
    """How the frequencies change so that sequences may be about `factor` times as long as in training."""

    rope_type: ClassVar[str]

    factor: float

    @property
    def attention_scaling(self) -> float:
        """What cosines and sines are multiplied by: queries and keys each, so the attention's logits twice."""
        return 1.0

    @property
    def longest(self) -> int:
        """Tokens per sequence that a model with it is known to be for; 0: not known."""
        return getattr(self, "original_max_position_embeddings", 0)

    def scale(self, freq: Tensor, rope: Rope, length: int) -> Tensor:
        """The frequencies [D/2] of `rope`, whose plain ones are `freq`, in sequences of `length` tokens."""
        raise NotImplementedError


@dataclass(frozen=True)
class LinearScaling(RopeScaling):
    """All positions divided by the factor (Chen et al. 2023, arXiv 2306.15595)."""

    rope_type = "linear"

    def scale(self, freq: Tensor, rope: Rope, length: int) -> Tensor:
        return freq / self.factor


@dataclass(frozen=True)
class Llama3Scaling(RopeScaling):
    """Wavelengths beyond the trained context are stretched, short ones kept (Llama 3.1, arXiv 2407.21783)."""

    rope_type = "llama3"

    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def scale(self, freq: Tensor, rope: Rope, length: int) -> Tensor:
        turns = self.original_max_position_embeddings * freq / (2 * math.pi)
        blend = ((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(0, 1)
        return freq * (blend + (1 - blend) / self.factor)


@dataclass(frozen=True)
class YarnScaling(RopeScaling):
    """As Llama 3's, blended by the pair's index, and a softer softmax (YaRN, Peng et al. 2023, arXiv 2309.00071).

    beta_fast, beta_slow: turns within the trained context from which on a pair is kept, and up to which it is
    stretched. attention_factor: see `attention_scaling`; unset, the paper's 0.1 ln(factor) + 1, or with the two
    mscale, the quotient of two such (DeepSeek-V2). truncate: round the blended range outwards to whole pairs.
    """

    rope_type = "yarn"

    original_max_position_embeddings: int
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    @property
    def longest(self) -> int:
        return int(self.factor * self.original_max_position_embeddings)

    @property
    def attention_scaling(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        grows = math.log(self.factor) if self.factor > 1 else 0.0
        if self.mscale and self.mscale_all_dim:
            return (0.1 * self.mscale * grows + 1) / (0.1 * self.mscale_all_dim * grows + 1)
        return 0.1 * grows + 1

    def scale(self, freq: Tensor, rope: Rope, length: int) -> Tensor:
        def pair(turns: float) -> float:
            """Where the pair would be that makes so many turns within the trained context."""
            wavelength = self.original_max_position_embeddings / (2 * math.pi * turns)
            return rope.size * math.log(wavelength) / (2 * math.log(rope.theta))

        first, last = pair(self.beta_fast), pair(self.beta_slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, rope.size - 1)
        width = last - first or 0.001  # as transformers does
        stretched = ((torch.arange(freq.numel(), device=freq.device) - first) / width).clamp(0, 1)
        return freq / self.factor * stretched + freq * (1 - stretched)


@dataclass(frozen=True)
class LengthScaling(RopeScaling):
    """A scaling that depends on how long sequences are.

    length: of a run's, in tokens, so that the choice is the same on every layout and at every step; None: as long as
    the positions say, which is what transformers does. It is no part of what the model is.
    """

    original_max_position_embeddings: int
    length: int | None = field(default=None, compare=False, kw_only=True)


@dataclass(frozen=True)
class DynamicScaling(LengthScaling):
    """A base that grows with the length, beyond the trained one ("dynamic NTK", of Reddit's bloc97 and emozilla)."""

    rope_type = "dynamic"

    def scale(self, freq: Tensor, rope: Rope, length: int) -> Tensor:
        longer = max(length / self.original_max_position_embeddings, 1.0)
        growth = (self.factor * longer - (self.factor - 1)) ** (rope.size / (rope.size - 2))
        return rope.frequencies(rope.theta * growth, freq.device)


@dataclass(frozen=True)
class LongRopeScaling(LengthScaling):
    """A divisor for each pair, from a search, one set within the trained length and one beyond it (LongRoPE, Ding et
    al. 2024, arXiv 2402.13753).

    attention_factor: see `attention_scaling`; unset, the paper's sqrt(1 + ln(factor) / ln(trained length)).
    """

    rope_type = "longrope"

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    attention_factor: float | None = None

    @property
    def attention_scaling(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        trained = math.log(self.original_max_position_embeddings)
        return math.sqrt(1 + math.log(self.factor) / trained) if self.factor > 1 else 1.0

    def scale(self, freq: Tensor, rope: Rope, length: int) -> Tensor:
        divisors = self.long_factor if length > self.original_max_position_embeddings else self.short_factor
        return freq / torch.tensor(divisors, dtype=torch.float32, device=freq.device)


def for_length(config: Any, length: int) -> Any:
    """The dimensions of any model for sequences of this length, in tokens, where its rotary scaling depends on it."""
    scaling = getattr(config, "rope_scaling", None)
    if not isinstance(scaling, LengthScaling):
        return config
    return replace(config, rope_scaling=replace(scaling, length=length))


SCALINGS: dict[str, type[RopeScaling]] = {
    kind.rope_type: kind for kind in (LinearScaling, DynamicScaling, YarnScaling, LongRopeScaling, Llama3Scaling)
}


def rope_frequencies(rope: Rope, length: int = 0, device: torch.device | None = None) -> Tensor:
    """Rotary angular frequencies, in radians per token: [D/2] in fp32. length: of the sequences, in tokens."""
    freq = rope.frequencies(device=device)
    return freq if rope.scaling is None else rope.scaling.scale(freq, rope, length)


def rope_table(rope: Rope | None, positions: Tensor) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Cosines and sines [B, S, 1, D/2] in fp32 for positions [B, S]; two None where a layer has no positions."""
    if rope is None:
        return None, None
    scaling, length = rope.scaling, 0
    if isinstance(scaling, LengthScaling):
        length = scaling.length or int(positions.max()) + 1
    angle = positions[..., None, None].float() * rope_frequencies(rope, length, positions.device)  # [B, S, 1, D/2]
    cos, sin = angle.cos(), angle.sin()
    factor = 1.0 if scaling is None else scaling.attention_scaling
    return (cos, sin) if factor == 1 else (cos * factor, sin * factor)


def rotate(x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """Rotate x [B, S, heads, head size] by cos, sin [B, S, 1, D/2]; in fp32, back in x's dtype. None: x as it is."""
    if cos is None or sin is None:
        return x
    size = 2 * cos.size(-1)
    a, b = x[..., :size].float().chunk(2, dim=-1)
    rotated = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).type_as(x)
    return rotated if size == x.size(-1) else torch.cat((rotated, x[..., size:]), dim=-1)
