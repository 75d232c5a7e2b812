"""Weights of a Hugging Face folder: in one file or in several with an index, of safetensors or else of torch.save.

Names and the order of rows are ours already, but for what `hf_form` says. A rank reads the slices of its own shards,
through a memory map, and converts them to the dtype of its parameters one slice at a time.
"""

import json
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
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

from dtron.checkpoint.hf_folder import MERGE, files_of
from dtron.checkpoint.hf_form import HEAD, ExpertColumns, Form, HeadOrder, form_of_folder, stack_of, their_name
from dtron.checkpoint.reader import load_tensors
from dtron.errors import UserError

__all__ = [
    "Entry",
    "Reader",
    "check_fits",
    "check_tied",
    "entries_of",
    "grown_shapes",
    "tensors_of",
]

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
IGNORED = re.compile(r".*\brotary_emb\.\w+")  # computed, not learnt
EMBEDDING = "model.embed_tokens.weight"
HEADLESS = (
    "it may be a base model that was saved without its head: save it with the head, set tie_word_embeddings where the "
    'two are one matrix, or let a training make a new one: checkpoint.exclude_from_loading = ["lm_head.*"]'
)
ROWS = 1 << 12  # of two matrices compared at a time


@dataclass(frozen=True)
class Entry:
    """A tensor of ours in a folder: its file's name, its own name in it, dtype and shape.

    parts: of a stack, which is no tensor there, its own; file and stored are then the first one's. order: of its rows,
    where it is not ours. first: the row of the stored tensor at which ours begins, where it is a part of one.
    """

    file: str
    stored: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: tuple["Entry", ...] = ()
    order: HeadOrder | ExpertColumns | None = None
    first: int = 0

    def read(self, stored: Any, part: tuple[slice, ...]) -> Tensor:
        """A part of ours, from the stored tensor or a slice of safetensors."""
        if self.first:
            part = (slice(part[0].start + self.first, part[0].stop + self.first), *part[1:])
        there: Tensor = self.order.read(stored, part) if self.order else stored[part]
        return there


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
    form = form_of_folder(folder)
    entries: dict[str, Entry] = {}
    for stored, entry in found.items():
        if IGNORED.fullmatch(stored):
            continue
        if "lora_" in stored:
            raise UserError(f"{folder} holds a LoRA adapter ({stored}) that is not merged; {MERGE}")
        if (constant := form.constant(form.our_name(stored))) is not None:
            _check_constant(folder, entry, constant)
            continue
        for name, part in _split(folder, form, entry):
            part = replace(part, order=form.order(name, len(part.shape)))
            if (other := entries.setdefault(name, part)) is not part:
                raise UserError(
                    f"{folder} has both {other.stored} and {stored}, which are one tensor; remove one of them"
                )
    return _stacked(folder, entries)


def _check_constant(folder: Path, entry: Entry, value: float) -> None:
    """UserError unless the stored number, which our model has in its code, is this."""
    stored: Tensor = _open(folder, entry.file).get_tensor(entry.stored)
    expected = torch.tensor(value, dtype=entry.dtype).item()
    if stored.numel() != 1 or stored.item() != expected:
        raise UserError(f"{folder}: {entry.stored} = {stored.tolist()} cannot be represented; expected {expected:g}")


def _split(folder: Path, form: Form, entry: Entry) -> Iterator[tuple[str, Entry]]:
    """Our tensors in a stored one, by name: itself, or those of a fused projection. UserError if it has other rows."""
    name = form.our_name(entry.stored)
    for part in (experts := form.split_experts(name)):
        columns = form.order(part, len(entry.shape))
        assert isinstance(columns, ExpertColumns)
        yield part, replace(entry, shape=columns.shape(entry.shape))
    parts = form.split(name)
    if experts:
        return
    if not parts:
        yield name, entry
        return
    if entry.shape[0] != (expected := sum(rows for _, rows in parts)):
        what = " + ".join(f"{rows} of {part.split('.')[-2]}" for part, rows in parts)
        raise UserError(
            f"{folder}: {entry.stored} has {entry.shape[0]} rows; expected {expected} by its config.json ({what})"
        )
    first = 0
    for part, rows in parts:
        yield part, replace(entry, shape=(rows, *entry.shape[1:]), first=first)
        first += rows


def _stacked(folder: Path, entries: dict[str, Entry]) -> dict[str, Entry]:
    """The same with one entry for all experts of a layer's matrix. UserError where some are missing, or not alike."""
    stacks: dict[str, dict[int, Entry]] = {}
    for name, entry in entries.items():
        if part := stack_of(name):
            stacks.setdefault(part[0], {})[part[1]] = entry
    plain = {name: entry for name, entry in entries.items() if not stack_of(name)}
    for name, parts in stacks.items():
        first = parts[min(parts)]
        if missing := [i for i in range(max(parts) + 1) if i not in parts]:
            raise UserError(f"{folder} lacks expert {missing[0]} of {name}, of {max(parts) + 1}; download it again")
        if other := next((e for e in parts.values() if (e.shape, e.dtype) != (first.shape, first.dtype)), None):
            raise UserError(f"{folder}: {other.stored} has another shape or dtype than {first.stored}")
        alike = tuple(parts[i] for i in range(len(parts)))
        plain[name] = replace(first, shape=(len(parts), *first.shape), parts=alike)
    return plain


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
            hint = HEADLESS if name == HEAD else hint
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
    opened = {part.file: _open(folder, part.file) for entry in entries.values() for part in (entry, *entry.parts)}

    def tensor(entry: Entry) -> Tensor:
        if entry.parts:  # read at once
            return torch.stack([tensor(part) for part in entry.parts])
        whole: Tensor = opened[entry.file].get_tensor(entry.stored)
        return entry.read(whole, tuple(slice(0, n) for n in entry.shape))

    return {name: tensor(entry) for name, entry in entries.items()}


def grown_shapes(
    shapes: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Of the embedding and the head, by our names, the shapes that the model has with more rows than those there."""
    return {
        name: expected[name]
        for name in (EMBEDDING, HEAD, HEAD.replace("weight", "bias"))
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

        def copy(target: Tensor, entry: Entry, part: tuple[slice, ...]) -> None:
            nonlocal opened
            if entry.parts:
                for row, expert in zip(target, entry.parts[part[0]], strict=True):
                    copy(row, expert, part[1:])
                return
            if entry.file not in opened:
                opened = {entry.file: _open(self._folder, entry.file)}
            target.copy_(entry.read(opened[entry.file].get_slice(entry.stored), part))

        for item in sorted(plan.items, key=lambda item: self._entries[item.storage_index.fqn].file):
            of_ours = tuple(slice(o, o + n) for o, n in zip(item.storage_offsets, item.lengths, strict=True))
            target = planner.resolve_tensor(item).detach()
            copy(target, self._entries[item.storage_index.fqn], of_ours)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done


def _describe(entry: Entry, size: tuple[int, ...]) -> TensorStorageMetadata:
    there = ChunkStorageMetadata(torch.Size([0] * len(size)), torch.Size(entry.shape))
    return TensorStorageMetadata(TensorProperties(dtype=entry.dtype), torch.Size(size), [there])
