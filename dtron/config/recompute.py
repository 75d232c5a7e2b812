"""The section [activation_checkpoint], of `dtron/config/sections.py`."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from dtron.config.declare import Changes, every_n_or_op, key, share

__all__ = ["ActivationCheckpoint"]


@dataclass(frozen=True)
class ActivationCheckpoint:
    CHANGES: ClassVar[Changes] = "speed"

    mode: Literal["selective", "full", "none", "memory_budget"] = key("selective", "what the backward recomputes")
    selective_ac_option: str = key("2", '"2": every second block (any n); "op": by operation', check=every_n_or_op)
    early_stop: bool = key(False, "", unsupported="torch's default of stopping a recomputation early is kept")
    memory_budget: float = key(
        0.75,
        "what a compiled block keeps: 0 its input, 1 all that the compiler would; 0.75 about what op keeps, and "
        "recomputes no matrix product",
        check=share,
    )
    preserve_rng_state: bool = key(True, "", unsupported="recomputation always repeats the forward's random numbers")
    debug: bool = key(False, "", unsupported="use profiling.enable_profiling")
