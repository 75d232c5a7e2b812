"""From what a configuration names as data to a data set: the embedded corpus, prepared shards, or files as they are.

Each builder has the signature of a registered data set: (config, section, split, seq_len, vocab_size, log), where
section is [training], [validation] or one of training.mixture.
"""

import hashlib
from pathlib import Path
from typing import Literal

from dtron.config.sections import Config, Dataset
from dtron.data.corpus import Log, load_stdlib
from dtron.data.packed import TokenDataset
from dtron.data.prepare import prepare_cached
from dtron.data.shards import is_prepared, open_store
from dtron.data.sources import SourceSpec, may_be_on_the_hub, open_source
from dtron.data.stream import StreamedSource
from dtron.data.tokenizer import TextEncoder, read_tokenizer
from dtron.errors import UserError

__all__ = ["build_by_path", "known_tokenizer", "names_a_place", "stdlib"]

Split = Literal["train", "validation"]
STDLIB = "its own, trained on it"


def stdlib(config: Config, section: Dataset, split: Split, seq_len: int, vocab_size: int, log: Log) -> TokenDataset:
    """The embedded corpus; its own tokenizer has 4096 tokens, or fewer for a model with a smaller vocabulary."""
    size, documents = min(4096, vocab_size), config.training.attention_mask == "document"
    return load_stdlib(
        config.job.cache_folder, seq_len, split, config.model.hf_assets_path, size, documents=documents, log=log,
        add_special_tokens=config.model.add_special_tokens,
    )  # fmt: skip


def names_a_place(section: Dataset) -> bool:
    """Whether a data set that is not registered can be one of `build_by_path`: something local, or a hub name."""
    location = section.dataset_path or section.dataset
    return bool(location) and (Path(location).exists() or ("/" in location and may_be_on_the_hub(location)))


def build_by_path(
    config: Config, section: Dataset, split: Split, seq_len: int, vocab_size: int, log: Log
) -> TokenDataset | StreamedSource:
    """A folder of `dtron prepare`; or a source that is tokenized on the fly, by the tokenizer of model.hf_assets_path.

    Of a source that is not prepared, a validation set is tokenized once, into job.cache_folder.
    """
    location = Path(section.dataset_path or section.dataset)
    documents = config.training.attention_mask == "document"
    if is_prepared(location):
        return _prepared(config, section, location, seq_len, documents)
    encoder = _encoder(config, str(location))
    spec = SourceSpec(
        section.dataset,
        section.dataset_path,
        section.dataset_subset,
        section.dataset_split or ("train" if location.exists() or split == "train" else "validation"),
        section.text_column or "text",
    )
    source = open_source(spec, config.job.cache_folder)
    skip_bad = section.on_bad_document == "skip"
    if split == "validation":
        store = prepare_cached(source, encoder, config.job.cache_folder, skip_bad=skip_bad, log=log)
        return TokenDataset(store, seq_len, documents=documents, name=str(location))
    return StreamedSource(
        source, encoder, seq_len, seed=config.debug.seed, documents=documents, name=str(location),
        shuffle_documents=config.training.shuffle_documents, skip_bad=skip_bad,
    )  # fmt: skip


def _prepared(config: Config, section: Dataset, folder: Path, seq_len: int, documents: bool) -> TokenDataset:
    for key in ("dataset_subset", "dataset_split", "text_column", "on_bad_document"):
        if getattr(section, key) != getattr(Dataset(), key):
            raise UserError(f"{folder} is prepared, so {key} has no effect; leave it out")
    store, model = open_store(folder), config.model
    if model.hf_assets_path or model.add_special_tokens not in (None, store.add_special_tokens):
        given = read_tokenizer(
            model.hf_assets_path or str(folder), config.job.cache_folder, "model.hf_assets_path",
            add_special_tokens=model.add_special_tokens,
        )  # fmt: skip
        if given.fingerprint != store.tokenizer_fingerprint and given.json == store.tokenizer_json.read_text("utf-8"):
            there, wanted = ("with", "without") if store.add_special_tokens else ("without", "with")
            raise UserError(
                f"the documents of {folder} were prepared {there} the special tokens that the tokenizer adds, those of "
                f"the run are {wanted} them (model.add_special_tokens, or else other prepared data): change the key, "
                f"or prepare {folder} again with --{'no-' if wanted == 'without' else ''}add-special-tokens"
            )
        if given.fingerprint != store.tokenizer_fingerprint:
            raise UserError(
                f"{folder} was prepared with another tokenizer ({store.tokenizer_fingerprint[:12]}) than "
                f"model.hf_assets_path = {model.hf_assets_path!r} ({given.fingerprint[:12]}): leave the key out "
                "to take the one in the folder, name that tokenizer, or prepare the data again"
            )
    return TokenDataset(store, seq_len, documents=documents, name=str(folder))


def known_tokenizer(config: Config, section: Dataset, key: str) -> str | None:
    """A hash of a data set's tokenizer, without reading its text; None: only building it shows.

    key: that names it. STDLIB: one that the embedded corpus is to train, which prepared data can have only where it
    was made from that corpus. UserError for text that is tokenized on the fly with no tokenizer named.
    """
    location = Path(section.dataset_path or section.dataset)
    if section.dataset == "stdlib":
        return None if config.model.hf_assets_path else STDLIB
    if is_prepared(location):
        store = open_store(location)
        made_from_it = not config.model.hf_assets_path and store.source["name"].startswith("the standard library")
        return None if made_from_it else hashlib.sha256(store.tokenizer_json.read_bytes()).hexdigest()
    if not config.model.hf_assets_path:
        raise _no_tokenizer(f"{key} = {location}")
    return None


def _encoder(config: Config, location: str) -> TextEncoder:
    if not config.model.hf_assets_path:
        raise _no_tokenizer(location)
    return read_tokenizer(
        config.model.hf_assets_path, config.job.cache_folder, "model.hf_assets_path",
        add_special_tokens=config.model.add_special_tokens,
    )  # fmt: skip


def _no_tokenizer(location: str) -> UserError:
    return UserError(
        f"{location} is text that is tokenized on the fly: name the tokenizer's folder as model.hf_assets_path, "
        "or tokenize it once with `dtron prepare`"
    )
