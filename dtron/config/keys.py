"""Every key of the configuration by its dotted name: its type, its default and what it accepts."""

import difflib
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, is_dataclass
from types import NoneType
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from dtron.config.declare import Changes, PathText
from dtron.config.sections import Config
from dtron.config.toml import toml_type, toml_value
from dtron.errors import UserError

__all__ = [
    "COMMAND_LINE",
    "KEYS",
    "SECTIONS",
    "Key",
    "Setting",
    "alternatives",
    "checked",
    "not_supported",
    "suggestion",
]

COMMAND_LINE = "command line"


class Setting(NamedTuple):
    """A checked value and where it was given: a file's path or COMMAND_LINE.

    layer: of two settings of a key the lower counts: -1 of the command line, 0 of the file, 1 of its base, and so on.
    """

    value: Any
    source: str
    layer: int


@dataclass(frozen=True)
class Key:
    """One key. `name` is dotted; `kind` is its annotation without `| None`, which is `optional`; else see `key`.

    is_path: it is or may be a path.
    """

    name: str
    kind: Any
    optional: bool
    is_path: bool
    default: Any
    help: str
    changes: Changes
    minimum: float | None
    check: Callable[[Any], str] | None
    unsupported: str | None

    @property
    def is_list_of_words(self) -> bool:
        """A list whose items are written as they are on the command line: strings, or some of a few choices."""
        item = get_args(self.kind)[0] if get_origin(self.kind) is list else None
        return item is str or get_origin(item) is Literal


def _collect(section: Any, prefix: str = "") -> dict[str, Key | None]:
    """Keys below a section's default instance in order of declaration; None marks a section."""
    found: dict[str, Key | None] = {}
    hints, annotated = get_type_hints(type(section)), get_type_hints(type(section), include_extras=True)
    for field in fields(section):
        name, default = prefix + field.name, getattr(section, field.name)
        if is_dataclass(default):
            found |= {name: None, **_collect(default, name + ".")}
            continue
        union = [kind for kind in get_args(hints[field.name]) if kind is not NoneType]
        optional = NoneType in get_args(hints[field.name])
        kind = union[0] if optional else hints[field.name]
        is_path = PathText in (annotated[field.name], *get_args(annotated[field.name]))
        about = dict(field.metadata)
        if name.startswith("validation."):  # it has the keys of a data set, but nothing is trained on that one
            about["changes"] = "nothing"
        owner = next(kind for kind in type(section).__mro__ if field.name in kind.__annotations__)
        about["changes"] = about["changes"] or vars(owner).get("CHANGES", "nothing")
        found[name] = Key(name, kind, optional, is_path, default, **about)
    return found


_COLLECTED = _collect(Config())
KEYS = {name: key for name, key in _COLLECTED.items() if key is not None}
SECTIONS = [name for name, key in _COLLECTED.items() if key is None]


def checked(key: Key, value: Any, source: str) -> Any:
    """`value` in the key's own type; raises UserError naming source, key, value and what was expected.

    An integer becomes a float where a float is expected; "" becomes None where the key may be None; the ~ that begins a
    path becomes the home folder.
    """
    if value is None or (key.optional and value == ""):
        return None
    if key.is_path and isinstance(value, str):
        value = _with_home(key.name, value, source)
    if (table := _table_of(key.kind)) and isinstance(value, list) and all(isinstance(item, dict) for item in value):
        return [_checked_table(table, item, f"{key.name}[{i}].", source) for i, item in enumerate(value)]
    if key.kind is float and type(value) is int and abs(value) < 2**1023:  # more overflows float()
        value = float(value)
    wanted = ""
    if _matches(key.kind, value) and (key.minimum is None or value >= key.minimum):
        wanted = key.check(value) if key.check else ""
        if not wanted:
            return value
    elif key.unsupported:
        raise UserError(not_supported(key, value, source))
    given = _shown(value) + ("" if source == COMMAND_LINE else f" ({toml_type(value)})")
    near = difflib.get_close_matches(str(value), _choices(key.kind), n=1)
    hint = f"; did you mean {toml_value(near[0])}?" if near else ""
    raise UserError(f"{source}: {key.name} = {given}: expected {wanted or _expected(key)}{hint}")


def _with_home(name: str, path: str, source: str) -> str:
    """A path with the home folder in place of the ~ or ~user it begins with. UserError where there is no such user."""
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        user = path.split("/")[0]
        raise UserError(
            f"{source}: {name} = {toml_value(path)}: {user} would be a user's home folder, and there is no such user; "
            f"a folder of that name is ./{path}"
        )
    return expanded


def _table_of(kind: Any) -> Any:
    """The dataclass of a key that is an array of tables; None for other keys."""
    item = get_args(kind)[0] if get_origin(kind) is list else None
    return item if is_dataclass(item) else None


def _checked_table(table: Any, given: dict[str, Any], prefix: str, source: str) -> Any:
    keys = _collect(table(), prefix)
    values = {}
    for leaf, value in given.items():
        if (key := keys.get(prefix + leaf)) is None:
            raise UserError(f'{source}: unknown key "{prefix}{leaf}"{suggestion(prefix + leaf, keys)}')
        values[leaf] = checked(key, value, source)
    return table(**values)


def not_supported(key: Key, value: Any, source: str) -> str:
    """The error message of a key of which only the default is supported."""
    accepted = "leaving it out" if key.default is None else toml_value(key.default)
    return f"{source}: {key.name} = {_shown(value)} is not supported: {key.unsupported}; only {accepted} is accepted"


def _choices(kind: Any) -> list[str]:
    return list(get_args(kind)) if get_origin(kind) is Literal else []


def _matches(kind: Any, value: Any) -> bool:
    if get_origin(kind) is Literal:
        return value in get_args(kind)
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_matches(get_args(kind)[0], item) for item in value)
    # `is`: a bool is not an integer. TOML's integers have 64 bits, the command line's are as long as they are typed.
    return type(value) is kind and (math.isfinite(value) if kind is float else kind is not int or abs(value) < 1 << 63)


def _expected(key: Key) -> str:
    names = {int: "an integer", float: "a finite number", bool: "true or false", str: "a string"}
    if get_origin(key.kind) is list:
        item = get_args(key.kind)[0]
        text = "a list of strings" if item is str else "a list of lists of strings"
        if choices := _choices(item):
            text = f"a list of any of {alternatives(choices)}"
        if _table_of(key.kind):
            text = f"an array of tables, each written as [[{key.name}]]"
    else:
        text = names.get(key.kind) or alternatives(_choices(key.kind))
    least = "" if key.minimum is None else f" of at least {key.minimum}"
    return text + least + (', or "" for none' if key.optional else "")


def alternatives(words: Iterable[str]) -> str:
    """'"a", "b" or "c"'."""
    *first, last = map(toml_value, words)
    return f"{', '.join(first)} or {last}" if first else last


def _shown(value: Any) -> str:
    text = toml_value(value)
    return text if len(text) <= 80 else text[:77] + "..."


def suggestion(name: str, known: Iterable[str]) -> str:
    """The end of an error about an unknown dotted name: the known names nearest to it.

    First the same last part in another section, then a similar one in the same section,
    then a similar one anywhere.
    """
    section, _, leaf = name.rpartition(".")
    leaves: dict[str, list[str]] = {}
    siblings: dict[str, list[str]] = {}
    for candidate in known:
        its_section, _, its_leaf = candidate.rpartition(".")
        leaves.setdefault(its_leaf, []).append(candidate)
        if its_section == section:
            siblings[its_leaf] = [candidate]
    # A few letters are like many words: of "moe" and "model" as many agree as of "dataloadr" and "dataloader".
    cutoff = 0.6 if len(leaf) > 4 else 0.8
    near = leaves.get(leaf) or _closest(leaf, siblings, cutoff) or _closest(leaf, leaves, max(cutoff, 0.75))
    if not near:
        return "; --help lists every section and key"
    near = sorted(near, key=lambda full: difflib.SequenceMatcher(None, name, full).ratio(), reverse=True)
    return f"; did you mean {alternatives(near[:3])}?"


def _closest(leaf: str, names: dict[str, list[str]], cutoff: float) -> list[str]:
    return [full for near in difflib.get_close_matches(leaf, names, n=1, cutoff=cutoff) for full in names[near]]
