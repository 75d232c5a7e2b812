"""Finding a model on disk and reading it into this process: a checkpoint, a run, a Hugging Face folder."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from dtron.checkpoint.export import assets_of
from dtron.checkpoint.files import DamagedError, read_manifest, steps_in
from dtron.checkpoint.hf_folder import check_foreign, folder_meant
from dtron.checkpoint.load import Kind, kind_of, load_initial
from dtron.checkpoint.storage import StoragePath
from dtron.data.tokenizer import TextEncoder, holds_tokenizer, read_tokenizer
from dtron.errors import UserError
from dtron.files import modified_s
from dtron.hf.prompts import unpacked
from dtron.models.hf import dropouts_of, from_hf_config
from dtron.models.llama import Llama, LlamaConfig
from dtron.parallel.compose import ParallelModel
from dtron.parallel.loss import TokenMean
from dtron.registry import cross_entropy

__all__ = ["Found", "OpenedModel", "find_model", "folder_at", "one_rank", "open_model"]

DOWNLOAD = "a model of the hub has to be downloaded first: hf download NAME --local-dir FOLDER"


@dataclass(frozen=True)
class Found:
    """A model on disk: where, whose, what lies beside its weights, and its dimensions."""

    path: StoragePath
    kind: Kind | Literal["torchtitan"]
    assets: dict[str, bytes]
    config: LlamaConfig

    @property
    def warning(self) -> str:
        """A line on what of its config.json dtron does not do; empty where that is nothing."""
        dropouts = dropouts_of(json.loads(self.assets.get("config.json", b"{}")), str(self.path))
        return f"warning: {self.path}/config.json has {dropouts}: dtron trains without dropout" if dropouts else ""


@dataclass(frozen=True)
class OpenedModel:
    """A whole model on one device, ready to be called.

    encoder: None where no tokenizer lies beside the weights. stop_ids: tokens that end a text.
    bos_id: the token that begins one, None where the files name none. max_positions: the longest sequence it was made
    for, in tokens, None where not known. name: what was opened, for messages. generation: the object of its
    generation_config.json. assets: the files beside its weights. warning: see `Found.warning`.
    """

    model: Llama
    encoder: TextEncoder | None
    stop_ids: list[int]
    bos_id: int | None
    max_positions: int | None
    name: str
    generation: dict[str, Any] = field(default_factory=dict)
    assets: dict[str, bytes] = field(default_factory=dict)
    warning: str = ""


def folder_at(path: str) -> StoragePath:
    """A local path or an fsspec URL. UserError for the address of a model of the hub."""
    if path.startswith(("http://", "https://", "hf://")) or not path.rstrip("/"):
        raise UserError(f"{path!r} is no folder to read a model from; {DOWNLOAD}")
    return StoragePath.at(Path(folder_meant(path)).expanduser() if "://" not in path else path)


def find_model(path: str) -> Found:
    """The model at `path`; of a run's folder, or that of several runs, the newest checkpoint. UserError without one."""
    folder, kind = _find(folder_at(path))
    assets = assets_of(folder)
    if "config.json" not in assets:
        cause = "; an older checkpoint, or a registered model that has no Hugging Face form" if kind == "dtron" else ""
        raise UserError(f"{folder} has no config.json{cause}; expected the model's: put it into the folder")
    with unpacked(assets) as local:
        try:
            config = from_hf_config(local, str(folder))
        except UserError as error:
            raise UserError(str(error).replace(str(local), str(folder))) from None
    return Found(folder, kind, assets, config)


def _find(folder: StoragePath) -> tuple[StoragePath, Kind]:
    try:
        if kind := kind_of(folder):
            return folder, kind
        for inside in (folder, folder / "checkpoint", *_runs(folder)):
            for step in reversed(steps_in(inside)):
                with contextlib.suppress(DamagedError):
                    read_manifest(inside / f"step-{step}")
                    return inside / f"step-{step}", "dtron"
        check_foreign(folder, folder.names())
        there = ", ".join(folder.names()[:5]) or "nothing"
        found = f"there is no model in {folder} (but {there})" if folder.exists() else f"there is no folder {folder}"
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error}") from None
    raise UserError(
        f"{found}; expected a checkpoint (outputs/RUN/checkpoint/step-N), a run's folder, or a folder of Hugging Face "
        f"with safetensors; {DOWNLOAD}"
    )


def _runs(folder: StoragePath) -> list[StoragePath]:
    """The folders of checkpoints of the runs in a local folder, the one that was last written to first."""
    found = list(folder.local.glob("*/checkpoint")) if folder.local else []
    return [StoragePath.at(path) for path in sorted(found, key=modified_s, reverse=True)]


@contextlib.contextmanager
def one_rank() -> Iterator[None]:
    """A process group of this process alone: loading and saving call collectives."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def open_model(path: str, device: torch.device, dtype: torch.dtype) -> OpenedModel:
    """Read the model at `path` into memory. UserError where that cannot be."""
    found = find_model(path)
    with torch.device("meta"):
        model = Llama(found.config)
    model.to(dtype).to_empty(device=device).requires_grad_(False)
    if found.config.tie_embeddings:
        model.lm_head.weight = model.embed_tokens.weight  # to_empty makes two of it
    whole = ParallelModel([model], None, TokenMean(cross_entropy, device), {}, True, False)
    with one_rank():
        load_initial(found.path, whole, None, [], model)
    encoder = _encoder(found)
    config, generation = _object(found, "config.json"), _object(found, "generation_config.json")
    ends = _ids(generation.get("eos_token_id")) or _ids(config.get("eos_token_id"))
    ends = ends or ([encoder.eos_id] if encoder else [])
    begins = _ids(config.get("bos_token_id"))
    longest = config.get("max_position_embeddings")
    return OpenedModel(
        model, encoder, ends, begins[0] if begins else None, longest if isinstance(longest, int) else None,
        str(found.path), generation, found.assets, found.warning,
    )  # fmt: skip


def _encoder(found: Found) -> TextEncoder | None:
    if not holds_tokenizer(found.assets):
        return None
    with unpacked(found.assets) as folder:
        try:
            return read_tokenizer(str(folder), folder, str(found.path))
        except UserError as error:
            raise UserError(str(error).replace(f"{found.path} = '{folder}'", str(found.path))) from None


def _object(found: Found, name: str) -> dict[str, Any]:
    """The object in one of the JSON files beside the weights; none where there is no such file."""
    try:
        content = json.loads(found.assets.get(name, b"{}"))
    except ValueError as error:
        raise UserError(f"{found.path}/{name} is not readable JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{found.path}/{name} holds a JSON {type(content).__name__}; expected an object")
    return content


def _ids(given: Any) -> list[int]:
    """Token ids of a config: a number, a list, or nothing. Anything else is left out."""
    return [id_ for id_ in (given if isinstance(given, list) else [given]) if isinstance(id_, int)]
