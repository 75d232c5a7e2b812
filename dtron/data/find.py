"""Which files of a folder are data, and of what kind each of them is."""

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from dtron.data.formats import BOM, COMPRESSED, HEAD, open_content
from dtron.errors import UserError

__all__ = ["KINDS", "find_files", "one_kind"]

KINDS = {
    **dict.fromkeys((".json", ".jsonl", ".ndjson"), "json"),
    **dict.fromkeys((".csv", ".tsv", ".tab"), "csv"),
    ".parquet": "parquet",
    ".arrow": "arrow",
}
UNREADABLE = {".zip", ".tar", ".tgz", ".bz2", ".xz", ".7z", ".rar", ".pdf", ".docx", ".xlsx", ".npy", ".pkl", ".orc"}
# The same by their first bytes, where the name does not say it.
MAGIC = {b"PAR1": "parquet", b"ARROW1": "arrow", b"\xff\xff\xff\xff": "arrow"}
UNREADABLE_MAGIC = {b"PK\x03\x04": "zip", b"BZh": "bz2", b"\xfd7zXZ": "xz", b"7z\xbc\xaf": "7z", b"%PDF-": "pdf"}
# Files that lie beside the data where `datasets`, Spark or the hub wrote the folder.
NO_DATA = re.compile(
    r"(readme|license)(\.\w+)?|dataset_infos?\.json|state\.json|_SUCCESS|_(common_)?metadata|_(started|committed)_\d+"
    r"|_temporary|_delta_log|.+\.(crc|md5|sha1|sha256)|(md5|sha1|sha256)sums?(\.txt)?",
    re.IGNORECASE,
)
LINE = 1 << 24  # bytes of a first line that are read to see whether it is JSON


def find_files(folder: Path) -> list[Path]:
    """The data files below a folder, sorted. Links to folders are followed, and each folder is read once.

    All but hidden files, README, LICENSE and what `datasets`, Spark and checksum tools leave beside the data.
    UserError for a folder that cannot be read, and for a link that leads nowhere.
    """
    return sorted(path for path in _walk(folder) if path.is_file())


def _walk(top: Path) -> Iterator[Path]:
    seen: set[Path] = set()  # folders, by their real paths
    roots = [top]
    while roots:  # what is a link comes after all that is not: a folder inside `top` keeps its own name
        root = roots.pop(0)
        if root != top and top.resolve().is_relative_to(root.resolve()):
            continue  # up to a folder that this is in
        for folder, folders, files in os.walk(root, onerror=_refuse):
            here = Path(folder)
            folders[:] = sorted(name for name in folders if _is_data(name)) if here.resolve() not in seen else []
            if here.resolve() in seen:
                continue
            seen.add(here.resolve())
            roots += [here / name for name in folders if (here / name).is_symlink()]
            for path in (here / name for name in files if _is_data(name)):
                if not path.exists():
                    raise UserError(
                        f"{path} is a link to {os.readlink(path)}, which does not exist: repair or remove it"
                    )
                yield path


def _refuse(error: OSError) -> None:
    raise UserError(f"{error.filename} cannot be read ({error.strerror}): fix its permissions, or move it away")


def _is_data(name: str) -> bool:
    return not NO_DATA.fullmatch(name) and not name.startswith(".")


def one_kind(paths: list[Path], column: str, location: str) -> str:
    """json, csv, parquet, arrow or text: the kind of all these files, by their names or else by their content.

    column: of the text. A file called .txt, say, counts as JSON lines only where all of the others are that too: one
    among other text, in a folder of sources, is text. UserError for several kinds, and for what cannot be read.
    """
    kinds = [_kind(path, column) for path in paths]
    if set(kinds) <= {"json", "json in text"}:
        return "json"
    by_kind: dict[str, list[Path]] = {}
    for path, kind in zip(paths, kinds, strict=True):
        by_kind.setdefault("text" if kind == "json in text" else kind, []).append(path)
    if len(by_kind) > 1:
        counts = ", ".join(f"{len(paths)} {kind} ({paths[0].name})" for kind, paths in by_kind.items())
        raise UserError(f"{location!r} holds files of several kinds: {counts}: name the folder or file of one")
    return next(iter(by_kind))


def _kind(path: Path, column: str) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() not in COMPRESSED]
    named = [suffix for suffix in suffixes if not suffix[1:].isdigit()]  # data.jsonl.1 is the first part of it
    last = named[-1] if named else ""
    if last in UNREADABLE:
        raise UserError(f"{path} is a {last} file, which is not read: convert it to .jsonl, .parquet or .txt")
    return KINDS.get(last) or _kind_by_content(path, column, bool(last))


def _kind_by_content(path: Path, column: str, is_named: bool) -> str:
    try:
        with open_content(path) as file:
            head = file.read(HEAD)
            for magic, kind in UNREADABLE_MAGIC.items():
                if head.startswith(magic):
                    raise UserError(
                        f"{path} is a {kind} file, which is not read: convert it to .jsonl, .parquet or .txt"
                    )
            for magic, kind in MAGIC.items():
                if head.startswith(magic):
                    return kind
            start = head.removeprefix(BOM).lstrip()
            if not start.startswith((b"{", b"[")):
                return "text"
            lines = (start + file.readline(LINE)).splitlines()
    except OSError:  # reading it will say so
        return "text"
    rows = [_json_object(line) for line in lines[:2]]
    is_array = re.match(rb'\[\s*\{\s*"', start) is not None
    if not is_named:
        return "json" if is_array or rows[0] is not None else "text"
    of_column = f'"{column}"'.encode() in start if is_array else column in (rows[0] or ())
    return "json in text" if of_column or (len(rows) == 2 and None not in rows) else "text"


def _json_object(line: bytes) -> dict[str, object] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None
