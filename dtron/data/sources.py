"""Documents of a source, one at a time, from any position in it: local files, or a dataset of the hub.

A source is a list of files and a file a run of documents. Local files are read here and not through
`datasets`: that finds its position again by parsing a file from its start, gives a `DataLoader`'s
second worker nothing of a source of one file, and fails on rows whose other columns differ. A dataset
of the hub is streamed by `datasets`, and finds its position as that library does.
"""

import contextlib
import hashlib
import importlib
import json
import multiprocessing
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from dtron.data.find import KINDS, find_files, one_kind
from dtron.data.formats import COMPRESSED, ROWS_OF, DocumentReader, Rows, State, missing_column, optional_package
from dtron.errors import UserError

__all__ = ["HubSource", "LocalSource", "Source", "SourceSpec", "SplitSource", "may_be_on_the_hub", "open_source"]

HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
END = 1 << 12  # bytes at either end of a file that its fingerprint holds


@dataclass(frozen=True)
class SourceSpec:
    """What to read: `path`, or `dataset` where there is no path. subset and split are for datasets of the hub."""

    dataset: str
    path: str | None = None
    subset: str | None = None
    split: str = "train"
    text_column: str = "text"  # of JSON, CSV, parquet, arrow and the hub

    @property
    def location(self) -> str:
        return self.path or self.dataset


class Source(Protocol):
    """Documents in files 0 .. n_files - 1. A source can be pickled: worker processes read it too."""

    @property
    def name(self) -> str:
        """For messages."""

    @property
    def n_files(self) -> int:
        """At least 1."""

    @property
    def fingerprint(self) -> str:
        """sha256, hex: changes with what is read (files, sizes, their ends, column), not with where it lies."""

    def read(self, file: int, state: State | None = None) -> DocumentReader:
        """The documents of one file, from its start or from where a reader's state says."""


def open_source(spec: SourceSpec, cache_folder: Path | str) -> Source:
    """A local file, a local folder, or else a dataset of the hub, kept nowhere but in `cache_folder`.

    A folder is read recursively, in the order of the relative paths, and holds one kind of file: JSON (lines, or an
    array of objects), CSV, parquet, arrow, or text, where one file is one document; see `find_files` and `one_kind`.
    Any of them may be .gz or .zst.
    Raises UserError where there is nothing to read, and for what cannot be read.
    """
    location = Path(spec.location).expanduser()
    if location.exists():
        if spec.subset is not None or spec.split != "train":
            raise UserError(
                f"{spec.location!r} is local and has neither subsets nor splits (subset {spec.subset!r}, split "
                f"{spec.split!r}): name the folder or file of the split itself, and leave both out"
            )
        return _open_local(spec, location)
    if not may_be_on_the_hub(spec.location):
        raise UserError(f"no such file or folder: {spec.location!r}: give an existing one, or the name of a dataset")
    return HubSource.open(spec, Path(cache_folder))


def may_be_on_the_hub(name: str) -> bool:
    """Whether a name that is nothing local can be one of the hub's: not where it looks like a path mistyped."""
    mistyped = name.endswith((*KINDS, *COMPRESSED, ".txt")) or ("/" in name and Path(name).parent.exists())
    return HUB_NAME.fullmatch(name) is not None and not mistyped


# --- local files


def _open_local(spec: SourceSpec, location: Path) -> "LocalSource":
    paths = find_files(location) if location.is_dir() else [location]
    if not paths:
        raise UserError(
            f"{spec.location!r} holds no files: give a folder of .jsonl, .txt, .csv, .parquet or .arrow files"
        )
    kind = one_kind(paths, spec.text_column, spec.location)
    base = location if location.is_dir() else location.parent
    names = [path.relative_to(base).as_posix() for path in paths]
    column = "" if kind == "text" else spec.text_column
    digest = hashlib.sha256(f"{kind}\n{column}\n".encode())
    for name, path in zip(names, paths, strict=True):
        digest.update(f"{path.stat().st_size} {name}\n".encode())
        digest.update(_ends(path))
    return LocalSource(spec.location, kind, column, str(base), names, digest.hexdigest())


def _ends(path: Path) -> bytes:
    """The first and last bytes of a file: with its size, all that can be compared at the start of a run."""
    with path.open("rb") as file:
        first = file.read(END)
        file.seek(max(0, path.stat().st_size - END))
        return first + file.read(END)


@dataclass(frozen=True)
class LocalSource:
    """Local files of one kind; `names` are relative to the folder `base`."""

    name: str
    kind: str  # json, csv, parquet, arrow or text
    column: str
    base: str
    names: list[str]
    fingerprint: str

    @property
    def n_files(self) -> int:
        return len(self.names)

    def read(self, file: int, state: State | None = None) -> DocumentReader:
        """See `Source.read`."""
        path = Path(self.base, self.names[file])
        return DocumentReader(str(path), ROWS_OF[self.kind](path, self.column, state or {}), state)


# --- one side of a source


@dataclass(frozen=True)
class SplitSource:
    """The documents of a source that are held out, or all others: by a hash of the text, so equal ones stay together.

    share: of the documents that are held out, 0 to 1, give or take what chance brings.
    """

    source: Source
    share: float
    held_out: bool

    @property
    def name(self) -> str:
        return f"{self.source.name} ({100 * (self.share if self.held_out else 1 - self.share):g}% of its documents)"

    @property
    def n_files(self) -> int:
        return self.source.n_files

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.source.fingerprint} {self.share} {self.held_out}".encode()).hexdigest()

    def read(self, file: int, state: State | None = None) -> DocumentReader:
        """See `Source.read`."""
        return _SplitReader(self.source.read(file, state), self.share, self.held_out)


class _SplitReader(DocumentReader):
    def __init__(self, reader: DocumentReader, share: float, held_out: bool) -> None:
        self.name, self._reader, self._below, self._held_out = reader.name, reader, share * 2.0**64, held_out

    def __next__(self) -> str:
        while True:
            text = next(self._reader)
            number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
            if (number < self._below) == self._held_out:
                return text

    def state(self) -> State:
        return self._reader.state()


# --- datasets of the hub


@contextlib.contextmanager
def _lockable(cache_folder: Path) -> Iterator[str]:
    """The folder where `datasets` makes a lock, of which streaming needs nothing else: one that can be written."""
    if cache_folder.is_dir() and not os.access(cache_folder, os.W_OK):
        with tempfile.TemporaryDirectory() as folder:
            yield folder
    else:
        yield str(cache_folder)


@dataclass(frozen=True)
class HubSource:
    """A dataset as `datasets` streams it; its files are the library's shards."""

    name: str
    column: str
    fingerprint: str
    dataset: Any  # datasets.IterableDataset

    @classmethod
    def open(cls, spec: SourceSpec, cache_folder: Path) -> "HubSource":
        """UserError where the hub, or the dataset there, cannot be reached, or has no such subset, split or column."""
        # Read once, when the libraries are imported; without it they write to the home folder.
        os.environ.setdefault("HF_HOME", str(cache_folder / "huggingface"))
        datasets = optional_package("datasets", f"{spec.location!r} is no local file or folder: a dataset of the hub")
        token = os.environ.get("HF_TOKEN") or False  # False: not even one that lies in the home folder
        try:
            with _lockable(cache_folder) as folder:
                dataset = datasets.load_dataset(
                    spec.location, spec.subset, split=spec.split, streaming=True, cache_dir=folder, token=token
                )
                columns = dataset.column_names
        except Exception as error:  # whatever the hub's libraries raise
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"{spec.location!r} is no local file or folder, and no dataset of the hub could be read by that name, "
                f"subset {spec.subset!r} and split {spec.split!r} ({type(error).__name__}: {reason}): fix the name, "
                "give a local path, or set HF_TOKEN in the environment for a dataset that is not public"
            ) from error
        if columns is not None:  # else unknown until it is read
            if spec.text_column not in columns:
                raise missing_column(spec.location, spec.text_column, columns)
            dataset = dataset.select_columns([spec.text_column])
        digest = hashlib.sha256(json.dumps([asdict(spec), dataset.num_shards]).encode()).hexdigest()
        return cls(spec.location, spec.text_column, digest, dataset)

    @property
    def n_files(self) -> int:
        return int(self.dataset.num_shards)

    def read(self, file: int, state: State | None = None) -> DocumentReader:
        """See `Source.read`."""
        if multiprocessing.parent_process() is not None:  # forked, it has its parent's lock without that one's thread
            importlib.import_module("fsspec.asyn").reset_lock()
        return DocumentReader(f"{self.name} (shard {file})", self._rows(file, state or {}), state)

    def _rows(self, file: int, state: State) -> Rows:
        shard = self.dataset.shard(num_shards=self.n_files, index=file)
        if state:
            shard.load_state_dict(state)
        # Not `for row in shard`: in a DataLoader's worker that would deal the shards out among the workers.
        for batch in shard.iter(batch_size=1):
            if self.column not in batch:
                raise missing_column(self.name, self.column, batch)
            yield "", batch[self.column][0], shard.state_dict()
