"""The files that documents are read from: text, JSON, parquet and arrow, each from any position in it.

The state of a reader is the byte in JSON lines, the object in a JSON array, and in parquet and arrow the row group or
record batch and the row.
"""

import gzip
import importlib
import io
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from dtron.errors import UserError

__all__ = ["COMPRESSED", "ROWS_OF", "DocumentReader", "State", "missing_column", "optional_package"]

COMPRESSED = (".gz", ".zst")
ROWS = 1000  # of a table, turned into Python strings at a time

State = dict[str, Any]
Rows = Iterator[tuple[Any, State]]  # (text, the state from which a reader resumes with the next one)


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
            text.encode()  # JSON can spell half a surrogate pair, which is not text
        except (StopIteration, UserError):
            raise
        except UnicodeError as error:
            hint = "convert the file (iconv -f latin1 -t utf-8), or leave it out"
            raise UserError(f"{self.name}{self._position()} is not valid UTF-8 ({error}): {hint}") from error
        except Exception as error:  # of pyarrow, gzip, zlib, json, datasets and the system
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            hint = "repair it or download it again, or leave it out"
            raise UserError(f"{self.name}{self._position()} cannot be read ({reason}): {hint}") from error
        self._state = state
        return text

    def _position(self) -> str:
        return f", after {self._state}," if self._state else ""

    def state(self) -> State:
        """JSON-able; `Source.read(file, state)` resumes with the next document."""
        return self._state


def optional_package(module: str, what: str) -> Any:
    """`datasets`, or pyarrow, which comes with it. UserError where it cannot be imported."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        needs = f"{what} needs the package {module.split('.')[0]}"
        raise UserError(f"{needs} ({error}): pip install datasets") from error


def _open(path: Path, start: int = 0) -> BinaryIO:
    """A file's content, decompressed, from byte `start` on."""
    if path.suffix == ".zst":
        # Unlike zstandard's own reader, arrow's reads several frames and reports that the last one is cut short.
        pa = optional_package("pyarrow", f"{path} (.zst)")
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


def _parse(line: bytes, column: str, position: str) -> Any:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{position} is not JSON ({error}): expected one object per line; fix or remove the line"
        ) from error
    return _field(row, column, position)


def _field(row: Any, column: str, position: str) -> Any:
    if not isinstance(row, dict):
        raise UserError(f'{position} holds {json.dumps(row)[:60]}: expected an object such as {{"{column}": "..."}}')
    if column not in row:
        raise missing_column(position, column, row)
    return row[column]


def missing_column(position: str, column: str, columns: Iterable[str]) -> UserError:
    there = ", ".join(map(repr, columns)) or "none"
    return UserError(
        f"{position} has no column {column!r}; there are: {there}; name the one with the text (text_column)"
    )


def _parquet_rows(path: Path, column: str, state: State) -> Rows:
    parquet = optional_package("pyarrow.parquet", f"{path} (parquet)")
    with parquet.ParquetFile(_table_file(path)) as file:
        if column not in file.schema_arrow.names:
            raise missing_column(str(path), column, file.schema_arrow.names)
        groups = range(state.get("part", 0), file.num_row_groups)
        parts = ((g, file.iter_batches(ROWS, row_groups=[g], columns=[column])) for g in groups)
        yield from _table_rows(parts, column, state)


def _arrow_rows(path: Path, column: str, state: State) -> Rows:
    """Arrow's file format or, as `datasets` writes it, its stream format, where batches are skipped one by one."""
    ipc = optional_package("pyarrow.ipc", f"{path} (arrow)")
    source = _table_file(path)
    first = state.get("part", 0)
    try:
        file = ipc.open_file(source)
        batches: Iterable[Any] = (file.get_batch(i) for i in range(first, file.num_record_batches))
    except ValueError:  # pyarrow.ArrowInvalid: not the file format
        file = ipc.open_stream(source)
        batches = itertools.islice(file, first, None)
    if column not in file.schema.names:
        raise missing_column(str(path), column, file.schema.names)
    yield from _table_rows(((i, [batch]) for i, batch in enumerate(batches, first)), column, state)


def _table_file(path: Path) -> Any:
    pa = optional_package("pyarrow", str(path))
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


# Of each kind of file: (path, column of the text, state) -> rows.
ROWS_OF = {"json": _json_rows, "parquet": _parquet_rows, "arrow": _arrow_rows, "text": _text_rows}
