"""SWEEP.toml: which points a sweep has. What a point is, and whether it can run, is in points.py.

base = "../llama3-8b.toml"        # the configuration that every point changes; paths are relative to this file
ranks = 8                         # of every point; or nodes = 2 and ranks_per_node = 8
steps = 20                        # of every point
limit_s = 1800                    # seconds after which a point is stopped
layouts = "all"                   # every product of degrees equal to the ranks, within [limits]
[limits]                          # largest degrees
tp = 8
[fixed]                           # ordinary keys, the same for all points
training.global_batch_size = 128
[axes]                            # lists of values of ordinary keys; one point per combination
training.local_batch_size = [1, 2]
[[points]]                        # additional points
tp = 2
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dtron.config.cli import SHORT_FORMS
from dtron.config.keys import KEYS, SECTIONS, checked, not_supported, suggestion
from dtron.config.load import base_of
from dtron.config.toml import parse_file, toml_type, toml_value
from dtron.errors import UserError

__all__ = ["DEGREES", "SweepFile", "assignments", "read_sweep"]

# In the order of the mesh, outermost first.
DEGREES = [SHORT_FORMS[name] for name in ("pp", "dp_replicate", "dp", "cp", "tp")]
TOP_LEVEL_KEYS = (
    "base",
    "ranks",
    "nodes",
    "ranks_per_node",
    "steps",
    "limit_s",
    "layouts",
    "limits",
    "fixed",
    "axes",
    "points",
)
RESERVED = {
    "job.config_file": "write base = FILE.toml at the top",
    "job.dump_folder": "every point has its own folder in the sweep's",
    "job.control_folder": "every point has its own folder in the sweep's",
    "training.steps": "write steps = N at the top",
    "metrics.log_freq": "every step is logged, for the medians",
    "validation.only": "a sweep measures training",
}


@dataclass(frozen=True)
class SweepFile:
    """The contents of SWEEP.toml; values have their key's type. Keys are dotted names, and `base`, a path.

    layouts: degrees by dotted name, empty if the file has none. limit_s: seconds a point may take.
    """

    path: Path
    nodes: int
    ranks_per_node: int
    steps: int
    limit_s: float
    layouts: list[dict[str, Any]]
    fixed: dict[str, Any]
    axes: dict[str, list[Any]]
    points: list[dict[str, Any]] = field(default_factory=list)

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node


def read_sweep(path: Path, nodes: int | None = None) -> SweepFile:
    """Read and check a SWEEP.toml; nodes: from the command line. UserError for the first mistake."""
    tables = parse_file(path, "sweep")
    if unknown := [name for name in tables if name not in TOP_LEVEL_KEYS]:
        raise UserError(_unknown(path, unknown[0]))
    n_nodes, per_node = _world(path, tables, nodes)
    fixed = _settings(path, _table(path, tables, "fixed"), "fixed")
    axes = _axes(path, _table(path, tables, "axes"))
    if "base" in tables:
        fixed["base"] = _value(path, "base", tables["base"], "base")
    if both := [name for name in axes if name in fixed]:
        raise UserError(f"{path}: {both[0]} is given both as fixed and as an axis; remove one of them")
    layouts = _layouts(path, tables, n_nodes * per_node)
    if layouts and (named := [name for name in (*fixed, *axes) if name in DEGREES]):
        raise UserError(f"{path}: {named[0]} is given, but layouts set every degree; remove one of them")
    points = _points(path, tables.get("points", []), fixed)
    if not axes and not layouts and not points:
        raise UserError(f"{path}: no points; add layouts, [axes] with lists of values, or [[points]]")
    steps = _integer(path, tables, "steps", 20, least=2)  # the first is warm-up
    limit_s = float(_integer(path, tables, "limit_s", 1800))
    file = SweepFile(path, n_nodes, per_node, steps, limit_s, layouts, fixed, axes, points)
    if any("base" not in fixed | point for point in assignments(file)):
        raise UserError(f'{path}: base is missing; add base = "FILE.toml", the configuration that the points change')
    return file


def assignments(file: SweepFile) -> Iterator[dict[str, Any]]:
    """Each point's settings besides `fixed`, by dotted name: the product of layouts and axes, then [[points]]."""
    if file.layouts or file.axes:
        for layout in file.layouts or [{}]:
            for values in itertools.product(*file.axes.values()):
                yield layout | dict(zip(file.axes, values, strict=True))
    yield from file.points


def _world(path: Path, tables: dict[str, Any], nodes: int | None) -> tuple[int, int]:
    """(nodes, ranks per node)."""
    in_file = _integer(path, tables, "nodes", 0)
    if nodes and in_file and nodes != in_file:
        raise UserError(f"--nodes {nodes}, but {path} has nodes = {in_file}; remove one of them")
    n_nodes = nodes or in_file or 1
    if ("ranks" in tables) == ("ranks_per_node" in tables):
        raise UserError(f"{path}: expected the ranks per point, either as ranks = N or as ranks_per_node = N")
    if "ranks_per_node" in tables:
        return n_nodes, _integer(path, tables, "ranks_per_node", 0)
    ranks = _integer(path, tables, "ranks", 0)
    if ranks % n_nodes:
        raise UserError(f"{path}: ranks = {ranks} is not divisible by {n_nodes} nodes; change one of them")
    return n_nodes, ranks // n_nodes


def _integer(path: Path, tables: dict[str, Any], name: str, default: int, least: int = 1) -> int:
    value = tables.get(name, default)
    if name in tables and (type(value) is not int or value < least):
        raise UserError(f"{path}: {name} = {toml_value(value)}: expected an integer of at least {least}")
    return value


def _table(path: Path, tables: dict[str, Any], name: str) -> dict[str, Any]:
    value = tables.get(name, {})
    if not isinstance(value, dict):
        raise UserError(f"{path}: {name} is {toml_type(value)}; expected a table, written as [{name}]")
    return value


def _unknown(path: Path, name: str) -> str:
    key = SHORT_FORMS.get(name, name)
    if key in KEYS or name.split(".")[0] in SECTIONS:
        return f'{path}: the key "{name}" is at the top level; put it under [fixed], [axes] or [[points]]'
    return f'{path}: unknown key "{name}"{suggestion(name, TOP_LEVEL_KEYS)}'


def _flat(path: Path, table: dict[str, Any], where: str, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, unchecked value) of ordinary keys, written in sections, dotted or short."""
    for leaf, value in table.items():
        name = prefix + leaf
        name = SHORT_FORMS.get(name, name)
        if name in RESERVED:
            raise UserError(f"{path}: [{where}] sets {name}, which a sweep sets itself: {RESERVED[name]}")
        if name in KEYS or name == "base":
            yield name, value
        elif name in SECTIONS and isinstance(value, dict):
            yield from _flat(path, value, where, name + ".")
        else:
            known = [*KEYS, *SHORT_FORMS, "base"]
            raise UserError(f'{path}: [{where}] has the unknown key "{name}"{suggestion(name, known)}')


def _value(path: Path, name: str, value: Any, where: str) -> Any:
    """The value in its key's type; a base as the path of an existing file."""
    if name != "base":
        value = checked(KEYS[name], value, str(path))
        if KEYS[name].unsupported and value != KEYS[name].default:
            raise UserError(not_supported(KEYS[name], value, str(path)))
        return value
    base = base_of(path, value)
    parse_file(base, f"{path}: {where}")
    return str(base)


def _settings(path: Path, table: dict[str, Any], where: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in _flat(path, table, where):
        if name in found:
            raise UserError(f"{path}: [{where}] gives {name} twice, once in its short form; remove one of them")
        found[name] = _value(path, name, value, where)
    return found


def _axes(path: Path, table: dict[str, Any]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for name, values in _flat(path, table, "axes"):
        if name in found:
            raise UserError(f"{path}: [axes] gives {name} twice, once in its short form; remove one of them")
        if not isinstance(values, list):
            given = toml_value(values)
            raise UserError(f"{path}: the axis {name} = {given}: expected a list of values, such as [{given}]")
        if not values:
            raise UserError(f"{path}: the axis {name} has no values; add some")
        found[name] = [_value(path, name, value, "axes") for value in values]
    return found


def _points(path: Path, tables: Any, fixed: dict[str, Any]) -> list[dict[str, Any]]:
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise UserError(f"{path}: points is {toml_type(tables)}; expected tables, each written as [[points]]")
    points = [_settings(path, table, f"points {number}") for number, table in enumerate(tables, 1)]
    for point in points:
        if both := [name for name in point if name in fixed]:
            raise UserError(f"{path}: {both[0]} is given both as fixed and in [[points]]; remove one of them")
    return points


def _layouts(path: Path, tables: dict[str, Any], ranks: int) -> list[dict[str, Any]]:
    """The degrees of every layout by dotted name."""
    given, limits = tables.get("layouts"), _degrees(path, _table(path, tables, "limits"), "limits")
    if limits and given != "all":
        raise UserError(f'{path}: [limits] has no effect without layouts = "all"; remove it')
    if given is None:
        return []
    if isinstance(given, list) and given and all(isinstance(layout, dict) for layout in given):
        rest = dict.fromkeys(DEGREES, 1) | {SHORT_FORMS["dp"]: -1}
        return [rest | _degrees(path, layout, "layouts") for layout in given]
    if given != "all":
        raise UserError(f'{path}: layouts = {toml_value(given)}: expected "all", or a list such as [{{tp = 2}}]')
    largest = [limits.get(name, ranks) for name in DEGREES]
    found = [dict(zip(DEGREES, degrees, strict=True)) for degrees in _products(ranks, largest)]
    if not found:
        raise UserError(f"{path}: no product of degrees within [limits] equals {ranks}, the ranks; raise a limit")
    return found


def _degrees(path: Path, table: dict[str, Any], where: str) -> dict[str, int]:
    found = _settings(path, table, where)
    for name, degree in found.items():
        if name not in DEGREES or degree < 1:
            short = ", ".join(short for short, key in SHORT_FORMS.items() if key in DEGREES)
            raise UserError(f"{path}: {where} has {name} = {toml_value(degree)}; expected {short} of at least 1")
    return found


def _products(ranks: int, largest: list[int]) -> Iterator[list[int]]:
    """Every way to write `ranks` as a product of degrees, one per entry of `largest` and at most that entry."""
    if not largest:
        if ranks == 1:
            yield []
        return
    for degree in range(1, min(ranks, largest[0]) + 1):
        if ranks % degree == 0:
            yield from ([degree, *rest] for rest in _products(ranks // degree, largest[1:]))
