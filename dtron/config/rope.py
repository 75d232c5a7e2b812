"""The section [model.rope_scaling], whose keys are those of `rope_scaling` in a Hugging Face config.json."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from dtron.config.declare import Changes, key, positive

__all__ = ["RopeScalingKeys"]


@dataclass(frozen=True)
class RopeScalingKeys:
    CHANGES: ClassVar[Changes] = "dimensions"

    rope_type: Literal["default", "linear", "dynamic", "yarn", "llama3"] | None = key(
        None, "overrides the model's: scaling of the rotary positions for longer sequences; default: none"
    )
    factor: float | None = key(
        None, "about how many times as long as in its first training sequences may be", check=positive
    )
    original_max_position_embeddings: int | None = key(
        None, "tokens per sequence of the first training (dynamic, yarn, llama3)", minimum=1
    )
    attention_factor: float | None = key(
        None, "yarn: multiplies cosines and sines; unset: 0.1 ln(factor) + 1", check=positive
    )
    beta_fast: float | None = key(
        None, "yarn: a pair with more turns in the first training's length is kept; unset: 32", check=positive
    )
    beta_slow: float | None = key(
        None, "yarn: a pair with fewer turns in it is stretched by the factor; unset: 1", check=positive
    )
    mscale: float | None = key(None, "yarn: with mscale_all_dim, sets the attention factor", check=positive)
    mscale_all_dim: float | None = key(None, "yarn: with mscale, sets the attention factor", check=positive)
    truncate: bool | None = key(None, "yarn: round the blended range to whole pairs; unset: true")
    low_freq_factor: float | None = key(None, "llama3: a pair with fewer turns is stretched", check=positive)
    high_freq_factor: float | None = key(None, "llama3: a pair with more turns is kept", check=positive)
