"""When two configurations are the same training, so that one run resumes the other.

What changing a key changes stands on the key (`Changes` in `dtron/config/sections.py`). Here two configurations are
compared by it, and hashed for the name of the run folder.
"""

import dataclasses
import os
from collections.abc import Collection
from typing import Any

from dtron.config import Config, changed_keys, digest, flatten
from dtron.config.declare import ANOTHER_TRAINING, Changes
from dtron.config.keys import KEYS

__all__ = ["Difference", "differences", "format_differences", "run_identity"]


@dataclasses.dataclass(frozen=True)
class Difference:
    """A key that has another value in an earlier configuration."""

    key: str
    changes: Changes
    here: Any
    there: Any

    def __str__(self) -> str:
        return f"{self.key} ({self.here!r} here, {self.there!r} there)"


def run_identity(config: Config, model_config: Any) -> str:
    """Hash of what makes two runs the same training: model, data, optimizer, seed; not layout, length or batch size.

    Keys at their defaults are left out, so that a key which a later version adds makes no run another one. A folder
    counts by its own name, however its path is written, so that moving all of a project changes no run's name.
    """
    keys = changed_keys(config, [kind for kind in ANOTHER_TRAINING if kind != "dimensions"])
    named = {key: _each(value, _own_name) if KEYS[key].changes == "location" else value for key, value in keys.items()}
    return digest([named, _not_default(model_config)])


def _not_default(value: Any) -> Any:
    """The fields of a dataclass that are not at their defaults, in those that it holds too."""
    if not dataclasses.is_dataclass(value):
        return value
    fields = [field for field in dataclasses.fields(value) if field.compare]
    changed = {
        field.name: getattr(value, field.name) for field in fields if getattr(value, field.name) != field.default
    }
    return {type(value).__name__: {name: _not_default(given) for name, given in changed.items()}}


def differences(config: Config, earlier: Config, changes: Collection[Changes]) -> list[Difference]:
    """The keys in which two configurations differ, of those that change one of `changes`.

    A path is compared by where it leads. A global batch of -1 takes that of the run it resumes, so it is no difference.
    """
    there = flatten(earlier)
    return [
        Difference(key, KEYS[key].changes, here, there[key])
        for key, here in flatten(config).items()
        if KEYS[key].changes in changes and not _equal(key, here, there[key])
    ]


def format_differences(found: Collection[Difference], at_most: int = 4) -> str:
    """The first few, for a message."""
    texts = [str(difference) for difference in found]
    return ", ".join(texts[:at_most]) + (f" and {len(texts) - at_most} more" if len(texts) > at_most else "")


def _equal(key: str, here: Any, there: Any) -> bool:
    if here == there or (key == "training.global_batch_size" and here == -1):
        return True
    return KEYS[key].changes == "location" and _each(here, os.path.realpath) == _each(there, os.path.realpath)


def _each(value: Any, place: Any) -> Any:
    """A location, or every one in the tables of a mixture, with `place` applied where it is a path on this machine."""
    if isinstance(value, list):
        return [{name: _each(v, place) for name, v in vars(table).items()} for table in value]
    if not isinstance(value, str) or "://" in value:
        return value
    return place(value) if os.path.exists(value) else value.rstrip("/")


def _own_name(path: str) -> str:
    return os.path.basename(os.path.realpath(path))
