"""Rotary positions (RoPE): frequencies, the tables of cosines and sines, and the rotation itself.

Sources: Su et al. 2021 (arXiv 2104.09864); for the scaling Dubey et al. 2024 (Llama 3, arXiv 2407.21783).
Shape letters: B sequences, S tokens, D head size.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Rope", "RopeScaling", "rope_frequencies", "rope_table", "rotate"]


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretching of the low rotary frequencies (arXiv 2407.21783, HF `rope_type = "llama3"`)."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclass(frozen=True)
class Rope:
    """The rotary embedding of a layer. head_size: D, how many values of a head are rotated."""

    theta: float
    head_size: int
    scaling: RopeScaling | None = None


def rope_frequencies(rope: Rope, device: torch.device | None = None) -> Tensor:
    """Rotary angular frequencies, in radians per token: [D/2] in fp32."""
    d = rope.head_size
    freq = rope.theta ** (-torch.arange(0, d, 2, device=device, dtype=torch.float32) / d)  # [D/2]
    if (s := rope.scaling) is None:
        return freq
    # Wavelengths beyond the trained context are stretched by `factor`, short ones kept, those between blended.
    turns = s.original_max_position * freq / (2 * math.pi)
    blend = ((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)).clamp(0, 1)
    return freq * (blend + (1 - blend) / s.factor)


def rope_table(rope: Rope | None, positions: Tensor) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Cosines and sines [B, S, 1, D/2] in fp32 for positions [B, S]; two None where a layer has no positions."""
    if rope is None:
        return None, None
    angle = positions[..., None, None].float() * rope_frequencies(rope, positions.device)  # [B, S, 1, D/2]
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """Rotate x [B, S, heads, D] by cos, sin [B, S, 1, D/2]; in fp32, back in x's dtype. None: x as it is."""
    if cos is None or sin is None:
        return x
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).type_as(x)
