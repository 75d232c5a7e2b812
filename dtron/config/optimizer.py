"""The section [optimizer], and [optimizer.muon] in it."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from dtron.config.declare import Changes, key, positive, share

__all__ = ["Muon", "Optimizer"]


@dataclass(frozen=True)
class Muon:
    """Beside the keys of [optimizer], which are those of the parameters that AdamW updates."""

    CHANGES: ClassVar[Changes] = "hyperparameters"

    lr: float | None = key(None, "peak learning rate of the matrices; unset: optimizer.lr", check=positive)
    momentum: float = key(0.95, "decay of the momentum", check=share)
    nesterov: bool = key(True, "Nesterov's momentum")
    ns_steps: int = key(5, "Newton-Schulz iterations", minimum=1)
    adjust_lr_fn: Literal["original", "match_rms_adamw"] = key(
        "match_rms_adamw",
        "a matrix's rate times 0.2 sqrt(max(out, in)), for AdamW's rates; original: sqrt(max(1, out / in))",
    )


@dataclass(frozen=True)
class Optimizer:
    CHANGES: ClassVar[Changes] = "hyperparameters"

    name: str = key("AdamW", "AdamW, Adam, SGD, Muon, or a registered optimizer", changes="training")
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
        "dtype of AdamW's and Muon's moments; bfloat16: 4 bytes per parameter less to hold",
        changes="losses",
    )
    early_step_in_backward: bool = key(
        False, "", unsupported="the gradient is clipped by its global norm before the step"
    )
    muon: Muon = field(default_factory=Muon)
