"""From files and command line to one Config, and from a Config back to text.

Defaults < the file named by `base` < the file < the command line. Every value is checked where
it is given, so that an error names its file; what is not supported is refused after the overrides.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from dtron.config.cli import parse_arguments
from dtron.config.declare import Changes
from dtron.config.keys import COMMAND_LINE, KEYS, SECTIONS, Setting, checked, not_supported, suggestion
from dtron.config.sections import Config
from dtron.config.toml import parse_file, toml_value
from dtron.config.torchtitan import OWN_SECTIONS, RENAMED, absent, llama3_means
from dtron.config.unread import unmet, unread
from dtron.errors import Mistakes, UserError

__all__ = ["Reading", "base_of", "changed_keys", "digest", "flatten", "load", "read", "replace", "to_toml"]

Section = TypeVar("Section")  # the whole configuration, or a section of it


class Reading(NamedTuple):
    """What was read. mistakes: whose keys have their defaults in `config`. notes: lines to log at start."""

    config: Config
    mistakes: Mistakes
    notes: list[str]


def load(argv: list[str]) -> Config:
    """The configuration of `--job.config_file FILE.toml [--section.key value ...]`.

    Raises UserError for whatever is wrong in a file or on the command line, and
    `dtron.config.HelpRequested`, carrying the help text, for --help.
    """
    reading = read(argv)
    reading.mistakes.raise_any()
    return reading.config


def read(argv: list[str]) -> Reading:
    """As `load`, but hands the mistakes over, for a caller that has more to check."""
    if not argv:
        raise UserError(
            "no configuration given: pass --job.config_file FILE.toml, "
            "for example --job.config_file configs/quickstart.toml (--help lists every key)"
        )
    mistakes, notes = Mistakes(), list[str]()
    overrides = parse_arguments(argv, mistakes)
    config_file = overrides.get("job.config_file")
    settings: dict[str, Setting] = {}
    files = _Files(mistakes, notes)
    if config_file is not None and config_file.value is not None:
        with mistakes.collect():
            settings = files.read_chain(Path(config_file.value), (), "--job.config_file")
    settings |= overrides
    _drop_kind_of_other_path(settings)
    notes += _llama3(settings, files.words)
    config, unsupported = Config(), dict[str, Setting]()
    for name, setting in settings.items():
        if KEYS[name].unsupported and setting.value != KEYS[name].default:
            unsupported[name] = setting
        else:
            config = replace(config, name, setting.value)
    for name, setting in unsupported.items():
        if setting.source == COMMAND_LINE or not unmet(name, config):  # else it asks for nothing
            mistakes.append(not_supported(KEYS[name], setting.value, setting.source))
    given = {name: setting for name, setting in settings.items() if setting.source not in files.records}
    return Reading(config, mistakes, [*notes, *_warm_up(config), *unread(config, given)])


def _drop_kind_of_other_path(settings: dict[str, Setting]) -> None:
    """initial_load_in_hf is said of the path beside it, not of one that the command line or a later file puts there."""
    path, in_hf = (settings.get(f"checkpoint.initial_load_{leaf}") for leaf in ("path", "in_hf"))
    if path is not None and path.value and in_hf is not None and path.layer < in_hf.layer:
        del settings["checkpoint.initial_load_in_hf"]


def _warm_up(config: Config) -> list[str]:
    """The line of a run that ends before its learning rate has reached its peak."""
    warmup, steps = config.lr_scheduler.warmup_steps, config.training.steps
    if warmup <= steps or config.lr_scheduler.total_steps or config.validation.only:
        return []
    return [
        f"lr_scheduler.warmup_steps {warmup} is more than training.steps {steps}: the learning rate only rises, to "
        f"{steps / warmup:.1%} of optimizer.lr; lower warmup_steps, or set total_steps to the whole schedule's"
    ]


def _llama3(settings: dict[str, Setting], words: list[str]) -> list[str]:
    """Take model.name llama3 for what torchtitan called so when a file was written; the line that says so."""
    name = settings.get("model.name")
    if name is not None and (name.value != "llama3" or name.source == COMMAND_LINE):
        return []
    meant, word = llama3_means(words)
    if meant == "llama3.1":
        settings["model.name"] = Setting(meant, "", 0)
        return [
            f"model.name is {meant}: {word} is a key of torchtitan since 2025-10, whose llama3 has its rotary scaling"
        ]
    if meant:
        return [
            f"model.name is {meant}: {word} is a key of torchtitan before 2025-10, whose llama3 has no rotary scaling"
        ]
    return []


class _Files:
    """Reads a file and its bases.

    records: files that state nearly every key, as a run's own config.toml does, whatever its user set. words: the keys
    of the other files, as they spell them.
    """

    def __init__(self, mistakes: Mistakes, notes: list[str]) -> None:
        self._mistakes, self._notes = mistakes, notes
        self.words: list[str] = []
        self.records: set[str] = set()

    def read_chain(self, path: Path, followed: tuple[Path, ...], named_by: str) -> dict[str, Setting]:
        """The settings of a file on top of those of its `base`; `followed`: the files that led here."""
        tables = parse_file(path, named_by)
        chain = (*followed, path)
        if path.resolve() in [earlier.resolve() for earlier in followed]:
            raise UserError(f"{followed[-1]}: base goes in a circle: {' -> '.join(map(str, chain))}; drop one base")
        base = tables.pop("base", None)
        inherited: dict[str, Setting] = {}
        if base is not None:
            with self._mistakes.collect():
                inherited = self.read_chain(base_of(path, base), chain, f"{path}: base")
        return inherited | self._settings(tables, path, len(followed))

    def _settings(self, tables: dict[str, Any], path: Path, layer: int) -> dict[str, Setting]:
        """The checked settings of a file by dotted name, torchtitan's old names as ours."""
        values, source = dict[str, Any](), str(path)
        self._flatten(tables, source, "", values)
        always_written = sum(key.default is not None for key in KEYS.values())
        if len(values) > 0.9 * always_written and set(values) <= set(KEYS):
            self.records.add(source)
        else:
            self.words += values
        found: dict[str, Setting] = {}
        without: list[str] = []
        for name, value in values.items():
            with self._mistakes.collect():
                if name in KEYS:
                    found[name] = Setting(checked(KEYS[name], value, source), source, layer)
                elif name not in RENAMED and (entry := absent(name)):
                    if entry.harmless is not None and value not in entry.harmless:
                        raise UserError(f"{source}: {name} = {toml_value(value)} is not supported: {entry.reason}")
                    without.append(name)
        for name in [name for name in values if name in RENAMED]:
            with self._mistakes.collect():
                found |= self._renamed(name, values, source, layer)
        if without:
            self._notes.append(f"{source}: torchtitan's, without effect here: {', '.join(without)}")
        return found

    def _renamed(self, name: str, values: dict[str, Any], source: str, layer: int) -> dict[str, Setting]:
        new, convert = RENAMED[name]
        if new in values:
            raise UserError(f"{source}: {name} is torchtitan's old name of {new}, which is there too; leave it out")
        value = checked(KEYS[new], convert(values[name]), f"{source}: {name}, now")
        self._notes.append(f"{source}: {name} is read as {new} = {toml_value(value)}")
        return {new: Setting(value, source, layer)}

    def _flatten(self, table: dict[str, Any], source: str, prefix: str, values: dict[str, Any]) -> None:
        """Add the values in a table and in the tables in it, by dotted name; mistakes are names that nothing knows."""
        for leaf, value in table.items():
            name = prefix + leaf
            if name in KEYS and name != "job.config_file" or name in RENAMED or absent(name):
                values[name] = value
            elif isinstance(value, dict) and (name in SECTIONS or name in OWN_SECTIONS):
                self._flatten(value, source, name + ".", values)
            else:
                self._mistakes.append(f"{source}: {_unknown(name, value)}")


def base_of(path: Path, base: Any) -> Path:
    """The file that the `base` of `path` names: beside the file itself, else beside a link to it."""
    if not isinstance(base, str) or not base:
        raise UserError(f"{path}: base = {toml_value(base)}: expected the path of a TOML file, as a string")
    beside_file, beside_link = (folder / os.path.expanduser(base) for folder in (path.resolve().parent, path.parent))
    return beside_file if path.is_symlink() and beside_file.exists() else beside_link


def _unknown(name: str, value: Any) -> str:
    """What is wrong with a name that is no key, and no section where the value is a table."""
    if name == "job.config_file":
        return f'{name} belongs on the command line; to build on another file, write base = "..."'
    if name in SECTIONS:
        return f"{name} = {toml_value(value)}: expected a section, written as [{name}]"
    if isinstance(value, dict):
        return f'unknown section "{name}"{suggestion(name, SECTIONS)}'
    return f'unknown key "{name}"{suggestion(name, [*KEYS, "base"])}'


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


def replace(config: Section, name: str, value: Any) -> Section:
    """A copy of the configuration with another value of the key with this dotted name."""
    head, _, rest = name.partition(".")
    if rest:
        value = replace(getattr(config, head), rest, value)
    return dataclasses.replace(config, **{head: value})  # type: ignore[type-var]


def changed_keys(config: Config, changes: Collection[Changes] | None = None) -> dict[str, Any]:
    """Values that are not the defaults, by dotted name; changes: of the keys that change one of these only."""
    return {
        name: value
        for name, value in flatten(config).items()
        if value != KEYS[name].default and (changes is None or KEYS[name].changes in changes)
    }


def digest(value: Any) -> str:
    """A short hash of what JSON can hold, dataclasses in it included."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=vars).encode()).hexdigest()[:8]
