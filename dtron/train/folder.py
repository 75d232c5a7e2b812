"""Which folder a run writes to: resumed where the same run left checkpoints, fresh otherwise, never overwritten."""

import contextlib
import dataclasses
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from dtron.checkpoint.files import holds_checkpoints
from dtron.checkpoint.load import check_source
from dtron.checkpoint.storage import StoragePath
from dtron.config import Config, load
from dtron.config.declare import ANOTHER_TRAINING, Changes
from dtron.config.keys import KEYS
from dtron.config.sections import Checkpoint, Model
from dtron.errors import UserError
from dtron.files import acquire_lock, modified_s, write_atomically
from dtron.models.hf import read_hf_config
from dtron.observe.metrics import last_row
from dtron.train.identity import differences, format_differences, run_identity

__all__ = [
    "LOCK",
    "RunFolder",
    "check_writable",
    "checkpoint_folder",
    "choose_run_folder",
    "lock_run_folder",
    "remove_unused",
    "saves",
    "write_config",
]


class InUseError(UserError):
    """Another run is in the folder; that passes."""

    kind = "busy"


LOCK = "run.lock"
DRAFT = "config.toml.partial"  # becomes an attempt's config.toml when it is whole
# All that is there before the first row of metrics.
LEFT_BY_START = {LOCK, DRAFT, "HEARTBEAT", "FAILED", "SAVED", "STOP"}
OPENED = {"config.toml", "metrics.jsonl"}
# What a resume logs and records when it has changed.
BEARING: tuple[Changes, ...] = ("speed", "losses", *ANOTHER_TRAINING)


@dataclasses.dataclass
class RunFolder:
    """A run's folder and the number of this attempt.

    resumes: it holds checkpoints. message: a line for the user. changed: the keys that a resume changes, for the
    record. made: the folders that this attempt made, innermost first.
    """

    path: Path
    attempt: int
    resumes: bool
    message: str = ""
    changed: str = ""
    made: list[Path] = dataclasses.field(default_factory=list)


def checkpoint_folder(config: Checkpoint, run_folder: Path) -> StoragePath:
    """Where a run's checkpoints are: in its folder, or under a URL in a folder of the same name."""
    if "://" in config.folder:
        return StoragePath.at(config.folder) / run_folder.name
    return StoragePath.at(run_folder / config.folder)


def choose_run_folder(config: Config, model_config: Any) -> RunFolder:
    """The run's folder: one where the same run left checkpoints or had not come to its first, or a new one, made here.

    UserError where checkpoint.load_step names a step and there is no such run, and where checkpoint.resume_run names
    what this configuration cannot continue.
    """
    c, parent = config.checkpoint, Path(config.job.dump_folder)
    if c.resume_run:
        return _named_run(config, model_config, Path(c.resume_run))
    identity, title = run_identity(config, model_config), _title(config.model)
    stem = f"{title}-{identity}"
    gone = ""
    if c.enable:
        # With hf_config_path the runs of an earlier version are named by a family and flavor that they are not of.
        titles = f"{title}-", f"{config.model.name}-{config.model.flavor}-"
        there = parent.glob("*") if parent.is_dir() else []
        alike = [folder for folder in there if folder.name.startswith(titles) or _is_named(folder.name, identity)]
        local = sorted(alike, key=modified_s, reverse=True)
        local.sort(key=lambda p: not _is_named(p.name, identity))
        remote = StoragePath.at(c.folder).names() if "://" in c.folder else []
        for folder in (*local, *(parent / name for name in remote if _is_named(name, identity))):
            if holds_checkpoints(checkpoint_folder(c, folder)) and _is_same_training(config, folder, identity):
                return _resumed(config, folder)
        gone = _what_is_gone([folder for folder in local if _is_same_training(config, folder, identity)], c)
    if c.initial_load_path:  # a resume needs it no more
        check_source(StoragePath.at(c.initial_load_path))
    if c.enable:
        for folder in local:
            if _is_named(folder.name, identity) and _has_saved_nothing(folder, c):
                return RunFolder(folder, _attempt(folder), False, gone or _not_resumed(config, folder))
        if c.load_step != -1:
            raise UserError(
                f"no run of this model, data and optimizer in {parent} has a checkpoint of step {c.load_step} "
                "with optimizer state; set checkpoint.load_step to one that is there, or -1 for the newest"
            )
    number = 1
    while True:
        folder = parent / (stem if number == 1 else f"{stem}-{number}")
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
            continue
        beside = "" if number == 1 else _beside(config, parent / stem, folder)
        return RunFolder(folder, 1, False, gone or _not_resumed(config, folder) or beside, made=made)


def _title(model: Model) -> str:
    """The model in a run's name: its family and flavor, or of a config.json of Hugging Face, whose model it is.

    That is the name of its folder, or its model_type where the folder's name is no model's.
    """
    if not model.hf_config_path:
        return f"{model.name}-{model.flavor}"
    path = Path(os.path.abspath(model.hf_config_path))
    if path.is_file():
        path = path.parent if path.name == "config.json" else path.with_suffix("")
    hub = [part.rpartition("--")[2] for part in path.parts if part.startswith("models--")]  # of its cache
    name = re.sub(r"[^\w.-]+", "-", hub[-1] if hub else path.name).strip("-.")
    if not name or re.fullmatch(r"hf|model|checkpoint|step-\d+", name):
        name = str(read_hf_config(model.hf_config_path)[0]["model_type"])
    return name


def _is_named(name: str, identity: str) -> bool:
    """Whether a folder of this name is of the training with this identity."""
    return re.fullmatch(rf".+-{identity}(-\d+)?", name) is not None


def _resumed(config: Config, folder: Path) -> RunFolder:
    folder.mkdir(parents=True, exist_ok=True)  # the checkpoints may be elsewhere
    before = last_config(folder)
    changed = format_differences(differences(config, before, BEARING), len(KEYS)) if before else ""
    message = f"changed since the last attempt: {changed}" if changed else ""
    return RunFolder(folder, _attempt(folder), True, message, changed)


def _named_run(config: Config, model_config: Any, folder: Path) -> RunFolder:
    """The run that checkpoint.resume_run names. UserError unless this configuration can continue it."""
    key = f"checkpoint.resume_run {folder}"
    if not (before := last_config(folder)):
        raise UserError(f"{key} is no run folder: it has no config.toml; name one, such as outputs/NAME")
    if not holds_checkpoints(checkpoint_folder(config.checkpoint, folder)):
        raise UserError(f"{key} has no checkpoint to continue from; leave the key out to start a run of its own")
    named = _is_named(folder.name, run_identity(config, model_config))
    fixed: tuple[Changes, ...] = ("training",) if named else ("training", "dimensions")
    if found := differences(config, before, fixed):
        raise UserError(
            f"{key} is of another training: {format_differences(found)}; a run continues with another optimizer.lr or "
            "other settings of optimizer, schedule and clipping, or with its data elsewhere, but not with these: set "
            "them back, or leave checkpoint.resume_run out to start a run of its own"
        )
    return _resumed(config, folder)


def _is_same_training(config: Config, folder: Path, identity: str) -> bool:
    """Whether the last attempt there was of this very training; by its name alone where it left no configuration.

    The name vouches for the dimensions, which may be spelled otherwise. A run that was continued with other
    hyperparameters keeps the name of its first ones.
    """
    before, named = last_config(folder), _is_named(folder.name, identity)
    if before is None:
        return named
    return not differences(config, before, [kind for kind in ANOTHER_TRAINING if not named or kind != "dimensions"])


def _what_is_gone(folders: Sequence[Path], c: Checkpoint) -> str:
    """A line about the checkpoints that this run has saved, as its metrics say, and that are gone; empty where none is.

    UserError unless checkpoint.allow_restart: the run would start over, and its user wants a resume.
    """
    for folder in folders:
        if saved := last_row(folder / "metrics.jsonl", "checkpoint_save_s"):
            gone = (
                f"{folder} has saved checkpoints, the last one of step {saved['step']}, and none is left in "
                f"{checkpoint_folder(c, folder)}"
            )
            if c.allow_restart:
                return f"beginning again at step 1, as checkpoint.allow_restart allows: {gone}"
            raise UserError(
                f"{gone}: bring them back, or name where they are in checkpoint.folder; to begin again at step 1, set "
                "checkpoint.allow_restart = true"
            )
    return ""


def _attempt(folder: Path) -> int:
    return 1 + len(list(folder.glob("config*.toml")))


def write_config(folder: Path, attempt: int, text: str) -> Path:
    """Keep the resolved configuration of an attempt: the first one's is config.toml, which a resume never overwrites.

    A kill leaves no half of it, which would be taken for another run's. Returns its path.
    """
    path = folder / ("config.toml" if attempt == 1 else f"config-attempt-{attempt}.toml")
    write_atomically(path, text)
    return path


def last_config(folder: Path) -> Config | None:
    """The configuration of the newest attempt in a run folder; None if there is none, or it is of another version."""
    later = sorted(folder.glob("config-attempt-*.toml"), key=lambda p: int(re.sub(r"\D", "", p.stem) or 0))
    return _read(later[-1] if later else folder / "config.toml")


def _has_saved_nothing(folder: Path, own: Checkpoint) -> bool:
    """Whether a run with checkpoints ended here before its first one: the same run may start in this folder again."""
    text = folder / "config.toml"
    if not folder.is_dir():
        return False
    if not text.is_file():  # it ended while it started
        foreign = set(os.listdir(folder)) - {*LEFT_BY_START, own.folder.split("/")[0]}
        return not foreign and not holds_checkpoints(checkpoint_folder(own, folder))
    theirs = _read(text)
    return (
        theirs is not None
        and saves(theirs.checkpoint)
        and not holds_checkpoints(checkpoint_folder(theirs.checkpoint, folder))
    )


def remove_unused(made: Sequence[Path], own: Checkpoint) -> None:
    """Remove the run folder of a refused start, and what was made above it, unless anything else was written there.

    made: the folders, innermost first.
    """
    with contextlib.suppress(OSError):  # somebody put a file there, or was faster
        checkpoints = checkpoint_folder(own, made[0]).local
        if checkpoints and checkpoints.is_dir() and "://" not in own.folder:
            for folder in (checkpoints, *checkpoints.parents[: own.folder.count("/")]):
                folder.rmdir()
        rows = made[0] / "metrics.jsonl"
        begun = rows.exists() and rows.stat().st_size > 0
        if set(os.listdir(made[0])) <= LEFT_BY_START | (set() if begun else OPENED):
            for name in os.listdir(made[0]):
                (made[0] / name).unlink()
            for folder in made:
                folder.rmdir()


def saves(config: Checkpoint) -> bool:
    """Whether a run writes checkpoints."""
    return config.enable and not config.load_only


def _not_resumed(config: Config, folder: Path) -> str:
    """A line that names the keys in which this run differs from the most like one that could have been resumed."""
    if not config.checkpoint.enable:
        return ""
    found = []
    for other in folder.parent.glob("*/config.toml"):
        theirs = last_config(other.parent)
        if theirs and other.parent != folder and holds_checkpoints(checkpoint_folder(theirs.checkpoint, other.parent)):
            found.append((differences(config, theirs, ANOTHER_TRAINING), other.parent))
    if not found:
        return ""
    keys, other_folder = min(found, key=lambda pair: len(pair[0]))
    can = bool(keys) and all(difference.changes in ("hyperparameters", "location") for difference in keys)
    hint = f"; checkpoint.resume_run = {other_folder} would continue that one with these values" if can else ""
    return (
        f"a run of its own, not a resume of {other_folder}, from which it differs in "
        f"{format_differences(keys) or 'the model or its files'}{hint}"
    )


def _beside(config: Config, first: Path, folder: Path) -> str:
    """Why the same training again has a folder of its own."""
    why = "checkpoint.enable is false" if not config.checkpoint.enable else "an earlier run there saved no checkpoint"
    return f"{first} is of an earlier run, which is not resumed ({why}): this one is in {folder}"


def _read(path: Path) -> Config | None:
    try:
        return load(["--job.config_file", str(path)])
    except UserError:
        return None  # of another version


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
