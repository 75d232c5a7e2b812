"""The section [optimizer]."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from dtron.config.declare import Changes, key

__all__ = ["Optimizer"]


@dataclass(frozen=True)
class Optimizer:
    CHANGES: ClassVar[Changes] = "hyperparameters"

    name: str = key("AdamW", "AdamW, Adam, SGD, or a registered optimizer", changes="training")
    lr: float = key(8e-4, "peak learning rate", minimum=0)
    beta1: float = key(0.9, "Adam's first decay; SGD's momentum", minimum=0)
    beta2: float = key(0.95, "Adam's second decay", minimum=0)
    eps: float = key(1e-8, "Adam's epsilon", minimum=0)
    weight_decay: float = key(0.1, "weight decay, decoupled in AdamW", minimum=0)
    weight_decay_exclude: list[str] = key([], 'parameter-name patterns without decay, for example ["*norm*"]')
    implementation: Literal["for-loop", "foreach", "fused"] = key(
        "fused", "how the optimizer loops over tensors; SGD has no fused form and takes foreach", changes="speed"
    )
    state_dtype: Literal["float32", "bfloat16"] = key(
        "float32",
        "dtype of AdamW's moments; bfloat16: 4 bytes per parameter less to hold, 8 to move",
        changes="losses",
    )
    early_step_in_backward: bool = key(
        False, "", unsupported="the gradient is clipped by its global norm before the step"
    )
