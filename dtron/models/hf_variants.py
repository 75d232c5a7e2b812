"""Fields of a config.json that say what a `Variant` does: in and out, one pair of functions per group of families.

Readers take (config.json with the defaults, file) and give fields of LlamaConfig; writers take a LlamaConfig and give
fields of config.json.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from dtron.errors import UserError
from dtron.models.hf_fields import Fields, is_count, positive
from dtron.models.hf_windows import all_but_every, read_windows
from dtron.models.llama import LlamaConfig
from dtron.models.rope import Llama3Scaling
from dtron.models.variants import Variant

__all__ = [
    "ACTIVATIONS",
    "COHERE",
    "COHERE2_WINDOWS",
    "EXAONE4_WINDOWS",
    "GEMMA",
    "GEMMA2",
    "GEMMA3_WINDOWS",
    "llama3_rope",
    "read_cohere",
    "read_cohere2",
    "read_exaone4",
    "read_gemma2",
    "read_gemma3",
    "read_granite",
    "read_stablelm",
    "read_vaultgemma",
    "write_cohere",
    "write_gemma2",
    "write_granite",
    "write_stablelm",
]

ACTIVATIONS = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh", "relu2": "relu2", "xielu": "xielu"}  # ours -> theirs
GEMMA = Variant("rms_1p", activation="gelu_tanh", embedding_multiplier="sqrt")
GEMMA2 = replace(GEMMA, norms="both")
COHERE = Variant("layer", norms="parallel")
GEMMA3_WINDOWS, COHERE2_WINDOWS, EXAONE4_WINDOWS = all_but_every(6), all_but_every(4), all_but_every(4, optional=True)


def read_granite(hf: Fields, file: Path | str) -> Fields:
    variant = Variant(
        embedding_multiplier=positive(hf, "embedding_multiplier", file),
        residual_multiplier=positive(hf, "residual_multiplier", file),
        logits_multiplier=1 / positive(hf, "logits_scaling", file),
    )
    return {"variant": variant, "attention_scale": positive(hf, "attention_multiplier", file)}


def write_granite(c: LlamaConfig) -> Fields:
    return {
        "attention_multiplier": _scale(c),
        "embedding_multiplier": c.variant.embedding_multiplier,
        "residual_multiplier": c.variant.residual_multiplier,
        "logits_scaling": 1 / c.variant.logits_multiplier,
    }


def _scale(c: LlamaConfig) -> float:
    """Of the attention scores."""
    return c.head_size**-0.5 if c.attention_scale is None else c.attention_scale


def read_gemma2(hf: Fields, file: Path | str) -> Fields:
    """Of Gemma 2 and 3."""
    caps = [
        None if hf.get(name) is None else positive(hf, name, file)
        for name in ("attn_logit_softcapping", "final_logit_softcapping")
    ]
    variant = replace(GEMMA2, logits_softcap=caps[1])
    scale = positive(hf, "query_pre_attn_scalar", file) ** -0.5
    return {"variant": variant, "attention_scale": scale, "attention_softcap": caps[0]}


def write_gemma2(c: LlamaConfig) -> Fields:
    scalar = round(_scale(c) ** -2, 6)
    return {
        "query_pre_attn_scalar": int(scalar) if scalar.is_integer() else scalar,
        "attn_logit_softcapping": c.attention_softcap,
        "final_logit_softcapping": c.variant.logits_softcap,
    }


def read_gemma3(hf: Fields, file: Path | str) -> Fields:
    """Layers with a window have a rotary base of their own, and no scaling."""
    rope = hf.get("rope_parameters") or {}
    local = rope.get("sliding_attention", {})
    if (rope and not all(isinstance(fields, dict) for fields in rope.values())) or not isinstance(local, dict):
        raise UserError(f"{file}: rope_parameters = {rope!r}; expected settings by kind of layer")
    if local.get("rope_type", "default") != "default":
        raise UserError(
            f"{file}: rope_type {local['rope_type']!r} of sliding_attention cannot be represented; expected default"
        )
    theta = positive({"rope_theta": hf["rope_local_base_freq"]} | local, "rope_theta", file)
    windows = read_windows(hf, GEMMA3_WINDOWS, file)["windows"]
    ropes = tuple("global" if window is None else "local" for window in windows)
    return read_gemma2(hf, file) | {"ropes": ropes, "local_rope_theta": theta}


def read_vaultgemma(hf: Fields, file: Path | str) -> Fields:
    fields = read_gemma2(hf, file)
    return fields | {"variant": replace(fields["variant"], norms="before")}


def read_cohere(hf: Fields, file: Path | str) -> Fields:
    per_head = bool(hf.get("use_qk_norm"))
    return {"variant": replace(COHERE, norm_per_head=per_head, logits_multiplier=positive(hf, "logit_scale", file))}


def write_cohere(c: LlamaConfig) -> Fields:
    per_head = {"use_qk_norm": True} if c.variant.norm_per_head else {}
    return {"logit_scale": c.variant.logits_multiplier, **per_head}


def read_cohere2(hf: Fields, file: Path | str) -> Fields:
    """Layers without a window have no positions."""
    windows = read_windows(hf, COHERE2_WINDOWS, file)["windows"]
    ropes = tuple("none" if window is None else "global" for window in windows)
    return read_cohere(hf, file) | {"ropes": ropes or ("none",)}


def read_exaone4(hf: Fields, file: Path | str) -> Fields:
    """As Cohere 2, but with positions everywhere where no layer has a window."""
    pattern = hf.get("sliding_window_pattern")
    if not hf.get("layer_types") and not (pattern is None or is_count(pattern)):
        raise UserError(f"{file}: sliding_window_pattern = {pattern!r} without layer_types; expected a whole number")
    windows = read_windows(hf, EXAONE4_WINDOWS, file)["windows"]
    if hf["sliding_window"] is not None and not windows:
        return {"ropes": ("none",)}
    return {"ropes": tuple("none" if window is None else "global" for window in windows)}


def llama3_rope(theta: float, factor: float) -> Callable[[Fields, Path | str], Fields]:
    """A reader: without rotary settings of any name it is Llama 3's, whatever rope_theta says, as in transformers."""

    def read(hf: Fields, file: Path | str) -> Fields:
        if hf.get("rope_scaling") or hf.get("rope_parameters"):
            return {}
        return {"rope_theta": theta, "rope_scaling": Llama3Scaling(factor, 1.0, 4.0, 8192)}

    return read


def read_stablelm(hf: Fields, file: Path | str) -> Fields:
    variant = Variant("layer_bias", norm_per_head=bool(hf.get("qk_layernorm")))
    if hf.get("use_parallel_residual"):
        variant = replace(variant, norms="parallel")
    return {"variant": variant}


def write_stablelm(c: LlamaConfig) -> Fields:
    return {
        "qk_layernorm": c.variant.norm_per_head,
        "use_parallel_residual": c.variant.norms == "parallel",
    }
