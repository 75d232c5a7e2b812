"""What lies beside the weights in a run's checkpoints, and makes each a model by itself: config.json, the tokenizer."""

import fnmatch
import json
from pathlib import Path
from typing import Any

from dtron.checkpoint.export import assets_of
from dtron.checkpoint.load import from_rank_0
from dtron.checkpoint.place import Place
from dtron.config import Config
from dtron.data.tokenizer import TextEncoder, eos_token, read_tokenizer
from dtron.errors import UserError
from dtron.models.hf import hf_dimensions, read_hf_config
from dtron.train.setup import Setup

__all__ = ["check_vocabulary", "model_assets"]


def model_assets(setup: Setup, source: Place | None, dataset: Any) -> dict[str, bytes]:
    """The files by name; none for models that Hugging Face does not know.

    source: the checkpoint or folder that the weights come from, whose files are kept where they still hold.
    dataset: of the run, which may have a tokenizer.
    """
    if setup.spec.hf_config is None or setup.config.model.converters:
        return {}
    assets = _assets_of(source)
    old = json.loads(assets.get("config.json", b"{}"))
    encoder = _encoder_of(dataset)
    ids = {key: old.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    same_tokenizer = encoder is None or _has_tokenizer(assets, encoder)
    if encoder is not None and not same_tokenizer:
        assets = {name: text.encode() for name, text in encoder.files().items()}
        ids = {"bos_token_id": None, "eos_token_id": encoder.eos_id, "pad_token_id": None}
    elif _is_of(old, setup):
        return assets
    scaling = getattr(setup.model_config, "rope_scaling", None)
    if (file := setup.config.model.hf_config_path) and not old:
        old = read_hf_config(file)[0]
    known = old.get("max_position_embeddings")
    longest = max(
        setup.config.training.seq_len, scaling.original_max_position if scaling else 0,
        known if isinstance(known, int) else 0,
    )  # fmt: skip
    config = setup.spec.hf_config(setup.model_config) | ids | {"max_position_embeddings": longest}
    return assets | {"config.json": (json.dumps(config, indent=2) + "\n").encode()}


def _assets_of(source: Place | None) -> dict[str, bytes]:
    """None where the folder is gone: a resume needs its initial weights no more."""
    try:
        return assets_of(source) if source else {}
    except OSError:
        return {}


def _encoder_of(dataset: Any) -> TextEncoder | None:
    """The tokenizer of a dataset, where it has one."""
    if (encoder := getattr(dataset, "encoder", None)) is not None:
        return encoder
    path = getattr(dataset, "tokenizer_json", None)
    if path is None:
        return None
    return TextEncoder(Path(path).read_text(encoding="utf-8"), eos_token(Path(path).with_name("tokenizer_config.json")))


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


def check_vocabulary(config: Config, dataset: Any) -> None:
    """UserError on all ranks if the initial weights were trained with a vocabulary that is not the data's."""
    c = config.checkpoint
    folder = Place.at(c.initial_load_path).local if c.initial_load_path else None
    if folder is not None and not any(fnmatch.fnmatch("embed_tokens.weight", p) for p in c.exclude_from_loading):
        from_rank_0(lambda: _compare_vocabularies(config, dataset, folder))


def _compare_vocabularies(config: Config, dataset: Any, folder: Path) -> None:
    encoder = _encoder_of(dataset)
    if encoder is None or not any(folder.glob("tokenizer.*")):
        return
    theirs = read_tokenizer(str(folder), config.job.cache_folder, "checkpoint.initial_load_path").vocabulary
    ours = encoder.vocabulary
    if differ := sorted((id_, token) for token, id_ in theirs.items() ^ ours.items()):
        id_ = differ[0][0]
        spelt = [next((repr(token) for token, i in known.items() if i == id_), "nothing") for known in (ours, theirs)]
        raise UserError(
            f"the data was tokenized with another vocabulary than the weights in {folder} were trained with (id {id_} "
            f"is {spelt[0]} in the data and {spelt[1]} there): prepare the data with --tokenizer {folder}, or set "
            f"model.hf_assets_path = {folder} for data that is tokenized on the fly; for new embeddings leave the old "
            'ones out: checkpoint.exclude_from_loading = ["embed_tokens.*", "lm_head.*"]'
        )
