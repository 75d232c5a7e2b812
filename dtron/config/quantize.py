"""The sections of [quantize], which are declared and not built yet: see `dtron/config/sections.py`."""

from dataclasses import dataclass, field
from typing import Literal

from dtron.config.declare import key

__all__ = ["Quantize"]


@dataclass(frozen=True)
class Float8:
    enable_fsdp_float8_all_gather: bool = key(False, "", unsupported="float8 is not built yet")
    precompute_float8_dynamic_scale_for_fsdp: bool = key(False, "", unsupported="float8 is not built yet")
    recipe_name: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] | None = key(
        None, "", unsupported="float8 is not built yet"
    )
    filter_fqns: list[str] = key([], "", unsupported="float8 is not built yet")
    emulate: bool = key(False, "", unsupported="float8 is not built yet")


@dataclass(frozen=True)
class QuantizeLinear:
    float8: Float8 = field(default_factory=Float8)


@dataclass(frozen=True)
class Quantize:
    linear: QuantizeLinear = field(default_factory=QuantizeLinear)
