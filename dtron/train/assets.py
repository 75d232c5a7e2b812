"""The files beside the weights in a run's checkpoints that make each a complete model: config.json, the tokenizer."""

import json
from pathlib import Path
from typing import Any

from dtron.checkpoint.export import assets_of
from dtron.checkpoint.files import MANIFEST, intact_assets
from dtron.checkpoint.storage import StoragePath
from dtron.data.tokenizer import TextEncoder, read_tokenizer
from dtron.errors import UserError
from dtron.models.hf import hf_dimensions, read_hf_config
from dtron.parallel.float8 import converters_of_parameters
from dtron.train.setup import Setup

__all__ = ["encoder_of", "model_assets"]


def model_assets(setup: Setup, source: StoragePath | None, dataset: Any) -> dict[str, bytes]:
    """The files by name; none for models that Hugging Face does not know.

    source: the checkpoint or folder that the weights come from, whose files are kept where they still hold.
    dataset: of the run, which may have a tokenizer.
    """
    if setup.spec.hf_config is None or converters_of_parameters(setup.config.model.converters):
        return {}
    assets, lost = _assets_of(source)
    old = json.loads(assets.get("config.json", b"{}"))
    encoder = encoder_of(dataset)
    ids = {key: old.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    same_tokenizer = encoder is None or _has_tokenizer(assets, encoder)
    if encoder is not None and lost:
        assets |= {name: text.encode() for name, text in encoder.files().items() if name in lost}
        if not old:
            ids["eos_token_id"] = encoder.eos_id
    if encoder is not None and not same_tokenizer:
        assets = {name: text.encode() for name, text in encoder.files().items()}
        bos_id = encoder.begins_with[0] if encoder.begins_with else None
        ids = {"bos_token_id": bos_id, "eos_token_id": encoder.eos_id, "pad_token_id": None}
    else:
        assets |= _special_tokens(assets, encoder)
        if _is_of(old, setup):
            return assets
    scaling = getattr(setup.model_config, "rope_scaling", None)
    if (file := setup.config.model.hf_config_path) and not old:
        old = read_hf_config(file)[0]
    known = old.get("max_position_embeddings")
    longest = max(
        setup.config.training.seq_len, scaling.longest if scaling else 0, known if isinstance(known, int) else 0
    )
    config = {"max_position_embeddings": longest} | setup.spec.hf_config(setup.model_config) | ids
    return assets | {"config.json": (json.dumps(config, indent=2) + "\n").encode()}


def _assets_of(source: StoragePath | None) -> tuple[dict[str, bytes], list[str]]:
    """The files, and the names of those that the checkpoint has lost.

    None where the folder is gone: a resume no longer needs its initial weights.
    """
    try:
        if source and MANIFEST in source.names():
            return intact_assets(source)
        return (assets_of(source) if source else {}), []
    except OSError:
        return {}, []


def encoder_of(dataset: Any) -> TextEncoder | None:
    """The tokenizer of a dataset, where it has one."""
    if (encoder := getattr(dataset, "encoder", None)) is not None:
        return encoder
    path = getattr(dataset, "tokenizer_json", None)
    if path is None:
        return None
    return read_tokenizer(str(path), Path(path).parent, "the data's tokenizer")


def _special_tokens(assets: dict[str, bytes], encoder: TextEncoder | None) -> dict[str, bytes]:
    """A tokenizer.json for that among `assets` where it begins a text with other tokens than the run's documents."""
    if encoder is None or "tokenizer.json" not in assets:
        return {}
    theirs = TextEncoder(assets["tokenizer.json"].decode(), encoder.eos)
    same = (theirs.begins_with, theirs.ends_with) == (encoder.begins_with, encoder.ends_with)
    return {} if same else {"tokenizer.json": encoder.json_as_used().encode()}


def _has_tokenizer(assets: dict[str, bytes], encoder: TextEncoder) -> bool:
    """Whether the tokenizer among `assets` has the same vocabulary."""
    if "tokenizer.json" not in assets:
        return False
    return TextEncoder(assets["tokenizer.json"].decode(), encoder.eos).vocabulary == encoder.vocabulary


def _is_of(config: dict[str, Any], setup: Setup) -> bool:
    """Whether the object of a config.json describes the run's model."""
    try:
        return hf_dimensions(config, "config.json") == setup.model_config
    except UserError:
        return False
