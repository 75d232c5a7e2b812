"""How a key of the configuration is declared: what it must satisfy, and what changing it changes."""

from collections.abc import Callable
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

__all__ = [
    "ANOTHER_TRAINING",
    "Changes",
    "PathText",
    "checkpoint_folder",
    "every_n_or_op",
    "folder_in_run",
    "key",
    "minus_1_or_positive",
    "positive",
    "share",
    "step_or_minus_1",
    "timeout_s",
    "traces_prefix",
]

PathText = Annotated[str, "path"]  # what is or may be a path; a ~ at its beginning is the user's home folder

# What another value of a key changes:
# nothing: neither losses nor speed. speed: memory or speed, on any layout the same losses. losses: the losses, but a
# resume may change it. The others make it another training, with a run folder of its own:
# training: always. dimensions: compared as the resolved dimensions of the model, however they are spelled.
# hyperparameters: unless checkpoint.resume_run names the run to continue. location: likewise, and a path is compared
# by where it leads; a resume compares the fingerprint of the data in any case.
Changes = Literal["nothing", "speed", "losses", "training", "dimensions", "hyperparameters", "location"]
ANOTHER_TRAINING: tuple[Changes, ...] = ("training", "dimensions", "hyperparameters", "location")


def key(
    default: Any,
    help: str,
    *,
    changes: Changes | None = None,
    minimum: float | None = None,
    check: Callable[[Any], str] | None = None,
    unsupported: str | None = None,
) -> Any:
    """A config key: its default and its one-line meaning with units. One that may be a path is annotated `PathText`.

    changes: see `Changes`; unset, that of the section, or nothing. minimum: the least legal number. check: value ->
    what is expected instead, or empty where the value is legal. unsupported: why any value but the default is refused.
    """
    meta = {"help": help, "changes": changes, "minimum": minimum, "check": check, "unsupported": unsupported}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=meta)
    return field(default=default, metadata=meta)


def positive(value: float) -> str:
    return "" if value > 0 else "a positive number"


def minus_1_or_positive(value: int) -> str:
    return "" if value == -1 or value >= 1 else "-1 or a number of at least 1"


def timeout_s(value: int) -> str:
    return "" if value <= 10**7 else "at most 10000000 seconds, which are 116 days"


def share(value: float) -> str:
    return "" if 0 <= value <= 1 else "a number in [0, 1]"


def step_or_minus_1(value: int) -> str:
    return "" if value >= -1 else "a step, or -1 for the newest"


def folder_in_run(value: str) -> str:
    path = Path(value)
    inside = not path.is_absolute() and ".." not in path.parts and path != Path()
    return "" if inside else "the name of a folder inside the run folder"


def checkpoint_folder(value: str) -> str:
    return "" if "://" in value else folder_in_run(value)


def traces_prefix(value: str) -> str:
    # torch's analyzer takes every file whose name has the prefix in it for one of its own, and the rest for a rank.
    good = value and "/" not in value and value not in "stack_"
    return "" if good else "the beginning of a file name, such as rank_, that is no part of stack_ (of files beside)"


def every_n_or_op(value: str) -> str:
    good = value == "op" or (value.isdecimal() and int(value) > 0)
    return "" if good else '"op", or n >= 1 for every n-th block'
