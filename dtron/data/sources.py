"""Documents of a source, one at a time, from any place in it: local files, or a dataset of the hub.

A source is a list of files and a file a run of documents. Local files are read here and not through
`datasets`: that finds its place again by parsing a file from its start, gives a `DataLoader`'s second
worker nothing of a source of one file, and fails on rows whose other columns differ. So the place in
JSON lines is a byte, in parquet and arrow a row group or record batch and a row. A dataset of the hub
is streamed by `datasets`, and finds its place as that library does.
"""

import gzip
import hashlib
import importlib
import io
import itertools
import json
import multiprocessing
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from dtron.errors import UserError

__all__ = ["DocumentReader", "HubSource", "LocalSource", "Source", "SourceSpec", "may_be_on_the_hub", "open_source"]

KINDS = {".json": "json", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet", ".arrow": "arrow"}  # else text
COMPRESSED = (".gz", ".zst")
UNREADABLE = {".csv", ".tsv", ".zip", ".tar", ".tgz", ".bz2", ".xz", ".7z", ".rar", ".pdf", ".docx", ".npy", ".pkl"}
# Files that lie beside the data where `datasets`, Spark or the hub wrote the folder.
NO_DATA = re.compile(
    r"(readme|license)(\.\w+)?|dataset_infos?\.json|state\.json|_SUCCESS|_(common_)?metadata", re.IGNORECASE
)
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
END = 1 << 12  # bytes at either end of a file that its fingerprint holds
ROWS = 1000  # of a table, turned into Python strings at a time

State = dict[str, Any]
Rows = Iterator[tuple[Any, State]]  # (text, the state from which a reader goes on with the next one)


@dataclass(frozen=True)
class SourceSpec:
    """What to read: `path`, or `dataset` where there is no path. subset and split are for datasets of the hub."""

    dataset: str
    path: str | None = None
    subset: str | None = None
    split: str = "train"
    text_column: str = "text"  # of JSON, parquet, arrow and the hub

    @property
    def location(self) -> str:
        return self.path or self.dataset


class DocumentReader:
    """Iterator over the documents (str) of one file; every error in reading is a UserError that names the file.

    rows: (text, state after it) of every document still to come. state: that before the first of them.
    """

    def __init__(self, name: str, rows: Rows, state: State | None = None) -> None:
        self.name, self._rows, self._state = name, rows, state or {}

    def __iter__(self) -> "DocumentReader":
        return self

    def __next__(self) -> str:
        try:
            text, state = next(self._rows)
            if not isinstance(text, str):
                raise TypeError(f"a document is {type(text).__name__}, not a string")
            text.encode()  # JSON can spell half a surrogate pair, which is no text
        except (StopIteration, UserError):
            raise
        except UnicodeError as error:
            hint = "convert the file (iconv -f latin1 -t utf-8), or leave it out"
            raise UserError(f"{self.name}{self._place()} is not valid UTF-8 ({error}): {hint}") from error
        except Exception as error:  # of pyarrow, gzip, zlib, json, datasets and the system
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            hint = "mend it or fetch it again, or leave it out"
            raise UserError(f"{self.name}{self._place()} cannot be read ({reason}): {hint}") from error
        self._state = state
        return text

    def _place(self) -> str:
        return f", after {self._state}," if self._state else ""

    def state(self) -> State:
        """JSON-able; `Source.read(file, state)` goes on with the next document."""
        return self._state


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

    A folder is read recursively, in the order of the relative paths, and holds one kind of file: JSON
    (lines, or an array of objects), parquet, arrow, or text, where one file is one document; all but
    hidden files, README, LICENSE and the state files of `datasets` count. Any of them may be .gz or .zst.
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
    found = [location]
    if location.is_dir():
        found = [path for path in location.rglob("*") if _is_data(path.relative_to(location)) and path.is_file()]
    if not found:
        raise UserError(f"{spec.location!r} holds no files: give a folder of .jsonl, .txt, .parquet or .arrow files")
    by_kind: dict[str, list[Path]] = {}
    for path in sorted(found):
        by_kind.setdefault(_kind(path), []).append(path)
    if len(by_kind) > 1:
        counts = ", ".join(f"{len(paths)} {kind} ({paths[0].name})" for kind, paths in by_kind.items())
        raise UserError(f"{spec.location!r} holds files of several kinds: {counts}: name the folder or file of one")
    [(kind, paths)] = by_kind.items()
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


def _is_data(relative: Path) -> bool:
    return not NO_DATA.fullmatch(relative.name) and not any(part.startswith(".") for part in relative.parts)


def _kind(path: Path) -> str:
    suffixes = [suffix for suffix in path.suffixes if suffix not in COMPRESSED]
    last = suffixes[-1].lower() if suffixes else ""
    if last in UNREADABLE:
        raise UserError(f"{path} is a {last} file, which is not read: convert it to .jsonl, .parquet or .txt")
    return KINDS.get(last, "text")


@dataclass(frozen=True)
class LocalSource:
    """Local files of one kind; `names` are relative to the folder `base`."""

    name: str
    kind: str  # json, parquet, arrow or text
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
        rows = {"json": _json_rows, "parquet": _parquet_rows, "arrow": _arrow_rows, "text": _text_rows}[self.kind]
        return DocumentReader(str(path), rows(path, self.column, state or {}), state)


def _optional(module: str, what: str) -> Any:
    """`datasets`, or pyarrow, which comes with it. UserError where it cannot be imported."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        needs = f"{what} needs the package {module.split('.')[0]}"
        raise UserError(f"{needs} ({error}): pip install datasets") from error


def _open(path: Path, start: int = 0) -> BinaryIO:
    """A file's content, decompressed, from byte `start` on."""
    if path.suffix == ".zst":
        # Unlike zstandard's own reader, arrow's reads several frames and tells where the last one is cut short.
        pa = _optional("pyarrow", f"{path} (.zst)")
        stream = io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"), 1 << 20)
        while start:  # it cannot seek; its end ends the loop too
            start -= len(stream.read(min(start, 1 << 20))) or start
        return stream
    file = cast(BinaryIO, gzip.GzipFile(path) if path.suffix == ".gz" else path.open("rb"))
    file.seek(start)
    return file


def _text_rows(path: Path, column: str, state: State) -> Rows:
    if not state:
        with _open(path) as file:
            yield file.read().decode().removeprefix("\ufeff"), {"done": True}


def _json_rows(path: Path, column: str, state: State) -> Rows:
    """JSON lines (state: bytes and lines read, decompressed), or one array of objects (state: objects read)."""
    with _open(path) as file:
        is_array = file.read(1 << 12).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    if is_array:
        with _open(path) as file:
            rows = json.loads(file.read().decode("utf-8-sig"))
        for i in range(state.get("object", 0), len(rows)):
            yield _field(rows[i], column, f"{path}, object {i + 1}"), {"object": i + 1}
        return
    byte, number = state.get("byte", 0), state.get("line", 0)
    with _open(path, byte) as file:
        for line in file:
            byte, number = byte + len(line), number + 1
            if not line.isspace():
                yield _parse(line, column, f"{path}, line {number}"), {"byte": byte, "line": number}


def _parse(line: bytes, column: str, place: str) -> Any:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(f"{place} is no JSON ({error}): expected one object a line; mend or remove the line") from error
    return _field(row, column, place)


def _field(row: Any, column: str, place: str) -> Any:
    if not isinstance(row, dict):
        raise UserError(f'{place} holds {json.dumps(row)[:60]}: expected an object such as {{"{column}": "..."}}')
    if column not in row:
        raise _no_column(place, column, row)
    return row[column]


def _no_column(place: str, column: str, columns: Iterable[str]) -> UserError:
    there = ", ".join(map(repr, columns)) or "none"
    return UserError(f"{place} has no column {column!r}; there are: {there}; name the one with the text (text_column)")


def _parquet_rows(path: Path, column: str, state: State) -> Rows:
    parquet = _optional("pyarrow.parquet", f"{path} (parquet)")
    with parquet.ParquetFile(_table_file(path)) as file:
        if column not in file.schema_arrow.names:
            raise _no_column(str(path), column, file.schema_arrow.names)
        groups = range(state.get("part", 0), file.num_row_groups)
        parts = ((g, file.iter_batches(ROWS, row_groups=[g], columns=[column])) for g in groups)
        yield from _table_rows(parts, column, state)


def _arrow_rows(path: Path, column: str, state: State) -> Rows:
    """Arrow's file format or, as `datasets` writes it, its stream format: there record batches are passed over."""
    ipc = _optional("pyarrow.ipc", f"{path} (arrow)")
    source = _table_file(path)
    first = state.get("part", 0)
    try:
        file = ipc.open_file(source)
        batches: Iterable[Any] = (file.get_batch(i) for i in range(first, file.num_record_batches))
    except ValueError:  # pyarrow.ArrowInvalid: not the file format
        file = ipc.open_stream(source)
        batches = itertools.islice(file, first, None)
    if column not in file.schema.names:
        raise _no_column(str(path), column, file.schema.names)
    yield from _table_rows(((i, [batch]) for i, batch in enumerate(batches, first)), column, state)


def _table_file(path: Path) -> Any:
    pa = _optional("pyarrow", str(path))
    if path.suffix not in COMPRESSED:
        return pa.memory_map(str(path))
    with _open(path) as file:
        return pa.BufferReader(file.read())


def _table_rows(parts: Iterable[tuple[int, Iterable[Any]]], column: str, state: State) -> Rows:
    """parts: (number, its record batches) from the one the state names on. State: part, rows read of it."""
    skip = state.get("row", 0)
    for part, batches in parts:
        row = 0
        for batch in batches:
            texts = batch.column(column)
            texts.validate(full=True)  # pyarrow trusts a file's offsets otherwise
            for start in range(min(max(skip - row, 0), len(texts)), len(texts), ROWS):
                for i, text in enumerate(texts.slice(start, ROWS).to_pylist(), row + start + 1):
                    yield text, {"part": part, "row": i}
            row += len(texts)
        skip = 0


# --- datasets of the hub


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
        datasets = _optional("datasets", f"{spec.location!r} is no local file or folder: a dataset of the hub")
        token = os.environ.get("HF_TOKEN") or False  # False: not even one that lies in the home folder
        try:
            dataset = datasets.load_dataset(
                spec.location, spec.subset, split=spec.split, streaming=True, cache_dir=str(cache_folder), token=token
            )
            columns = dataset.column_names
        except Exception as error:  # whatever the hub's libraries raise
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"{spec.location!r} is no local file or folder, and no dataset of the hub could be read by that name, "
                f"subset {spec.subset!r} and split {spec.split!r} ({type(error).__name__}: {reason}): mend the name, "
                "give a local path, or set HF_TOKEN in the environment for a dataset that is not public"
            ) from error
        if columns is not None:  # else unknown until it is read
            if spec.text_column not in columns:
                raise _no_column(spec.location, spec.text_column, columns)
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
                raise _no_column(self.name, self.column, batch)
            yield batch[self.column][0], shard.state_dict()
