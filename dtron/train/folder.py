"""Which folder a run writes to: resumed where the same run left checkpoints, fresh otherwise, never overwritten."""

import dataclasses
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any, TextIO

from dtron.checkpoint.files import holds_checkpoints
from dtron.checkpoint.load import check_source
from dtron.checkpoint.storage import StoragePath
from dtron.config import Config, changed_keys, digest, flatten, load
from dtron.config.keys import KEYS
from dtron.config.sections import Changes, Checkpoint
from dtron.errors import UserError
from dtron.files import acquire_lock, write_atomically

__all__ = [
    "LOCK",
    "RunFolder",
    "check_writable",
    "checkpoint_folder",
    "choose_run_folder",
    "lock_run_folder",
    "run_identity",
    "saves",
    "write_config",
]


class InUseError(UserError):
    """Another run is in the folder; that passes."""

    kind = "busy"


LOCK = "run.lock"
DRAFT = "config.toml.partial"  # becomes an attempt's config.toml when it is whole


@dataclasses.dataclass
class RunFolder:
    """A run's folder and the number of this attempt. resumes: it holds checkpoints. message: a line for the user."""

    path: Path
    attempt: int
    resumes: bool
    message: str = ""


def run_identity(config: Config, model_config: Any) -> str:
    """Hash of what makes two runs the same training: model, data, optimizer, seed; not layout, length or batch size.

    Keys at their defaults are left out, so that a key which a later version adds makes no run another one.
    """
    return digest([changed_keys(config, ["training"]), dataclasses.asdict(model_config)])


def checkpoint_folder(config: Checkpoint, run_folder: Path) -> StoragePath:
    """Where a run's checkpoints are: in its folder, or under a URL in a folder of the same name."""
    if "://" in config.folder:
        return StoragePath.at(config.folder) / run_folder.name
    return StoragePath.at(run_folder / config.folder)


def choose_run_folder(config: Config, model_config: Any) -> RunFolder:
    """The run's folder: one where the same run left checkpoints or had not come to its first, or a new one, made here.

    UserError where checkpoint.load_step names a step and there is no such run.
    """
    stem = f"{config.model.name}-{config.model.flavor}-{run_identity(config, model_config)}"
    parent, c = Path(config.job.dump_folder), config.checkpoint
    if c.enable:
        local = sorted(parent.glob(f"{stem}*"), key=lambda p: p.stat().st_mtime, reverse=True)
        remote = (
            [name for name in StoragePath.at(c.folder).names() if name.startswith(stem)] if "://" in c.folder else []
        )
        for folder in (*local, *(parent / name for name in remote)):
            if holds_checkpoints(checkpoint_folder(c, folder)):
                folder.mkdir(parents=True, exist_ok=True)
                return RunFolder(folder, _attempt(folder), True, _changed(config, folder))
    if c.initial_load_path:  # a resume needs it no more
        check_source(StoragePath.at(c.initial_load_path))
    if c.enable:
        if abandoned := next((folder for folder in local if _has_saved_nothing(folder, c)), None):
            return RunFolder(abandoned, _attempt(abandoned), False, _not_resumed(config, abandoned))
        if c.load_step != -1:
            raise UserError(
                f"no run of this model, data and optimizer in {parent} has a checkpoint of step {c.load_step} "
                "with optimizer state; set checkpoint.load_step to one that is there, or -1 for the newest"
            )
    number = 1
    while True:
        folder = parent / (stem if number == 1 else f"{stem}-{number}")
        try:
            folder.mkdir(parents=True)
            return RunFolder(folder, 1, False, _not_resumed(config, folder))
        except FileExistsError:
            number += 1


def _attempt(folder: Path) -> int:
    return 1 + len(list(folder.glob("config*.toml")))


def write_config(folder: Path, attempt: int, text: str) -> None:
    """Keep the resolved configuration of an attempt: the first one's is config.toml, which a resume never overwrites.

    A kill leaves no half of it, which would be taken for another run's.
    """
    write_atomically(folder / ("config.toml" if attempt == 1 else f"config-attempt-{attempt}.toml"), text)


def _has_saved_nothing(folder: Path, own: Checkpoint) -> bool:
    """Whether a run with checkpoints ended here before its first one: the same run may start in this folder again."""
    text = folder / "config.toml"
    if not folder.is_dir():
        return False
    if not text.is_file():  # it ended while it started
        foreign = set(os.listdir(folder)) - {LOCK, DRAFT, own.folder.split("/")[0]}
        return not foreign and not holds_checkpoints(checkpoint_folder(own, folder))
    try:
        c = load(["--job.config_file", str(text)]).checkpoint
    except UserError:
        return False
    return saves(c) and not holds_checkpoints(checkpoint_folder(c, folder))


def saves(config: Checkpoint) -> bool:
    """Whether a run writes checkpoints."""
    return config.enable and not config.load_only


def _not_resumed(config: Config, folder: Path) -> str:
    """A line that names the keys in which this run differs from the most like one that could have been resumed."""
    if not config.checkpoint.enable:
        return ""
    found = []
    for other in folder.parent.glob("*/config.toml"):
        theirs = _read(other)
        if theirs and other.parent != folder and holds_checkpoints(checkpoint_folder(theirs.checkpoint, other.parent)):
            found.append((_differences(config, theirs, ("training", "dimensions")), other.parent))
    if not found:
        return ""
    keys, other_folder = min(found, key=lambda pair: len(pair[0]))
    what = ", ".join(keys[:4]) + (f" and {len(keys) - 4} more" if len(keys) > 4 else "")
    return (
        f"a run of its own, not a resume of {other_folder}, from which it differs in {what or 'the model or its files'}"
    )


def _changed(config: Config, folder: Path) -> str:
    """A line that names what a resume changes, of all that has a bearing on the training or its speed."""
    attempts = sorted(folder.glob("config*.toml"), key=lambda path: path.stat().st_mtime)
    theirs = _read(attempts[-1]) if attempts else None
    keys = _differences(config, theirs, ("speed", "losses", "training", "dimensions")) if theirs else []
    return f"changed since the last attempt: {', '.join(keys)}" if keys else ""


def _read(path: Path) -> Config | None:
    try:
        return load(["--job.config_file", str(path)])
    except UserError:
        return None  # of another version


def _differences(config: Config, theirs: Config, changes: Collection[Changes]) -> list[str]:
    """Of the keys that change one of `changes`."""
    there = flatten(theirs)
    return [
        f"{key} ({mine!r} here, {there[key]!r} there)"
        for key, mine in flatten(config).items()
        if mine != there[key] and KEYS[key].changes in changes
    ]


def lock_run_folder(folder: Path) -> TextIO:
    """Keep other runs out of a folder until the file is closed or this process ends. UserError if one is in it."""
    return acquire_lock(
        folder / LOCK,
        lambda owner: InUseError(
            f"{folder} is in use by {owner}: the same run is running there; wait for it, stop it, or set another "
            "job.dump_folder"
        ),
    )


def check_writable(folder: StoragePath, rank: int) -> None:
    """UserError if checkpoints cannot be written to `folder` from here."""
    probe = folder / f"probe-{rank}"
    try:
        folder.make()
        probe.write(b"dtron")
        folder.remove_files([probe.name])
    except OSError as error:
        raise UserError(
            f"no checkpoint can be written to {folder}: {error}; set job.dump_folder (or checkpoint.folder) to a "
            "folder that can be written to, or set checkpoint.enable = false"
        ) from None
