"""Weights of a Hugging Face folder: safetensors, in one file or in several with an index.

    config.json                        the dimensions (dtron.models.hf)
    model.safetensors                  all tensors; or
    model-00001-of-00030.safetensors   some of them, and
    model.safetensors.index.json       which file holds which

Names and the order of rows are ours already; only the head is named without `model.`. A rank reads the slices of its
own shards, through a memory map, and converts them to the dtype of its parameters one slice at a time.
"""

import json
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.futures import Future

from dtron.checkpoint.storage import StoragePath
from dtron.errors import UserError

__all__ = [
    "HEAD",
    "INDEX",
    "SINGLE",
    "Entry",
    "Reader",
    "check_fits",
    "check_tied",
    "entries_of",
    "is_hf",
    "local",
    "tensors_of",
    "their_name",
]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
IGNORED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")  # in old files; computed, not learnt
HEAD, EMBEDDING = "model.lm_head.weight", "model.embed_tokens.weight"
ROWS = 1 << 12  # of two matrices compared at a time


@dataclass(frozen=True)
class Entry:
    """A tensor of a folder: its file's name, dtype and shape."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]


def is_hf(names: list[str]) -> bool:
    """Whether the folder with these files is one of Hugging Face."""
    return any(name.endswith((".safetensors", ".safetensors.index.json")) for name in names)


def local(folder: StoragePath) -> Path:
    """UserError where a folder is behind a URL: safetensors are read through memory maps."""
    if (path := folder.local) is None:
        raise UserError(f"{folder}: Hugging Face folders are read from local disks only; copy it to one")
    return path


def our_name(theirs: str) -> str:
    """`lm_head.weight` -> `model.lm_head.weight`: parameters of checkpoints all begin so."""
    return HEAD if theirs == their_name(HEAD) else theirs


def their_name(ours: str) -> str:
    return ours.removeprefix("model.") if ours == HEAD else ours


def entries_of(folder: Path) -> dict[str, Entry]:
    """Every tensor of a folder under our name. UserError where a file is missing, truncated or not what it should be.

    Only headers are read.
    """
    if (folder / INDEX).is_file():
        try:
            weight_map: dict[str, str] = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
            files = sorted(set(weight_map.values()))
            if not all(isinstance(name, str) for name in files):
                raise TypeError("weight_map does not give names of files")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{folder / INDEX} is no index of safetensors files: {error!r}") from None
    elif (folder / SINGLE).is_file():
        weight_map, files = {}, [SINGLE]
    else:
        loose = ", the index of the others there" if any(folder.glob("model-*.safetensors")) else ""
        raise UserError(f"{folder} has neither {SINGLE} nor {INDEX}{loose}")
    if missing := [name for name in files if not (folder / name).is_file()]:
        raise UserError(
            f"{folder}: {len(missing)} of {len(files)} files named in {INDEX} are missing, {missing[0]} the first; "
            "download them again"
        )
    found = {theirs: entry for name in files for theirs, entry in _header(folder / name)}
    if lost := sorted(name for name, file in weight_map.items() if name not in found or found[name].file != file):
        raise UserError(f"{folder}: {INDEX} says that {lost[0]} is in {weight_map[lost[0]]}, which does not have it")
    return {our_name(theirs): entry for theirs, entry in found.items() if not IGNORED.fullmatch(theirs)}


def _header(file: Path) -> Iterator[tuple[str, Entry]]:
    """Names and entries of one file. Its format: https://huggingface.co/docs/safetensors/index#format."""
    size = file.stat().st_size
    try:
        with file.open("rb") as opened:
            first = opened.read(8)
            if first == b"version ":
                raise ValueError("it is a pointer of git-lfs, not the file")
            length = struct.unpack("<Q", first)[0]
            if length > size - 8:
                raise ValueError(f"its header has {length} bytes, the file {size}")
            header = json.loads(opened.read(length))
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = 8 + length + max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is truncated or no safetensors file: {error}; download it again") from None
    if size != end:
        raise UserError(
            f"{file} has {size} bytes, but its header says {end}: it is truncated or damaged; download it again"
        )
    for name, entry in tensors.items():
        if entry["dtype"] not in DTYPES:
            raise UserError(
                f"{file}: {name} is stored as {entry['dtype']}, which is not read (quantized weights are not); "
                f"expected one of {', '.join(DTYPES)}"
            )
        yield name, Entry(file.name, DTYPES[entry["dtype"]], tuple(entry["shape"]))


def check_fits(
    where: Any,
    shapes: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
    excluded: Callable[[str], bool] = lambda name: False,
    hint: str = "its config.json is of another model",
) -> None:
    """UserError unless `where` has just the tensors of the model, each in its shape.

    shapes, expected: by our names, there and in the plain model. excluded: whether a weight is left out on purpose.
    A head that a tied model has no use for may be there. hint: what to do.
    """
    for name, shape in expected.items():
        if excluded(name):
            continue
        if name not in shapes:
            raise UserError(f"{where} does not fit this model: it has no {their_name(name)}; {hint}")
        if shapes[name] != shape:
            raise UserError(
                f"{where} does not fit this model: {their_name(name)} is {list(shapes[name])} there and {list(shape)} "
                f"in the model; {hint}"
            )
    spare = {HEAD} if HEAD not in expected else set()
    if more := sorted(set(shapes) - set(expected) - spare):
        raise UserError(f"{where} does not fit this model, which has no {their_name(more[0])}; {hint}")


def check_tied(folder: Path, entries: Mapping[str, Entry], tied: bool) -> None:
    """UserError where a folder of a tied model has a head of its own that differs from the embedding."""
    if not tied or HEAD not in entries or EMBEDDING not in entries:
        return
    embedding, head = (_slice(folder, entries, name) for name in (EMBEDDING, HEAD))
    rows = entries[EMBEDDING].shape[0]
    if any(not torch.equal(embedding[i : i + ROWS], head[i : i + ROWS]) for i in range(0, rows, ROWS)):
        raise UserError(
            f"{folder}: lm_head.weight differs from model.embed_tokens.weight, but the model's embeddings are tied; "
            "set tie_word_embeddings false in its config.json, or model.tie_embeddings"
        )


def _open(folder: Path, file: str) -> Any:
    from safetensors import safe_open

    return safe_open(folder / file, framework="pt")


def _slice(folder: Path, entries: Mapping[str, Entry], name: str) -> Any:
    return _open(folder, entries[name].file).get_slice(their_name(name))


def tensors_of(folder: Path, entries: Mapping[str, Entry]) -> dict[str, Tensor]:
    """All tensors by our names, in their own dtype and memory-mapped: nothing is read before it is used."""
    opened = {file: _open(folder, file) for file in {entry.file for entry in entries.values()}}
    return {name: opened[entry.file].get_tensor(their_name(name)) for name, entry in entries.items()}


class Reader(dcp.StorageReader):
    """Gives torch.distributed.checkpoint the slices it asks for of a folder, which `entries` describe."""

    def __init__(self, folder: Path, entries: Mapping[str, Entry]) -> None:
        self._folder, self._entries = folder, entries

    def reset(self, checkpoint_id: Any = None) -> None:
        """There is nothing to forget."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return Metadata({name: _describe(entry) for name, entry in self._entries.items()})

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """All is known already."""

    def prepare_local_plan(self, plan: dcp.LoadPlan) -> dcp.LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[dcp.LoadPlan]) -> list[dcp.LoadPlan]:
        return plans

    def read_data(self, plan: dcp.LoadPlan, planner: dcp.LoadPlanner) -> Future[None]:
        opened: dict[str, Any] = {}
        for item in sorted(plan.items, key=lambda item: self._entries[item.storage_index.fqn].file):
            name = item.storage_index.fqn
            file = self._entries[name].file
            if file not in opened:
                opened = {file: _open(self._folder, file)}
            of_ours = tuple(slice(o, o + n) for o, n in zip(item.storage_offsets, item.lengths, strict=True))
            target = planner.resolve_tensor(item).detach()
            target.copy_(opened[file].get_slice(their_name(name))[of_ours])
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done


def _describe(entry: Entry) -> TensorStorageMetadata:
    size = torch.Size(entry.shape)
    whole = ChunkStorageMetadata(torch.Size([0] * len(size)), size)
    return TensorStorageMetadata(TensorProperties(dtype=entry.dtype), size, [whole])
