"""TOML syntax: files to plain dictionaries, plain values to text. Knows no key by name."""

import difflib
import json
import re
import sys
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

from dtron.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["parse_file", "toml_type", "toml_value"]

LISTED = 12  # of the files in a folder
TYPE_NAMES = {bool: "boolean", int: "integer", float: "float", str: "string", list: "array", dict: "table"}


def parse_file(path: Path, named_by: str) -> dict[str, Any]:
    """The tables of the TOML file at `path`.

    `named_by`: what named the file, for the error of one that cannot be read.
    Raises UserError with the file, line, column and offending line of a syntax error.
    """
    text = _read(path, named_by)
    try:
        tables: dict[str, Any] = tomllib.loads(text)
        return tables
    except RecursionError:
        raise UserError(f"{path}: its arrays or tables are nested too deeply; expected at most two levels") from None
    except ValueError as error:  # TOMLDecodeError, and Python's own limit on the digits of an integer
        raise UserError(_syntax_message(path, text, str(error))) from None


def _read(path: Path, named_by: str) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except FileNotFoundError:
        raise UserError(f"{named_by}: there is no file {path}; {_similar_files(path)}") from None
    except IsADirectoryError:
        raise UserError(f"{named_by}: {path} is a folder; expected a TOML file; {_similar_files(path / '-')}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}: {error.reason}); save it as UTF-8") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{named_by}: cannot read {str(path)!r}: {reason}; expected a readable TOML file") from None


def _similar_files(path: Path) -> str:
    """Files beside `path` with similar names, else the TOML files there."""
    if not path.parent.is_dir():
        return f"the folder {path.parent} does not exist either"
    try:
        names = sorted(p.name for p in path.parent.iterdir() if p.suffix == ".toml")
    except OSError:
        return f"the folder {path.parent} cannot be listed"
    if not names:
        return f"the folder {path.parent} has no TOML file"
    stems = [name.removesuffix(".toml") for name in names]  # not to be like each other by that alone
    if near := difflib.get_close_matches(path.name.removesuffix(".toml"), stems, n=3, cutoff=0.7):
        return f"did you mean {' or '.join(f'{path.parent / stem}.toml' for stem in near)}?"
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return f"{path.parent} has {', '.join(names[:LISTED])}{more}"


def _syntax_message(path: Path, text: str, reason: str) -> str:
    position = re.search(r" \(at (?:line (\d+), column (\d+)|end of document)\)", reason)
    if position is None:
        return f"{path}: not valid TOML: {reason}"
    lines = text.split("\n")
    line, column = int(position[1] or len(lines)), int(position[2] or len(lines[-1]) + 1)
    what = reason.replace(position[0], "" if position[1] else " at the end of the file")
    pointer = " " * (column - 1) + "^"
    offending = lines[line - 1].replace("\t", " ")  # one column each, so that the pointer is below its character
    return f"{path}: line {line}, column {column}: not valid TOML: {what}\n    {offending}\n    {pointer}"


def toml_type(value: Any) -> str:
    """TOML's name of the value's type, with its article."""
    name = TYPE_NAMES.get(type(value), "date or time")
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def toml_value(value: Any) -> str:
    """The value as TOML text; None, which TOML lacks, as the empty string."""
    if value is None:
        return '""'
    if isinstance(value, str):
        # JSON's escapes are TOML's too, but not its surrogate pairs, and TOML wants DEL escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    if is_dataclass(value) and not isinstance(value, type):
        return toml_value({name: item for name, item in vars(value).items() if item is not None})
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} = {toml_value(item)}" for name, item in value.items()) + "}"
    return str(value)
