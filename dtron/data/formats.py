"""The files that documents are read from: text, JSON, CSV, parquet and arrow, each from any position in it.

The state of a reader is the byte in JSON lines and CSV, the object in a JSON array, and in parquet and arrow the row
group or record batch and the row.
"""

import csv
import gzip
import importlib
import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from dtron.errors import UserError

__all__ = [
    "BOM",
    "COMPRESSED",
    "HEAD",
    "ROWS_OF",
    "BadDocument",
    "DocumentReader",
    "State",
    "good_documents",
    "missing_column",
    "open_content",
    "optional_package",
]

COMPRESSED = (".gz", ".zst")
ROWS = 1000  # of a table, turned into Python strings at a time
BOM = b"\xef\xbb\xbf"  # of UTF-8
HEAD = 1 << 12  # bytes at the beginning of a file that its kind and its encoding are told by

State = dict[str, Any]
# (where in the file, text or else its _Problem, the state from which a reader resumes with the next one)
Rows = Iterator[tuple[str, Any, State]]


class BadDocument(UserError):
    """A document that cannot be used; the reader that raised this continues with the next one.

    what: file, place in it and problem.
    """

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what

    def __str__(self) -> str:
        return (
            f"{self.what}; or skip and count such documents (dtron prepare --on-error skip, "
            'or on_bad_document = "skip" beside the dataset in a configuration)'
        )


class _Problem(str):
    """What is wrong with a document, in place of its text."""


class DocumentReader:
    """Iterator over the documents (str) of one file; every error in reading is a UserError that names the file.

    A document that cannot be used is a BadDocument, which says where it is, and next() continues after it.
    rows: (where, text, state after it) of every document still to come. state: that before the first of them.
    """

    def __init__(self, name: str, rows: Rows, state: State | None = None) -> None:
        self.name, self._rows, self._state = name, rows, state or {}

    def __iter__(self) -> "DocumentReader":
        return self

    def __next__(self) -> str:
        try:
            where, text, state = next(self._rows)
        except (StopIteration, UserError):
            raise
        except UnicodeError as error:
            raise UserError(f"{self.name}{self._position()} {_not_utf8(error)}") from error
        except Exception as error:  # of pyarrow, gzip, zlib, json, datasets and the system
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            hint = "repair it or download it again, or leave it out"
            raise UserError(f"{self.name}{self._position()} cannot be read ({reason}): {hint}") from error
        if problem := _problem(text):
            where = f", {where}" if where else self._position()
            self._state = state
            raise BadDocument(f"{self.name}{where} {problem}")
        self._state = state
        return text

    def _position(self) -> str:
        return f", after {self._state}," if self._state else ""

    def state(self) -> State:
        """JSON-able; `Source.read(file, state)` resumes with the next document."""
        return self._state


def good_documents(reader: Iterator[str], on_bad: Callable[[BadDocument], object] | None) -> Iterator[str]:
    """The documents of a reader; on_bad is called with each that cannot be used, or without it such a one is raised."""
    while True:
        try:
            text = next(reader)
        except StopIteration:
            return
        except BadDocument as error:
            if on_bad is None:
                raise
            on_bad(error)
        else:
            yield text


def _problem(text: Any) -> str:
    """Why this is no document, and what to do; empty where it is one."""
    if isinstance(text, _Problem):
        return text
    if not isinstance(text, str):
        kind = "null" if text is None else type(text).__name__
        return f"holds {kind}, not a string: give it a text, or leave it out"
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair, which is no character
        half = f"\\u{ord(text[error.start]):04x}"
        return (
            f"has half a surrogate pair, {half}, at character {error.start + 1} of its text, where an emoji or the "
            "like was cut in two: write both halves or neither"
        )
    return ""


def _not_utf8(error: UnicodeError) -> str:
    hint = "if all of it is Latin-1, convert the file (iconv -f latin1 -t utf-8); else fix it or leave it out"
    return f"is not valid UTF-8 ({error}): {hint}"


def _decoded(content: bytes) -> str:
    """The text of bytes that should be UTF-8, or a _Problem."""
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        return _Problem(_not_utf8(error))


def _wide_encoding(head: bytes) -> str:
    """UTF-16 or UTF-32, as iconv names them, where the beginning of a file shows them; else empty."""
    if head.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        return "utf-32"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    # Without a mark: every other byte of Latin letters is 0, which would be valid UTF-8.
    even, odd = (head[i::2].count(0) / (len(head) / 2 or 1) for i in (0, 1))
    return "utf-16le" if odd > 0.6 > 0.2 > even else "utf-16be" if even > 0.6 > 0.2 > odd else ""


def _is_wide(head: bytes) -> str:
    """What to say of a file that is UTF-16 or UTF-32; empty where it is not."""
    name = _wide_encoding(head)
    return f"is {name.upper()}, expected UTF-8: convert the file (iconv -f {name} -t utf-8)" if name else ""


def _read_head(path: Path) -> bytes:
    """The beginning of a file of lines. UserError where it is not UTF-8."""
    with open_content(path) as file:
        head = file.read(HEAD)
    if problem := _is_wide(head):
        raise UserError(f"{path} {problem}")
    return head


def optional_package(module: str, what: str) -> Any:
    """`datasets`, or pyarrow, which comes with it. UserError where it cannot be imported."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        needs = f"{what} needs the package {module.split('.')[0]}"
        raise UserError(f"{needs} ({error}): pip install datasets") from error


def _compression(path: Path) -> str:
    """.gz or .zst, by its name or else by its first bytes, which no UTF-8 has; empty for neither."""
    if path.suffix in COMPRESSED:
        return path.suffix
    with path.open("rb") as file:
        magic = file.read(4)
    return ".gz" if magic[:2] == b"\x1f\x8b" else ".zst" if magic == b"\x28\xb5\x2f\xfd" else ""


def open_content(path: Path, start: int = 0) -> BinaryIO:
    """A file's content, decompressed, from byte `start` on."""
    compression = _compression(path)
    if compression == ".zst":
        # Unlike zstandard's own reader, arrow's reads several frames and reports that the last one is cut short.
        pa = optional_package("pyarrow", f"{path} (.zst)")
        stream = io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"), 1 << 20)
        while start:  # it cannot seek; its end ends the loop too
            start -= len(stream.read(min(start, 1 << 20))) or start
        return stream
    file = cast(BinaryIO, gzip.GzipFile(path) if compression == ".gz" else path.open("rb"))
    file.seek(start)
    return file


def _text_rows(path: Path, column: str, state: State) -> Rows:
    if not state:
        with open_content(path) as file:
            content = file.read()
        problem = _is_wide(content[:HEAD])
        yield "", _Problem(problem) if problem else _decoded(content.removeprefix(BOM)), {"done": True}


def _json_rows(path: Path, column: str, state: State) -> Rows:
    """JSON lines (state: bytes and lines read, decompressed), or one array of objects (state: objects read)."""
    if _read_head(path).removeprefix(BOM).lstrip().startswith(b"["):
        with open_content(path) as file:
            rows = json.loads(file.read().decode("utf-8-sig"))
        for i in range(state.get("object", 0), len(rows)):
            yield f"object {i + 1}", _field(rows[i], column), {"object": i + 1}
        return
    byte, number = state.get("byte", 0), state.get("line", 0)
    with _open_at_line(path, byte) as file:
        for line in file:
            byte, number = byte + len(line), number + 1
            if not line.isspace():
                yield f"line {number}", _parse(line, column), {"byte": byte, "line": number}


def _open_at_line(path: Path, byte: int) -> BinaryIO:
    """The content from the beginning of a line on. UserError where none begins at that byte."""
    file = open_content(path, max(0, byte - 1))
    if byte and file.read(1) != b"\n" and file.read(1):  # the last line may have no end
        raise UserError(
            f"{path} has no line that begins at byte {byte}, where a reader left off: it was changed before that "
            "position; bring back what was there, or start anew"
        )
    return file


def _parse(line: bytes, column: str) -> Any:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return _Problem(_not_utf8(error))
    except (ValueError, RecursionError) as error:
        return _Problem(f"is not JSON ({error}): expected one object per line; fix or remove the line")
    return _field(row, column)


def _field(row: Any, column: str) -> Any:
    if not isinstance(row, dict):
        return _Problem(f'holds {json.dumps(row)[:60]}: expected an object such as {{"{column}": "..."}}')
    return row[column] if column in row else _Problem(_no_column(column, row))


class _Lines:
    """The lines of a file as str, counted; bytes that are not UTF-8 are half surrogates."""

    def __init__(self, file: BinaryIO, byte: int = 0, number: int = 0) -> None:
        self._file, self.byte, self.number = file, byte, number

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = next(self._file)
        self.byte, self.number = self.byte + len(line), self.number + 1
        return line.decode("utf-8-sig" if self.number == 1 else "utf-8", "surrogateescape")


def _csv_rows(path: Path, column: str, state: State) -> Rows:
    """A header and records (RFC 4180). State: bytes and lines read, decompressed."""
    csv.field_size_limit((1 << 31) - 1)  # a document may be longer than the default of 128 KiB
    first = _read_head(path).removeprefix(BOM).decode(errors="replace")
    usual = "\t,;|" if {".tsv", ".tab"}.intersection(path.suffixes) else ",\t;|"
    headers = {d: next(csv.reader(first.splitlines(), delimiter=d), []) for d in usual}
    delimiter = next((d for d in usual if column in headers[d]), max(usual, key=lambda d: len(headers[d])))
    with open_content(path) as file:
        lines = _Lines(file)
        header = next(csv.reader(lines, delimiter=delimiter, strict=True), None)
        start, number = lines.byte, lines.number
    if header is None:
        return
    if column not in header:
        raise missing_column(str(path), column, header)
    with _open_at_line(path, state.get("byte", start)) as file:
        lines = _Lines(file, state.get("byte", start), state.get("line", number))
        yield from _csv_records(lines, csv.reader(lines, delimiter=delimiter, strict=True), header, column)


def _csv_records(lines: _Lines, records: Any, header: list[str], column: str) -> Rows:
    index = header.index(column)
    while True:
        where = f"line {lines.number + 1}"
        try:
            record: list[str] = next(records)
        except StopIteration:
            return
        except csv.Error as error:
            text: str = _Problem(f"is not CSV ({error}): fix its quotes, or leave it out")
        else:
            if not record:  # an empty line
                continue
            text = record[index] if len(record) == len(header) else _Problem(
                f"has {len(record)} fields, the header has {len(header)}: fix it or leave it out"
            )  # fmt: skip
            if not text.isascii():
                text = text if isinstance(text, _Problem) else _decoded(text.encode("utf-8", "surrogateescape"))
        yield where, text, {"byte": lines.byte, "line": lines.number}


def _no_column(column: str, columns: Iterable[str]) -> str:
    there = ", ".join(map(repr, columns)) or "none"
    return f"has no column {column!r}; there are: {there}; name the one with the text (text_column)"


def missing_column(position: str, column: str, columns: Iterable[str]) -> UserError:
    return UserError(f"{position} {_no_column(column, columns)}")


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
    if not _compression(path):
        return pa.memory_map(str(path))
    with open_content(path) as file:
        return pa.BufferReader(file.read())


def _table_rows(parts: Iterable[tuple[int, Iterable[Any]]], column: str, state: State) -> Rows:
    """parts: (number, its record batches) from the one the state names on. State: part, rows read of it."""
    skip = state.get("row", 0)
    for part, batches in parts:
        row = 0
        for batch in batches:
            texts, is_text = _as_bytes(batch.column(column))
            texts.validate(full=True)  # pyarrow trusts a file's offsets otherwise
            for start in range(min(max(skip - row, 0), len(texts)), len(texts), ROWS):
                for i, text in enumerate(texts.slice(start, ROWS).to_pylist(), row + start + 1):
                    decoded = _decoded(text) if is_text and text is not None else text
                    yield f"part {part + 1}, row {i},", decoded, {"part": part, "row": i}
            row += len(texts)
        skip = 0


def _as_bytes(texts: Any) -> tuple[Any, bool]:
    """A column of strings as bytes, so that one that is not UTF-8 spoils no others; whether it is one."""
    pa = optional_package("pyarrow", "a table")
    for kind, binary in ((pa.string(), pa.binary()), (pa.large_string(), pa.large_binary())):
        if texts.type == kind:
            return texts.view(binary), True
    return texts, False


# Of each kind of file: (path, column of the text, state) -> rows.
ROWS_OF = {"json": _json_rows, "csv": _csv_rows, "parquet": _parquet_rows, "arrow": _arrow_rows, "text": _text_rows}
