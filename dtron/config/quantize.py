"""The sections of [quantize]: how `dtron/parallel/float8.py` casts the operands of matrix products."""

from dataclasses import dataclass, field
from typing import Literal

from dtron.config.declare import key

__all__ = ["Quantize"]


@dataclass(frozen=True)
class Float8:
    enable_fsdp_float8_all_gather: bool = key(
        False,
        "FSDP gathers weights as float8, half the bytes of bf16; with recipe tensorwise and without tensor parallel",
        changes="training",
    )
    precompute_float8_dynamic_scale_for_fsdp: bool = key(
        False, "the scales of all gathered weights by one all-reduce after the update, in place of one per weight"
    )
    recipe_name: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] | None = key(
        None,
        "scales of the float8 operands: one for each tensor (tensorwise, the default and fastest), for each row "
        "(rowwise), or for each row with the weights' gradients in the compute dtype (rowwise_with_gw_hp)",
        changes="training",
    )
    filter_fqns: list[str] = key(
        [], "linear layers whose names contain one of these keep the compute dtype", changes="training"
    )
    emulate: bool = key(
        False, "compute float8's rounding in the compute dtype: for hardware without float8, slowly", changes="training"
    )


@dataclass(frozen=True)
class QuantizeLinear:
    float8: Float8 = field(default_factory=Float8)


@dataclass(frozen=True)
class Quantize:
    linear: QuantizeLinear = field(default_factory=QuantizeLinear)
