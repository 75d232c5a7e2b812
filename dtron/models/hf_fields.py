"""Groups of fields of a Hugging Face config.json: sizes, windows, rotary settings, experts; in and out.

`file` is what messages call the config.json.
"""

import math
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from dtron.errors import UserError
from dtron.models.llama import LlamaConfig
from dtron.models.moe import MoEConfig
from dtron.models.rope import RopeScaling

__all__ = [
    "Fields",
    "check_counts",
    "check_windows",
    "is_count",
    "positive",
    "read_experts",
    "read_rope",
    "write_experts",
    "write_rope",
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


def check_windows(hf: Fields, file: Path | str) -> None:
    """UserError unless every layer attends to all tokens before."""
    layers = hf.get("layer_types") or []
    if not isinstance(layers, list) or any(layer != "full_attention" for layer in layers):
        raise UserError(f"{file}: layer_types = {layers!r} cannot be represented; expected full_attention only")


# --- rotary settings


def read_rope(hf: Fields, file: Path | str) -> Fields:
    """Of LlamaConfig: from `rope_parameters` of newer files, from `rope_theta` and `rope_scaling` of older ones."""
    rope: Fields = {}
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(hf.get(name) or {}, dict):
            raise UserError(f"{file}: {name} = {hf[name]!r}; expected an object, or null")
        rope |= _of_full_attention(hf.get(name) or {}, name, file)
    theta = positive({"rope_theta": hf["rope_theta"]} | rope, "rope_theta", file)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor") not in (1, None):
        raise UserError(f"{file}: a partial_rotary_factor cannot be represented; expected 1")
    if kind == "default":
        return {"rope_theta": theta}
    if kind != "llama3":
        near = get_close_matches(str(kind), ["default", "llama3"], 1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise UserError(
            f'{file}: rope scaling of type {kind!r} cannot be represented{hint}; expected "default" or "llama3"'
        )
    try:
        scaling = RopeScaling(
            float(rope["factor"]), float(rope["low_freq_factor"]), float(rope["high_freq_factor"]),
            int(rope["original_max_position_embeddings"]),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file}: the llama3 rope scaling has a missing or invalid field: {error}") from None
    return {"rope_theta": theta, "rope_scaling": scaling}


def _of_full_attention(rope: Fields, name: str, file: Path | str) -> Fields:
    """Rotary settings, or of nested ones, by kind of layer, those of the kind that all our layers are."""
    nested = {kind: fields for kind, fields in rope.items() if isinstance(fields, dict)}
    if not nested:
        return rope
    flat = [field for field, value in rope.items() if field not in nested and value is not None]
    if flat:
        raise UserError(
            f"{file}: {name} has settings by kind of layer ({', '.join(nested)}) and others beside ({flat[0]})"
        )
    first, *others = nested.values()
    if "full_attention" not in nested and any(other != first for other in others):
        raise UserError(
            f"{file}: {name} has settings of {', '.join(nested)}, which differ and cannot be represented; expected "
            "those of full_attention"
        )
    return nested.get("full_attention", first)


def write_rope(c: LlamaConfig) -> Fields:
    """The names that older and newer readers both know."""
    rope: Fields = {"rope_theta": c.rope_theta}
    if s := c.rope_scaling:
        rope["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": s.factor,
            "low_freq_factor": s.low_freq_factor,
            "high_freq_factor": s.high_freq_factor,
            "original_max_position_embeddings": s.original_max_position,
        }
    return rope


# --- experts


def read_experts(hf: Fields, size_name: str, normalize: bool, file: Path | str) -> MoEConfig:
    """The mixture of experts; size_name: of an expert's hidden size.

    The number of experts has two names, in files of one model_type even.
    """
    values: Fields = {
        "num_experts": hf.get("num_local_experts") if hf.get("num_experts") is None else hf["num_experts"],
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
    return {"attention_bias": False, "output_router_logits": False, "num_experts": c.moe.n_experts} | sizes
