"""Reading files of torch.distributed.checkpoint (DCP) so that a stranger's checkpoint runs no code.

DCP's index, `.metadata`, is a pickle, and a pickle names the functions that rebuild what it holds: `pickle.load` calls
any function whatever. So may an entry that is not a tensor, which DCP unpickles too. Here the index is read by an
unpickler that knows the classes of an index and nothing else, and such entries are not read at all: checkpoints of
dtron hold tensors only, and of torchtitan's nothing else is taken. Tensors are read by DCP with
`torch.load(weights_only=True)`.
"""

import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, LoadPlan, LoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType
from torch.futures import Future

from dtron import compat
from dtron.errors import UserError

if TYPE_CHECKING:
    from dtron.checkpoint.storage import StoragePath

__all__ = ["METADATA", "Reader", "code_refused", "load_tensors", "reader_of"]

METADATA = ".metadata"


def code_refused(file: Any, what: str) -> UserError:
    """The error for a pickle that asks for more than data."""
    return UserError(
        f"{file} holds {what}, which no checkpoint needs and which could run commands on this machine; nothing of it "
        "was run: do not use this checkpoint, or get it again from someone you trust"
    )


class _UnknownObjectError(pickle.UnpicklingError):
    """A pickle asks for an object that DCP's index has no use for."""


class _Unpickler(pickle.Unpickler):
    """Knows the classes of DCP's index alone. Only `find_class` gives a pickle something to call."""

    def find_class(self, module: str, name: str) -> Any:
        dtype = getattr(torch, name, None) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        if (module, name) in compat.DCP_INDEX_CLASSES:
            return compat.DCP_INDEX_CLASSES[module, name]
        raise _UnknownObjectError(f"the Python object {module}.{name}")


def _read_index(file: "StoragePath") -> Metadata:
    """DCP's index. UserError where it is damaged, or asks for other objects than an index has; nothing of it runs."""
    try:
        content = file.read()
    except FileNotFoundError:
        raise UserError(f"{file.parent} has no {METADATA}, the index of its tensors; copy it again") from None
    try:
        index = _Unpickler(io.BytesIO(content)).load()
        _check_index(index)
    except _UnknownObjectError as error:
        raise code_refused(file, str(error)) from None
    except Exception as error:  # a pickle that is damaged may raise anything
        raise UserError(f"{file} cannot be read: it is damaged ({type(error).__name__}: {error})") from None
    return index


def _check_index(index: Any) -> None:
    """TypeError unless the parts of an index that are used are what they should be: objects of the classes are not."""
    if not isinstance(index, Metadata):
        raise TypeError(f"it holds a {type(index).__name__}, expected DCP's Metadata")
    for name, entry in index.state_dict_metadata.items():
        if not isinstance(name, str):
            raise TypeError(f"it has the name {name!r}")
        if isinstance(entry, TensorStorageMetadata) and not (
            isinstance(entry.size, torch.Size) and isinstance(entry.properties.dtype, torch.dtype)
        ):
            raise TypeError(f"its entry {name} has no shape and dtype")
    for key, place in index.storage_data.items():
        if not isinstance(key, MetadataIndex) or "/" in place.relative_path:
            raise TypeError(f"it looks for {key} outside of the folder")


class Reader:
    """Of a DCP reader: the index without code, and tensors alone. `grown`: larger shapes to load some tensors into.

    The rows of a grown tensor that no file holds are left as they are.
    """

    folder: "StoragePath"
    grown: Mapping[str, torch.Size]
    _index: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index, read once. Never that of a single rank, which DCP looks for where this one cannot be read."""
        if self._index is None:
            self._index = _read_index(self.folder / METADATA)
        entries: dict[str, Any] = dict(self._index.state_dict_metadata)
        for name, size in self.grown.items():
            entry = entries[name]
            entries[name] = TensorStorageMetadata(entry.properties, size, entry.chunks)
        return Metadata(entries, storage_data=self._index.storage_data, storage_meta=StorageMeta())

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        if others := [item for item in plan.items if item.type == LoadItemType.BYTE_IO]:
            raise code_refused(self.folder, f"{others[0].storage_index.fqn} as a Python object instead of a tensor")
        try:
            return super().read_data(plan, planner)  # type: ignore[misc]
        except pickle.UnpicklingError:  # by torch.load(weights_only=True)
            raise code_refused(self.folder, "Python objects in place of tensors (if it is not damaged)") from None


class _LocalReader(Reader, FileSystemReader):
    pass


class _UrlReader(Reader, compat.FsspecReader):
    pass


def reader_of(folder: "StoragePath") -> Any:
    """What torch.distributed.checkpoint reads from `folder` with."""
    reader: Any = _LocalReader(str(folder.local)) if folder.local else _UrlReader(folder.url)
    reader.folder, reader.grown = folder, {}
    return reader


def load_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors in a file of torch.save, by name, mapped where its format allows it. UserError, and nothing run."""
    with file.open("rb") as opened:
        if opened.read(8) == b"version ":
            raise UserError(f"{file} is a pointer of git-lfs, not the file; download it again")
    try:
        try:
            found = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            found = torch.load(file, map_location="cpu", weights_only=True)  # the format before torch 1.6
    except pickle.UnpicklingError:
        raise code_refused(file, "Python objects besides tensors (if it is not damaged)") from None
    except Exception as error:  # of a damaged file anything
        what = f"{type(error).__name__}: {error}".splitlines()[0][:100]
        raise UserError(f"{file} is truncated or not a file of torch.save ({what}); download it again") from None
    if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        held = ", ".join(map(str, list(found)[:3])) if isinstance(found, dict) else type(found).__name__
        raise UserError(f"{file} is no state dict, just names and tensors, but holds {held}; save model.state_dict()")
    return {str(name): tensor.detach() for name, tensor in found.items()}
