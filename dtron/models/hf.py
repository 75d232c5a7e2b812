"""Our dimensions from a Hugging Face config.json, and back."""

import json
import math
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from dtron.errors import UserError
from dtron.models.llama import LlamaConfig
from dtron.models.moe import MoEConfig
from dtron.models.rope import RopeScaling

__all__ = ["from_hf_config", "hf_dimensions", "read_hf_config", "to_hf_config"]

# model_type -> the flags of our model that make it one.
TYPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
    "mixtral": {},
    "qwen3_moe": {"qk_norm": True},
    "olmoe": {"qk_norm_whole": True},
}
EXPERTS = ("mixtral", "qwen3_moe", "olmoe")  # mixtures of experts
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "olmoe": "OlmoeForCausalLM",
}
# Fields of a config.json that change the architecture, and the values that our model has for each.
_ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "partial_rotary_factor": (1, None),
    "attention_dropout": (0, None),
    "use_sliding_window": (False, None),
    "quantization_config": (None,),
    "clip_qkv": (None,),
    "decoder_sparse_step": (1, None),
    "router_jitter_noise": (0, None),
    "shared_expert_intermediate_size": (None,),
}


def from_hf_config(path: Path | str, key: str = "model.hf_config_path") -> LlamaConfig:
    """The dimensions in a local config.json, given by its name or its folder's.

    UserError naming `key` if it cannot be read, and naming the field that we cannot represent.
    """
    return hf_dimensions(*read_hf_config(path, key))


def read_hf_config(path: Path | str, key: str = "model.hf_config_path") -> tuple[dict[str, Any], Path]:
    """The object in a local config.json, given by its name or its folder's, and the file. UserError naming `key`."""
    file = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
    try:
        hf = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{key}: there is no file {file}; give a local config.json or its folder") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{key}: {file} is not readable JSON: {error}") from None
    if not isinstance(hf, dict):
        raise UserError(f"{file} holds a JSON {type(hf).__name__}; expected the object of a Hugging Face config.json")
    return hf, file


def hf_dimensions(hf: dict[str, Any], file: Path | str) -> LlamaConfig:
    """The dimensions in the object of a config.json, called `file` in messages. UserError, naming the field."""
    kind = hf.get("model_type")
    if not isinstance(kind, str) or kind not in TYPES:
        own = "; the code that its auto_map names is never run (no trust_remote_code)" if hf.get("auto_map") else ""
        raise UserError(f"{file}: model_type is {kind!r}; expected one of {', '.join(TYPES)}{own}")
    for field, legal in _ONLY.items():
        if hf.get(field) not in legal:
            raise UserError(f"{file}: {field} = {hf[field]!r} cannot be represented; expected {legal[0]!r}")
    _check_windows(hf, kind, file)
    needed = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"]
    needed += [] if kind == "llama" else ["num_key_value_heads"]  # whose default is another number in each type
    if missing := [name for name in needed if not _is_count(hf.get(name))]:
        raise UserError(f"{file}: {', '.join(missing)} missing or not a whole number above 0")
    for name in ("num_key_value_heads", "head_dim"):
        if hf.get(name) is not None and not _is_count(hf[name]):
            raise UserError(f"{file}: {name} = {hf[name]!r}; expected a whole number above 0")
    vocab, dim, layers, heads, ffn = (hf[name] for name in needed[:5])
    head_size = hf.get("head_dim") or (128 if kind == "qwen3" else dim // heads)
    eps = _positive(hf, "rms_norm_eps", 1e-5 if kind in ("mixtral", "olmoe") else 1e-6, file)
    hf = {"rope_theta": 1e6 if kind == "mixtral" else 10000.0} | hf  # what transformers takes
    return LlamaConfig(
        vocab, dim, layers, heads, hf.get("num_key_value_heads") or heads, ffn,
        head_dim=None if head_size * heads == dim else head_size, norm_eps=eps,
        tie_embeddings=bool(hf.get("tie_word_embeddings", False)), **TYPES[kind], **_rope(hf, file),
        moe=_experts(hf, kind, layers, file) if kind in EXPERTS else None,
    )  # fmt: skip


def _experts(hf: dict[str, Any], kind: str, layers: int, file: Path | str) -> MoEConfig:
    """The mixture of experts. The number of experts has two names, in files of one model_type even."""
    size_name = "moe_intermediate_size" if kind == "qwen3_moe" else "intermediate_size"
    values: dict[str, Any] = {
        "num_experts": hf.get("num_local_experts") if hf.get("num_experts") is None else hf["num_experts"],
        "num_experts_per_tok": hf.get("num_experts_per_tok"),
        size_name: hf.get(size_name),
    }
    if missing := [name for name, value in values.items() if not _is_count(value)]:
        raise UserError(f"{file}: {', '.join(missing)} missing or not a whole number above 0")
    n_experts, top_k, size = map(int, values.values())
    if top_k > n_experts:
        raise UserError(f"{file}: num_experts_per_tok = {top_k}, more than the {n_experts} experts")
    dense = hf.get("mlp_only_layers") or []
    if not isinstance(dense, list) or dense != list(range(len(dense))) or len(dense) >= layers:
        raise UserError(
            f"{file}: mlp_only_layers = {dense!r} cannot be represented; expected none, or the first layers only"
        )
    normalize = True if kind == "mixtral" else hf.get("norm_topk_prob", False)
    return MoEConfig(n_experts, top_k, size, normalize_top_k=bool(normalize), n_dense_layers=len(dense))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _positive(fields: dict[str, Any], name: str, default: float, file: Path | str) -> float:
    value = fields.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UserError(f"{file}: {name} = {value!r}; expected a positive number")
    return value


def _check_windows(hf: dict[str, Any], kind: str, file: Path | str) -> None:
    """UserError unless every layer attends to all tokens before. Qwen's files name a window that is not used."""
    window = hf.get("sliding_window", 4096 if kind == "mistral" else None)  # what transformers takes
    if kind in ("llama", "mistral", "mixtral") and window is not None:
        raise UserError(f"{file}: sliding_window = {window!r} cannot be represented; expected null")
    layers = hf.get("layer_types") or []
    if not isinstance(layers, list) or any(layer != "full_attention" for layer in layers):
        raise UserError(f"{file}: layer_types = {layers!r} cannot be represented; expected full_attention only")


def _rope(hf: dict[str, Any], file: Path | str) -> dict[str, Any]:
    """Rotary settings: `rope_parameters` of newer files, `rope_theta` and `rope_scaling` of older ones."""
    rope: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(hf.get(name) or {}, dict):
            raise UserError(f"{file}: {name} = {hf[name]!r}; expected an object, or null")
        rope |= _of_full_attention(hf.get(name) or {}, name, file)
    theta = float(_positive({"rope_theta": hf["rope_theta"]} | rope, "rope_theta", 10000.0, file))
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


def _of_full_attention(rope: dict[str, Any], name: str, file: Path | str) -> dict[str, Any]:
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


def _plain_experts(c: MoEConfig) -> MoEConfig:
    """The same without what only other model types have."""
    return MoEConfig(
        c.n_experts, c.top_k, c.expert_dim, normalize_top_k=c.normalize_top_k, n_dense_layers=c.n_dense_layers
    )


def to_hf_config(c: LlamaConfig) -> dict[str, Any]:
    """The object of a config.json that `transformers` and `from_hf_config` read as `c`.

    Rotary settings have the names that older and newer readers both know. ValueError where no type has these flags.
    """
    flags = {"qkv_bias": c.qkv_bias, "qk_norm": c.qk_norm, "qk_norm_whole": c.qk_norm_whole}
    wanted = {name: True for name, given in flags.items() if given}
    kinds = [kind for kind in ARCHITECTURES if (kind in EXPERTS) == (c.moe is not None)]
    kind = next((kind for kind in kinds if TYPES[kind] == wanted), None)
    if kind is None:
        raise ValueError(f"no model type of Hugging Face has {' and '.join(wanted)} together")
    if c.moe and (c.moe != _plain_experts(c.moe) or (kind == "mixtral" and not c.moe.normalize_top_k)):
        raise ValueError(f"no model type of Hugging Face that dtron writes has experts like {c.moe}")
    hf: dict[str, Any] = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "vocab_size": c.vocab_size,
        "hidden_size": c.dim,
        "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.n_heads,
        "num_key_value_heads": c.n_kv_heads,
        "head_dim": c.head_size,
        "intermediate_size": c.ffn_dim,
        "hidden_act": "silu",
        "rms_norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
        "tie_word_embeddings": c.tie_embeddings,
        "initializer_range": c.init_std,
    }
    if kind not in ("qwen2", "mixtral"):
        hf["attention_bias"] = False
    if c.moe:
        hf |= {"num_experts_per_tok": c.moe.top_k, "output_router_logits": False}
        hf["num_local_experts" if kind == "mixtral" else "num_experts"] = c.moe.n_experts
        if kind != "mixtral":
            hf["norm_topk_prob"] = c.moe.normalize_top_k
        if kind == "qwen3_moe":
            hf |= {"moe_intermediate_size": c.moe.expert_dim, "decoder_sparse_step": 1}
            hf["mlp_only_layers"] = list(range(c.moe.n_dense_layers))
        else:
            hf["intermediate_size"] = c.moe.expert_dim
    if s := c.rope_scaling:
        hf["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": s.factor,
            "low_freq_factor": s.low_freq_factor,
            "high_freq_factor": s.high_freq_factor,
            "original_max_position_embeddings": s.original_max_position,
        }
    return hf
