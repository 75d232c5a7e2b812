"""The moments at which a rank can be killed: functions of dtron and torch that tell, in a forked rank, when they run.

They are wrapped by name; a test fails with AttributeError once there is no such function any more.
"""

import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, filesystem

from dtron.checkpoint import save
from dtron.checkpoint.files import MANIFEST
from dtron.checkpoint.save import Saver
from dtron.checkpoint.storage import StoragePath
from dtron.train import report, start, trainer
from dtron.train.folder import DRAFT
from dtron.train.guard import StepGuard
from dtron.train.step import Step
from dtron.train.trainer import Trainer

__all__ = ["MOMENTS", "Moment", "wrap"]

Reached = Callable[[], None]


def wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Put `around(original, *arguments)` in the place of a function. For forked processes: nobody puts it back."""
    original = getattr(owner, name)
    setattr(owner, name, lambda *args, **kwargs: around(original, *args, **kwargs))


@dataclass(frozen=True)
class Moment:
    """`arm` makes a process call its argument at this moment, whenever it comes to it.

    `often`: how many times it may be let pass in a save, or between two. `rank_0`: no other rank comes to it.
    """

    name: str
    arm: Callable[[Reached], None]
    often: int = 1
    rank_0: bool = False


def before(owner: Any, name: str, often: int = 1, rank_0: bool = False, when: Any = lambda *args: True) -> Moment:
    def arm(reached: Reached) -> None:
        def around(original: Any, *args: Any, **kwargs: Any) -> Any:
            if when(*args):
                reached()
            return original(*args, **kwargs)

        wrap(owner, name, around)

    return Moment(f"before {name}", arm, often, rank_0)


def after(owner: Any, name: str, often: int = 1, rank_0: bool = False, when: Any = lambda *args: True) -> Moment:
    def arm(reached: Reached) -> None:
        def around(original: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            if when(*args):
                reached()
            return result

        wrap(owner, name, around)

    return Moment(f"after {name}", arm, often, rank_0)


def in_the_manifest(reached: Reached) -> None:
    """When half of it is written."""

    def around(original: Any, place: StoragePath, data: bytes) -> None:
        if place.name == MANIFEST:
            original(place, data[: len(data) // 2])
            reached()
        original(place, data)

    wrap(StoragePath, "write", around)


def in_the_removal(reached: Reached) -> None:
    """When the manifest of an old checkpoint and half of its files are gone."""

    def around(original: Any, place: StoragePath, names: list[str]) -> None:
        original(place, names[: (len(names) + 1) // 2])
        if MANIFEST in names:
            reached()
        original(place, names[(len(names) + 1) // 2 :])

    wrap(StoragePath, "remove_files", around)


def partial(place: StoragePath, *_: Any) -> bool:
    return ".partial-" in place.url


def going(place: StoragePath, *_: Any) -> bool:
    return place.url.endswith(".deleting")


def to_going(_: StoragePath, target: StoragePath) -> bool:
    return going(target)


def manifest(place: StoragePath, *_: Any) -> bool:
    return place.name == MANIFEST


def draft(path: Path, *_: Any) -> bool:
    return path.name == DRAFT


def busy(saver: Saver) -> bool:
    return saver.busy


WRITER = save._LocalWriter
MOMENTS: dict[str, list[Moment]] = {
    "start": [
        before(dist, "init_process_group"),
        before(trainer, "start_run"),
        after(start, "choose_run_folder", rank_0=True),
        after(start, "check_writable"),
        before(start, "clean", rank_0=True),
        after(trainer, "start_run"),
        before(trainer, "load_start"),
        after(FileSystemReader, "read_data"),
        after(trainer, "load_start"),
        before(report, "write_config", rank_0=True),
        before(os, "replace", rank_0=True, when=draft),
        before(report, "MetricsWriter", rank_0=True),
        after(trainer, "start_report"),
    ],
    "step": [
        before(Trainer, "train_step", often=6),
        after(Step, "_count_valid", often=6),
        after(Step, "_reduce", often=6),
        after(StepGuard, "watch", often=6),
        before(Trainer, "_log", often=6),
    ],
    "copy": [
        before(save._Copies, "take"),
        after(save._Copies, "_copy", often=50),
        before(Saver, "_write"),
    ],
    "write": [
        before(WRITER, "write_data"),
        before(filesystem, "_write_item", often=40),
        after(filesystem, "_write_item", often=40),
        after(FileSystemWriter, "write_data"),
    ],
    "sums": [
        before(StoragePath, "crc32", when=partial),
        after(StoragePath, "crc32", when=partial),
        after(WRITER, "write_data"),
        before(WRITER, "finish", rank_0=True),
    ],
    "manifest": [
        after(FileSystemWriter, "finish", rank_0=True),
        before(StoragePath, "write", rank_0=True, when=manifest),
        Moment("in write", in_the_manifest, rank_0=True),
        after(StoragePath, "write", rank_0=True, when=manifest),
    ],
    "rename": [
        before(StoragePath, "move", rank_0=True, when=partial),
        after(StoragePath, "move", rank_0=True, when=partial),
        after(WRITER, "finish", rank_0=True),
    ],
    "delete": [
        before(StoragePath, "move", rank_0=True, when=to_going),
        after(StoragePath, "move", rank_0=True, when=to_going),
        Moment("in remove_files", in_the_removal, rank_0=True),
        before(StoragePath, "remove", rank_0=True, when=going),
        after(save, "delete_old", rank_0=True),
    ],
    "wait": [
        before(Saver, "wait", when=busy),
        after(Saver, "wait"),
    ],
    "anywhere": [],  # at a random time, whatever the ranks are doing
}


def draw_moment(random: random.Random, phase: str) -> Moment | None:
    return random.choice(MOMENTS[phase]) if MOMENTS[phase] else None
