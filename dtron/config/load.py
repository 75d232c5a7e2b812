"""From files and command line to one Config, and from a Config back to text.

Defaults < the file named by `base` < the file < the command line. Every value is checked where
it is given, so that an error names its file; what dtron lacks is refused after the overrides.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

from dtron.config.cli import parse_arguments
from dtron.config.keys import KEYS, SECTIONS, Setting, checked, not_supported, suggestion
from dtron.config.sections import Config
from dtron.config.toml import parse_file, toml_value
from dtron.errors import UserError

__all__ = ["flatten", "load", "replace", "to_toml"]


def load(argv: list[str]) -> Config:
    """The configuration of `--job.config_file FILE.toml [--section.key value ...]`.

    Raises UserError for whatever is wrong in a file or on the command line, and
    `dtron.config.HelpRequested`, carrying the help text, for --help.
    """
    if not argv:
        raise UserError(
            "no configuration given: pass --job.config_file FILE.toml, "
            "for example --job.config_file configs/quickstart.toml (--help lists every key)"
        )
    overrides = parse_arguments(argv)
    config_file = overrides.get("job.config_file")
    settings = {}
    if config_file is not None and config_file.value is not None:
        settings = _read_chain(Path(config_file.value), (), "--job.config_file")
    config = Config()
    for name, (value, source) in (settings | overrides).items():
        if KEYS[name].lacks and value != KEYS[name].default:
            raise UserError(not_supported(KEYS[name], value, source))
        *sections, leaf = name.split(".")
        setattr(functools.reduce(getattr, sections, config), leaf, value)
    return config


def _read_chain(path: Path, followed: tuple[Path, ...], named_by: str) -> dict[str, Setting]:
    """The settings of a file on top of those of its `base`; `followed`: the files that led here."""
    tables = parse_file(path, named_by)
    chain = (*followed, path)
    if path.resolve() in [earlier.resolve() for earlier in followed]:
        raise UserError(f"{followed[-1]}: base goes in a circle: {' -> '.join(map(str, chain))}; drop one base")
    base = tables.pop("base", None)
    inherited: dict[str, Setting] = {}
    if base is not None:
        if not isinstance(base, str) or not base:
            raise UserError(f"{path}: base = {toml_value(base)}: expected the path of a TOML file, as a string")
        inherited = _read_chain(path.parent / base, chain, f"{path}: base")
    return inherited | _settings(tables, str(path), "")


def _settings(table: dict[str, Any], source: str, prefix: str) -> dict[str, Setting]:
    """The checked settings of a table and of the tables in it, by dotted name."""
    found: dict[str, Setting] = {}
    for leaf, value in table.items():
        name = prefix + leaf
        if name == "job.config_file":
            raise UserError(
                f'{source}: {name} belongs on the command line; to build on another file, write base = "..."'
            )
        if name in KEYS:
            found[name] = Setting(checked(KEYS[name], value, source), source)
        elif name in SECTIONS and isinstance(value, dict):
            found |= _settings(value, source, name + ".")
        elif name in SECTIONS:
            raise UserError(f"{source}: {name} = {toml_value(value)}: expected a section, written as [{name}]")
        elif isinstance(value, dict):
            raise UserError(f'{source}: unknown section "{name}"{suggestion(name, SECTIONS)}')
        else:
            raise UserError(f'{source}: unknown key "{name}"{suggestion(name, [*KEYS, "base"])}')
    return found


def flatten(config: Config) -> dict[str, Any]:
    """Every value by its dotted name, in order of declaration."""
    return {name: functools.reduce(getattr, name.split("."), config) for name in KEYS}


def to_toml(config: Config) -> str:
    """The resolved configuration as TOML; `load` reads it back to an equal Config.

    All but `job.config_file`, which then names the new file and stands here as a comment.
    None is left out where it is the default and "" elsewhere.
    """
    sections: dict[str, list[str]] = {name: [] for name in SECTIONS}
    for name, value in flatten(config).items():
        section, _, leaf = name.rpartition(".")
        if name != "job.config_file" and not (value is None and KEYS[name].default is None):
            sections[section].append(f"{leaf} = {toml_value(value)}")
    blocks = ["\n".join([f"[{name}]", *lines]) for name, lines in sections.items() if lines]
    source = "none" if config.job.config_file is None else toml_value(config.job.config_file)
    return "\n\n".join([f"# resolved from {source} and the command line", *blocks]) + "\n"


def replace(config: Config, name: str, value: Any) -> Config:
    """A copy of the configuration with another value of the key with this dotted name."""
    *sections, leaf = name.split(".")
    path = [config, *(functools.reduce(getattr, sections[: i + 1], config) for i in range(len(sections)))]
    changed: Any = dataclasses.replace(path.pop(), **{leaf: value})
    for section, parent in zip(reversed(sections), reversed(path), strict=True):
        changed = dataclasses.replace(parent, **{section: changed})
    return changed
