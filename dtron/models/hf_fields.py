"""Groups of fields of a Hugging Face config.json: sizes, experts; in and out.

`file` is what messages call the config.json.
"""

import math
from pathlib import Path
from typing import Any

from dtron.errors import UserError
from dtron.models.llama import LlamaConfig
from dtron.models.moe import MoEConfig

__all__ = [
    "Fields",
    "check_counts",
    "is_count",
    "positive",
    "read_experts",
    "write_experts",
]

Fields = dict[str, Any]


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def check_counts(values: Fields, file: Path | str) -> None:
    """UserError unless all are whole numbers above 0."""
    if missing := [name for name, value in values.items() if not is_count(value)]:
        raise UserError(f"{file}: {', '.join(missing)} missing or not a whole number above 0")


def positive(hf: Fields, name: str, file: Path | str) -> float:
    """A number above 0. UserError where it is none."""
    value: Any = hf.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UserError(f"{file}: {name} = {value!r}; expected a positive number")
    return float(value)


# --- experts


def read_experts(hf: Fields, size_name: str, normalize: bool, file: Path | str) -> MoEConfig:
    """The mixture of experts; size_name: of an expert's hidden size.

    The number of experts has two names, in files of one model_type even.
    """
    numbers = [hf[name] for name in ("num_experts", "num_local_experts") if hf.get(name) is not None]
    if numbers[1:] and numbers[0] != numbers[1]:
        raise UserError(
            f"{file}: num_experts = {numbers[0]!r}, but num_local_experts = {numbers[1]!r}; keep one of them"
        )
    values: Fields = {
        "num_experts": numbers[0] if numbers else None,
        "num_experts_per_tok": hf.get("num_experts_per_tok"),
        size_name: hf.get(size_name),
    }
    check_counts(values, file)
    n_experts, top_k, size = map(int, values.values())
    if top_k > n_experts:
        raise UserError(f"{file}: num_experts_per_tok = {top_k}, more than the {n_experts} experts")
    dense = hf.get("mlp_only_layers") or []
    if not isinstance(dense, list) or dense != list(range(len(dense))) or len(dense) >= hf["num_hidden_layers"]:
        raise UserError(
            f"{file}: mlp_only_layers = {dense!r} cannot be represented; expected none, or the first layers only"
        )
    return MoEConfig(n_experts, top_k, size, normalize_top_k=normalize, n_dense_layers=len(dense))


def write_experts(c: LlamaConfig, size_name: str) -> Fields:
    """What `read_experts` reads, but for the layers without experts."""
    assert c.moe is not None
    sizes = {"num_experts_per_tok": c.moe.top_k, size_name: c.moe.expert_dim}
    return {"output_router_logits": False, "num_experts": c.moe.n_experts} | sizes
