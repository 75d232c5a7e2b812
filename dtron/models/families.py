"""Published Llama-like models by family and flavor, and any other from a Hugging Face config.json."""

import json
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from dtron.errors import UserError
from dtron.models.llama import LlamaConfig, RopeScaling

__all__ = ["FAMILIES", "from_hf_config"]


def _model(vocab: int, dim: int, layers: int, heads: int, kv_heads: int, ffn: int, **more: Any) -> LlamaConfig:
    return LlamaConfig(vocab, dim, layers, heads, kv_heads, ffn, **more)


_DEBUG = _model(4096, 256, 6, 8, 4, 768)
_LLAMA3 = {
    "debugmodel": replace(_DEBUG, rope_theta=500000.0),
    "8B": _model(128256, 4096, 32, 32, 8, 14336, rope_theta=500000.0),
    "70B": _model(128256, 8192, 80, 64, 8, 28672, rope_theta=500000.0),
    "405B": _model(128256, 16384, 126, 128, 8, 53248, rope_theta=500000.0),
}
_SCALED_32 = {"rope_theta": 500000.0, "rope_scaling": RopeScaling(factor=32.0), "tie_embeddings": True}

# Sources: the config.json of each model on the Hugging Face hub.
FAMILIES: dict[str, dict[str, LlamaConfig]] = {
    "llama2": {
        "debugmodel": _DEBUG,
        "7B": _model(32000, 4096, 32, 32, 32, 11008),
        "13B": _model(32000, 5120, 40, 40, 40, 13824),
        "70B": _model(32000, 8192, 80, 64, 8, 28672),
    },
    "llama3": _LLAMA3,
    "llama3.1": {name: replace(c, rope_scaling=RopeScaling()) for name, c in _LLAMA3.items()},
    "llama3.2": {
        "debugmodel": replace(_LLAMA3["debugmodel"], rope_scaling=RopeScaling(factor=32.0), tie_embeddings=True),
        "1B": _model(128256, 2048, 16, 32, 8, 8192, **_SCALED_32),
        "3B": _model(128256, 3072, 28, 24, 8, 8192, **_SCALED_32),
    },
    "smollm": {
        "debugmodel": replace(_DEBUG, tie_embeddings=True),
        "135M": _model(49152, 576, 30, 9, 3, 1536, tie_embeddings=True),
        "360M": _model(49152, 960, 32, 15, 5, 2560, tie_embeddings=True),
        "1.7B": _model(49152, 2048, 24, 32, 32, 8192, tie_embeddings=True),
    },
}

# Fields of a config.json that change the architecture, and the one value our model has for each.
_ONLY = {
    "hidden_act": ("silu", None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "sliding_window": (None,),
    "partial_rotary_factor": (1, 1.0, None),
    "attention_dropout": (0, 0.0, None),
}


def from_hf_config(path: str) -> LlamaConfig:
    """The dimensions in a local Hugging Face config.json; a field we cannot represent is refused by name."""
    file = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
    try:
        hf = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"model.hf_config_path: there is no file {file}; give a local config.json or its folder"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"model.hf_config_path: {file} is not readable JSON: {error}") from None
    if not isinstance(hf, dict):
        raise UserError(f"{file} holds a JSON {type(hf).__name__}; expected the object of a Hugging Face config.json")
    if hf.get("model_type") not in ("llama", "mistral"):
        raise UserError(
            f'{file}: model_type is {hf.get("model_type")!r}; expected "llama" (or "mistral" without a window)'
        )
    for field, legal in _ONLY.items():
        if hf.get(field) not in legal:
            raise UserError(f"{file}: {field} = {hf[field]!r} cannot be represented; expected {legal[0]!r}")
    needed = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    if missing := [name for name in needed if not isinstance(hf.get(name), int)]:
        raise UserError(f"{file}: {', '.join(missing)} missing or not a whole number")
    vocab, dim, layers, heads, ffn = (hf[name] for name in needed)
    return LlamaConfig(
        vocab, dim, layers, heads, hf.get("num_key_value_heads") or heads, ffn,
        head_dim=hf.get("head_dim"), norm_eps=hf.get("rms_norm_eps", 1e-6),
        tie_embeddings=bool(hf.get("tie_word_embeddings", False)), **_rope(hf, file),
    )  # fmt: skip


def _rope(hf: dict[str, Any], file: Path) -> dict[str, Any]:
    """Rotary settings: `rope_parameters` of newer files, `rope_theta` and `rope_scaling` of older ones."""
    rope = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
    theta = float(rope.get("rope_theta", hf.get("rope_theta", 10000.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
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
        raise UserError(f"{file}: the llama3 rope scaling lacks or misstates {error}") from None
    return {"rope_theta": theta, "rope_scaling": scaling}
