"""Our dimensions from a Hugging Face config.json, and back."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from dtron.errors import UserError
from dtron.models.hf_fields import Fields, check_counts, is_count, positive
from dtron.models.hf_rope import read_rope, write_rope
from dtron.models.hf_types import DEFAULTS, DROPOUTS, LEGAL, TYPES, HFType
from dtron.models.hf_variants import ACTIVATIONS
from dtron.models.hf_windows import read_windows, write_windows
from dtron.models.llama import LlamaConfig

__all__ = ["dropouts_of", "from_hf_config", "hf_dimensions", "read_hf_config", "to_hf_config"]


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


def hf_dimensions(hf: Fields, file: Path | str) -> LlamaConfig:
    """The dimensions in the object of a config.json, called `file` in messages. UserError, naming the field."""
    kind = hf.get("model_type")
    if not isinstance(kind, str) or kind not in TYPES:
        own = "; the code that its auto_map names is never run (no trust_remote_code)" if hf.get("auto_map") else ""
        raise UserError(f"{file}: model_type is {kind!r}; expected one of {', '.join(TYPES)}{own}")
    of_type = TYPES[kind]
    hf = DEFAULTS | of_type.defaults | hf
    flags_of_biases = dict.fromkeys(of_type.biases, (False, True, None))
    for field, legal in {**LEGAL, **of_type.legal, **flags_of_biases}.items():
        if hf.get(field) not in legal:
            expected = json.dumps(legal[0]) + of_type.hints.get(field, "")
            raise UserError(f"{file}: {field} = {hf[field]!r} cannot be represented; expected {expected}")
    needed = ["vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"]
    needed += [] if "num_key_value_heads" in of_type.defaults else ["num_key_value_heads"]
    check_counts({name: hf.get(name) for name in needed}, file)
    for name in ("num_key_value_heads", "head_dim"):
        if hf.get(name) is not None and not is_count(hf[name]):
            raise UserError(f"{file}: {name} = {hf[name]!r}; expected a whole number above 0")
    dropouts_of(hf, file)
    vocab, dim, layers, heads, ffn = (hf[name] for name in needed[:5])
    head_size = hf.get("head_dim") or dim // heads
    if head_size != dim // heads and not of_type.head_size_of_its_own:
        raise UserError(f"{file}: head_dim = {head_size} cannot be represented; expected {dim // heads}, or none")
    biases = {flag: bool(hf.get(field)) for field, of_field in of_type.biases.items() for flag in of_field}
    flags = of_type.flags | biases | read_rope(hf, file, partial=of_type.partial_rotary) | of_type.read(hf, file)
    config = LlamaConfig(
        vocab, dim, layers, heads, hf.get("num_key_value_heads") or heads, ffn,
        head_dim=None if head_size * heads == dim else head_size, norm_eps=positive(hf, of_type.eps, file),
        tie_embeddings=bool(hf["tie_word_embeddings"]), **flags, **read_windows(hf, of_type.windows, file),
    )  # fmt: skip
    if mistakes := [rope.mistake for rope in config.all_ropes if rope and rope.mistake]:
        raise UserError(f"{file}: {mistakes[0]}")
    return config


def dropouts_of(hf: Fields, file: Path | str) -> str:
    """The dropouts above 0 in the object of a config.json, with their values; empty without any.

    A model is the same with and without; but dtron trains without. UserError where one is no share.
    """
    of_type = TYPES.get(str(hf.get("model_type")))
    hf = (of_type.defaults if of_type else {}) | hf
    found = {name: hf[name] for name in DROPOUTS if hf.get(name)}
    for name, value in found.items():
        if not isinstance(value, int | float) or not 0 <= value < 1:
            raise UserError(f"{file}: {name} = {value!r}; expected a number in [0, 1)")
    return ", ".join(f"{name} = {value:g}" for name, value in found.items())


def to_hf_config(c: LlamaConfig) -> Fields:
    """The object of a config.json that `transformers` and `from_hf_config` read as `c`.

    It is of the first type of the table that can say all that `c` does, which reading it again tells. ValueError,
    naming what stands in the way, where there is none.
    """
    wanted = _architecture(c)
    differences = []
    for kind, of_type in TYPES.items():
        if of_type.architecture is None or of_type.experts != (c.moe is not None):
            continue
        hf = _written(c, kind, of_type)
        try:
            read = _architecture(hf_dimensions(hf, "config.json"))
        except UserError:  # the type has no such value of a field
            continue
        if read == wanted:
            return hf
        differences.append([f"{name} = {value!r}" for name, value in wanted.items() if read[name] != value])
    least = min(differences, key=len)
    raise ValueError(
        "no model type of Hugging Face that dtron writes is like this model; the nearest has no " + ", ".join(least)
    )


def _architecture(c: LlamaConfig) -> Fields:
    """All fields by name, in so far as they take effect, and not how weights begin."""
    every = {field.name: getattr(c, field.name) for field in fields(c)} | {"head_dim": c.head_size, "init_std": None}
    every |= {"ropes": [c.rope(layer) for layer in range(c.n_layers)], "local_rope_theta": None}
    every |= {"windows": [c.window(layer) for layer in range(c.n_layers)]}
    return every | {"ffn_dim": None} if c.moe and not c.moe.n_dense_layers else every


def _written(c: LlamaConfig, kind: str, of_type: HFType) -> Fields:
    hf: Fields = {
        "architectures": [of_type.architecture],
        "model_type": kind,
        "vocab_size": c.vocab_size,
        "hidden_size": c.dim,
        "num_hidden_layers": c.n_layers,
        "num_attention_heads": c.n_heads,
        "num_key_value_heads": c.n_kv_heads,
        "head_dim": c.head_size,
        "intermediate_size": c.ffn_dim,
        of_type.activation: ACTIVATIONS[c.variant.activation],
        of_type.eps: c.norm_eps,
        "tie_word_embeddings": c.tie_embeddings,
        "initializer_range": c.init_std,
    }
    biases = {field: getattr(c, flags[0]) for field, flags in of_type.biases.items()}
    rope, windows = write_rope(c, partial=of_type.partial_rotary), write_windows(c, of_type.windows)
    return hf | biases | rope | windows | of_type.write(c)
