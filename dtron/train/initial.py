"""The weights that a fresh run starts with: where they come from, whether they fit the model and the data, loading."""

import dataclasses
import fnmatch
import logging
import os
from pathlib import Path
from typing import Any

import torch

from dtron.checkpoint.hf_folder import check_foreign, folder_meant, is_hf
from dtron.checkpoint.load import check_excluded, load_initial
from dtron.checkpoint.storage import StoragePath
from dtron.config import Config, replace
from dtron.data.tokenizer import holds_tokenizer, read_tokenizer
from dtron.errors import UserError
from dtron.models.hf import from_hf_config
from dtron.models.llama import LlamaConfig
from dtron.models.spec import ModelSpec, meta_model
from dtron.parallel.compose import ParallelModel
from dtron.parallel.float8 import converters_of_parameters
from dtron.ranks.agree import from_rank_0
from dtron.train.assets import encoder_of
from dtron.train.setup import Setup

__all__ = ["check_export", "check_initial", "check_vocabulary", "load_weights", "resolve_initial"]

log = logging.getLogger(__name__)


def resolve_initial(config: Config) -> Config:
    """initial_load_in_hf without a path takes model.hf_assets_path; a cache of the hub and a file mean their folder."""
    for key in ("checkpoint.initial_load_path", "model.hf_config_path", "model.hf_assets_path"):
        given = getattr(getattr(config, key.split(".")[0]), key.split(".")[1])
        # A tokenizer's or configuration's file is one.
        if given and (key == "checkpoint.initial_load_path" or Path(given).expanduser().is_dir()):
            config = replace(config, key, folder_meant(given))
    c = config.checkpoint
    if not c.initial_load_in_hf or c.initial_load_path:
        return config
    if not config.model.hf_assets_path:
        raise UserError(
            "checkpoint.initial_load_in_hf needs the folder with the weights: set checkpoint.initial_load_path, or "
            "model.hf_assets_path where the tokenizer is in the same folder"
        )
    return replace(config, "checkpoint.initial_load_path", config.model.hf_assets_path)


# Most fields do not show in the shapes of the weights: a wrong value would spoil the model silently. Not these: the
# vocabulary may grow, and a training has its own initial values and balance of experts.
_FREE = ("vocab_size", "init_std", "moe")


def check_initial(config: Config, model_config: Any) -> None:
    """UserError if the config.json beside the initial weights is of another model, or not of Hugging Face at all."""
    folder = config.checkpoint.initial_load_path
    local = StoragePath.at(folder).local if folder else None
    if folder is None or local is None or not local.is_dir():
        return
    names = os.listdir(local)
    if config.checkpoint.initial_load_in_hf and not ("config.json" in names and is_hf(names)):
        check_foreign(local, names)
        raise UserError(
            f"checkpoint.initial_load_in_hf: {folder} has no config.json with safetensors beside it; leave the key out "
            "for a checkpoint"
        )
    if "config.json" not in names:
        return
    if not isinstance(model_config, LlamaConfig):
        return
    there, m = from_hf_config(local, "checkpoint.initial_load_path"), config.model
    given = {"rope_theta": m.rope_theta, "rope_scaling": m.rope_scaling.rope_type}
    meant = [name for name, value in given.items() if value is not None]
    names = [field.name for field in dataclasses.fields(there) if field.name not in (*_FREE, "head_dim", *meant)]
    for name in (*names, "head_size"):
        ours, theirs = getattr(model_config, name), getattr(there, name)
        if ours == theirs:
            continue
        hint = f"set model.hf_config_path = {folder} to take the dimensions of its config.json"
        if name != "rope_scaling" and getattr(m, name, None) is not None:
            hint = f"take model.{name} out of the configuration"
        raise UserError(
            f"checkpoint.initial_load_path: the model has {name} {ours}, but the weights in {folder} were trained "
            f"with {theirs}; {hint}, or change its config.json where another value is meant"
        )


def check_export(c: Config, spec: ModelSpec) -> None:
    """UserError if last_save_in_hf cannot be done."""
    if not c.checkpoint.last_save_in_hf:
        return
    if not c.checkpoint.enable or c.checkpoint.load_only:
        raise UserError("checkpoint.last_save_in_hf needs checkpoint.enable = true, and load_only false")
    if spec.hf_config is None or converters_of_parameters(c.model.converters):
        what = "model.converters change the model" if spec.hf_config is not None else f"model.name is {c.model.name}"
        raise UserError(f"checkpoint.last_save_in_hf: {what}, which Hugging Face has no name for; leave it out")


def load_weights(setup: Setup, model: ParallelModel, optimizers: list[torch.optim.Optimizer] | None) -> None:
    """Load checkpoint.initial_load_path, its optimizer state too unless None. UserError on all ranks if it is unfit."""
    c = setup.config.checkpoint
    assert c.initial_load_path is not None
    path = StoragePath.at(c.initial_load_path)
    whole = meta_model(setup.spec, setup.model_config)
    check_excluded(c.exclude_from_loading, [name for name, _ in whole.named_parameters()])
    # Only where its key is set: an evaluation is of the weights, and a model of another size is a mistake.
    grow = setup.config.model.vocab_size is not None and not setup.config.validation.only
    load_initial(path, model, optimizers, c.exclude_from_loading, whole, grow)
    log.info("weights from %s", path)


def check_vocabulary(config: Config, dataset: Any) -> None:
    """UserError on all ranks if the initial weights were trained with a vocabulary that is not the data's."""
    c = config.checkpoint
    folder = StoragePath.at(c.initial_load_path).local if c.initial_load_path else None
    if folder is not None and not any(fnmatch.fnmatch("embed_tokens.weight", p) for p in c.exclude_from_loading):
        from_rank_0(lambda: _compare_vocabularies(config, dataset, folder))


def _compare_vocabularies(config: Config, dataset: Any, folder: Path) -> None:
    encoder = encoder_of(dataset)
    if encoder is None or not holds_tokenizer(os.listdir(folder)):
        return
    theirs = read_tokenizer(str(folder), config.job.cache_folder, "checkpoint.initial_load_path").vocabulary
    ours = encoder.vocabulary
    if lost := theirs.items() - ours.items():
        id_ = min(id_ for _, id_ in lost)
        spelt = [next((repr(token) for token, i in known.items() if i == id_), "nothing") for known in (ours, theirs)]
        raise UserError(
            f"the data was tokenized with another vocabulary than the weights in {folder} were trained with (id {id_} "
            f"is {spelt[0]} in the data and {spelt[1]} there): prepare the data with --tokenizer {folder}, or with one "
            f"that adds tokens to it and keeps the old ids, or set model.hf_assets_path = {folder} for data that is "
            "tokenized on the fly; for new embeddings leave the old ones out: "
            'checkpoint.exclude_from_loading = ["embed_tokens.*", "lm_head.*"]'
        )
    if new := sorted((id_, token) for token, id_ in ours.items() - theirs.items()):
        log.info(
            "the data's tokenizer has %d tokens more than that in %s, from %r (id %d) on; the old ones agree, so their "
            "embeddings are used, and those of the new ones have yet to be trained", len(new), folder, *new[0][::-1],
        )  # fmt: skip
