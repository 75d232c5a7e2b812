"""Weights of a Hugging Face folder: in one file or in several with an index, of safetensors or else of torch.save.

    config.json                        the dimensions (dtron.models.hf)
    model.safetensors                  all tensors; or
    model-00001-of-00030.safetensors   some of them, and
    model.safetensors.index.json       which file holds which
    pytorch_model.bin                  and so on: the same, as torch.save writes it

Names and the order of rows are ours already, but for what `our_name` says. A rank reads the slices of its own shards,
through a memory map, and converts them to the dtype of its parameters one slice at a time.
"""

import json
import os
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

from dtron.checkpoint.reader import load_tensors
from dtron.checkpoint.storage import StoragePath
from dtron.errors import UserError

__all__ = [
    "HEAD",
    "INDEX",
    "SINGLE",
    "Entry",
    "Reader",
    "check_fits",
    "check_foreign",
    "check_tied",
    "entries_of",
    "folder_meant",
    "grown_shapes",
    "is_hf",
    "local",
    "tensors_of",
    "their_name",
]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# The order in which transformers looks for them.
WEIGHTS = ((SINGLE, INDEX), ("pytorch_model.bin", "pytorch_model.bin.index.json"))
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
IGNORED = re.compile(r".*\brotary_emb\.\w+")  # computed, not learnt
HEAD, EMBEDDING = "model.lm_head.weight", "model.embed_tokens.weight"
ROWS = 1 << 12  # of two matrices compared at a time
# What DistributedDataParallel, torch.compile, FSDP and activation checkpointing put into names.
WRAPPERS = re.compile(
    r"^((module|_orig_mod)\.)+|(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)


@dataclass(frozen=True)
class Entry:
    """A tensor of a folder: its file's name, its own name in it, dtype and shape."""

    file: str
    stored: str
    dtype: torch.dtype
    shape: tuple[int, ...]


def is_hf(names: list[str]) -> bool:
    """Whether the folder with these files is one of Hugging Face."""
    return any(
        re.fullmatch(r".*\.safetensors(\.index\.json)?|pytorch_model.*\.bin(\.index\.json)?", n.lower()) for n in names
    )


def local(folder: StoragePath) -> Path:
    """UserError where a folder is behind a URL: safetensors are read through memory maps."""
    if (path := folder.local) is None:
        raise UserError(f"{folder}: Hugging Face folders are read from local disks only; copy it to one")
    return path


def our_name(stored: str) -> str:
    """`model.` and the name in the plain model.

    As transformers does, it takes names without `model.`, as a base model saved alone has them; and what wrappers of
    torch have put into names is left out.
    """
    name = WRAPPERS.sub("", stored)
    return "model." + re.sub(r"^(model\.)+", "", name)


def their_name(ours: str) -> str:
    return ours.removeprefix("model.") if ours == HEAD else ours


def entries_of(folder: Path) -> dict[str, Entry]:
    """Every tensor of a folder under our name. UserError where a file is missing, truncated or not what it should be.

    Of safetensors only headers are read.
    """
    index, weight_map, files = files_of(folder)
    if missing := [name for name in files if not (folder / name).is_file()]:
        raise UserError(
            f"{folder}: {len(missing)} of {len(files)} files named in {index} are missing, {missing[0]} the first; "
            "download them again"
        )
    found = {entry.stored: entry for name in files for entry in _entries(folder / name)}
    if lost := sorted(name for name, file in weight_map.items() if name not in found or found[name].file != file):
        raise UserError(f"{folder}: {index} says that {lost[0]} is in {weight_map[lost[0]]}, which does not have it")
    entries: dict[str, Entry] = {}
    for stored, entry in found.items():
        if IGNORED.fullmatch(stored):
            continue
        if "lora_" in stored:
            raise UserError(f"{folder} holds a LoRA adapter ({stored}) that is not merged; {MERGE}")
        if (other := entries.setdefault(our_name(stored), entry)) is not entry:
            raise UserError(f"{folder} has both {other.stored} and {stored}, which are one tensor; remove one of them")
    return entries


def files_of(folder: Path) -> tuple[str, dict[str, str], list[str]]:
    """Name of the index (or empty), tensor -> file by that index (or empty), names of the files with weights."""
    there = {name.lower(): name for name in sorted(os.listdir(folder), reverse=True)}  # written on systems without case

    def actual(name: str) -> str:
        return name if (folder / name).is_file() else there.get(name.lower(), name)

    for single, index in WEIGHTS:
        if (folder / actual(single)).is_file():
            return "", {}, [actual(single)]
        if (folder / actual(index)).is_file():
            weight_map = {tensor: actual(file) for tensor, file in _weight_map(folder / actual(index)).items()}
            return actual(index), weight_map, sorted(set(weight_map.values()))
    loose = [name for lower, name in there.items() if lower.endswith(".safetensors")]
    if len(loose) == 1 and not re.search(r"-of-\d+", loose[0]):
        return "", {}, loose
    what = ", the index of the others there" if loose else ""
    raise UserError(f"{folder} has neither {SINGLE} nor {INDEX}{what}")


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not all(isinstance(name, str) for name in weight_map.values()):
            raise TypeError("weight_map does not give names of files")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        kind = "safetensors" if ".safetensors" in index.name.lower() else "torch.save"
        raise UserError(f"{index} is no index of {kind} files: {error!r}") from None
    return weight_map


MERGE = (
    "merge it first: AutoPeftModelForCausalLM.from_pretrained(FOLDER).merge_and_unload().save_pretrained(NEW_FOLDER), "
    "and name that folder"
)
# What other files with weights are, by the end of their names.
FOREIGN = {
    ".gguf": "weights of llama.cpp",
    ".pth": "weights of Meta's or a training's own format",
    ".pt": "weights of a training's own format",
    ".ckpt": "weights of a training's own format",
    ".msgpack": "weights of Flax",
    ".h5": "weights of TensorFlow",
    ".onnx": "a graph of ONNX",
}


def check_foreign(where: Any, names: list[str]) -> None:
    """UserError for a folder with these files that holds an adapter, or weights of another format, but no model."""
    if "adapter_config.json" in names and not is_hf([name for name in names if not name.startswith("adapter_")]):
        raise UserError(f"{where} is a LoRA adapter (it has adapter_config.json), not a whole model; {MERGE}")
    for name in names:
        what = next((what for ending, what in FOREIGN.items() if name.lower().endswith(ending)), "")
        if what and not is_hf(names):
            raise UserError(
                f"{where}: {name} holds {what}, which are not read; expected a Hugging Face folder with safetensors: "
                "download one, or convert it with transformers (save_pretrained)"
            )


def folder_meant(given: str) -> str:
    """The folder of the model that a path or URL means: of a file with weights its folder, of a cache its snapshot.

    UserError where that is not plain. Anything else is returned as it is.
    """
    path = Path(given).expanduser()
    if "://" in given or not path.exists():
        return given
    if path.is_file():
        return str(_folder_of_file(path))
    if (path / "snapshots").is_dir() and (path.name.startswith("models--") or (path / "refs").is_dir()):
        return str(_snapshot(path))
    return given


def _folder_of_file(path: Path) -> Path:
    check_foreign(path.parent, [path.name])
    inside = path.parent
    if path.name == "config.json":
        return inside
    if not is_hf([path.name]) or path.name.startswith("adapter_"):
        raise UserError(f"{path} is a file; expected the folder of a model (perhaps {inside})")
    index, _, files = files_of(inside)
    if path.name not in (index, *files):
        raise UserError(
            f"{path} is not among the weights of {inside}, which are {', '.join(files[:3])}; name the folder "
            f"for those, or put {path.name} with a config.json into a folder of its own"
        )
    return inside


def _snapshot(cache: Path) -> Path:
    """Of a folder of the hub's cache (models--OWNER--NAME), the snapshot that `main` is, or the only one."""
    main = cache / "refs" / "main"
    if main.is_file() and (snapshot := cache / "snapshots" / main.read_text(encoding="utf-8").strip()).is_dir():
        return snapshot
    snapshots = sorted(path for path in (cache / "snapshots").iterdir() if path.is_dir())
    if len(snapshots) != 1:
        there = ", ".join(map(str, snapshots)) or "none"
        raise UserError(f"{cache} is a cache of the hub with several snapshots or none; name one of them: {there}")
    return snapshots[0]


def _entries(file: Path) -> Iterator[Entry]:
    """The tensors of one file. UserError where it is damaged, or has a dtype that is not read."""
    if not file.name.lower().endswith(".bin"):
        yield from _header(file)
        return
    for name, tensor in load_tensors(file).items():
        if tensor.dtype not in DTYPES.values() and not IGNORED.fullmatch(name):
            raise _not_read(file, name, str(tensor.dtype).removeprefix("torch."))
        yield Entry(file.name, name, tensor.dtype, tuple(tensor.shape))


def _not_read(file: Path, name: str, dtype: str) -> UserError:
    return UserError(
        f"{file}: {name} is stored as {dtype}, which is not read (quantized weights are not); "
        f"expected one of {', '.join(DTYPES)}"
    )


def _header(file: Path) -> Iterator[Entry]:
    """The entries of a file of safetensors. Its format: https://huggingface.co/docs/safetensors/index#format."""
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
        if entry["dtype"] not in DTYPES and not IGNORED.fullmatch(name):
            raise _not_read(file, name, entry["dtype"])
        yield Entry(file.name, name, DTYPES.get(entry["dtype"], torch.float64), tuple(entry["shape"]))


def check_fits(
    where: Any,
    shapes: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
    excluded: Callable[[str], bool] = lambda name: False,
    hint: str = "its config.json is of another model",
    shown: Callable[[str], str] = their_name,
) -> None:
    """UserError unless `where` has just the tensors of the model, each in its shape.

    shapes, expected: by our names, there and in the plain model. excluded: whether a weight is left out on purpose.
    A head that a tied model has no use for may be there. hint: what to do. shown: our name -> that in messages.
    """
    for name, shape in expected.items():
        if excluded(name):
            continue
        if name not in shapes:
            raise UserError(f"{where} does not fit this model: it has no {shown(name)}; {hint}")
        if shapes[name] != shape:
            raise UserError(
                f"{where} does not fit this model: {shown(name)} is {list(shapes[name])} there and {list(shape)} "
                f"in the model; {hint}"
            )
    spare = {HEAD} if HEAD not in expected else set()
    if more := sorted(set(shapes) - set(expected) - spare):
        raise UserError(f"{where} does not fit this model, which has no {shown(more[0])}; {hint}")


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


class _Saved:
    """A file of torch.save, with the methods of safetensors' that are used here."""

    def __init__(self, file: Path) -> None:
        self._tensors = load_tensors(file)

    def get_tensor(self, name: str) -> Tensor:
        return self._tensors[name]

    get_slice = get_tensor


def _open(folder: Path, file: str) -> Any:
    from safetensors import safe_open

    return _Saved(folder / file) if file.lower().endswith(".bin") else safe_open(folder / file, framework="pt")


def _slice(folder: Path, entries: Mapping[str, Entry], name: str) -> Any:
    return _open(folder, entries[name].file).get_slice(entries[name].stored)


def tensors_of(folder: Path, entries: Mapping[str, Entry]) -> dict[str, Tensor]:
    """All tensors by our names, in their own dtype and memory-mapped: nothing is read before it is used."""
    opened = {file: _open(folder, file) for file in {entry.file for entry in entries.values()}}
    return {name: opened[entry.file].get_tensor(entry.stored) for name, entry in entries.items()}


def grown_shapes(
    shapes: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Of the embedding and the head, by our names, the shapes that the model has with more rows than those there."""
    return {
        name: expected[name]
        for name in (EMBEDDING, HEAD)
        if name in shapes and name in expected
        if shapes[name][0] < expected[name][0] and shapes[name][1:] == expected[name][1:]
    }


class Reader(dcp.StorageReader):
    """Gives torch.distributed.checkpoint the slices it asks for of a folder, which `entries` describe.

    grown: larger shapes to load some tensors into; the rows that are not there are left as they are.
    """

    def __init__(
        self, folder: Path, entries: Mapping[str, Entry], grown: Mapping[str, tuple[int, ...]] | None = None
    ) -> None:
        self._folder, self._entries, self._grown = folder, entries, grown or {}

    def reset(self, checkpoint_id: Any = None) -> None:
        """There is nothing to forget."""

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return Metadata({n: _describe(entry, self._grown.get(n, entry.shape)) for n, entry in self._entries.items()})

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
            target.copy_(opened[file].get_slice(self._entries[name].stored)[of_ours])
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done


def _describe(entry: Entry, size: tuple[int, ...]) -> TensorStorageMetadata:
    there = ChunkStorageMetadata(torch.Size([0] * len(size)), torch.Size(entry.shape))
    return TensorStorageMetadata(TensorProperties(dtype=entry.dtype), torch.Size(size), [there])
