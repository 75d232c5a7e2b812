"""Where a run starts: its folder, the checkpoint it resumes from, its global batch, the weights it loads."""

import functools
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch

from dtron.checkpoint.files import Progress, clean, steps_in
from dtron.checkpoint.load import find_good, load, newest_without_state
from dtron.checkpoint.storage import StoragePath
from dtron.config import Config, replace
from dtron.errors import UserError
from dtron.parallel.compose import ParallelModel
from dtron.ranks.agree import from_rank_0, raise_first_problem, warn_on_rank_0
from dtron.ranks.world import World
from dtron.train.folder import (
    RunFolder,
    check_writable,
    checkpoint_folder,
    choose_run_folder,
    lock_run_folder,
    remove_unused,
    saves,
)
from dtron.train.initial import load_weights
from dtron.train.resolve import check_batch
from dtron.train.setup import Setup

__all__ = ["ResumePoint", "load_start", "resolve_global_batch", "start_run"]

log = logging.getLogger(__name__)

LONG_RUN_STEPS = 1000


@dataclass
class ResumePoint:
    """resume_from: the verified checkpoint to resume from, None for a fresh run; locks: held while they are open.

    changed: the keys that this attempt changes, of those that bear on the training or its speed.
    """

    run_folder: Path
    checkpoints: StoragePath
    resume_from: StoragePath | None
    progress: Progress
    locks: list[TextIO]
    changed: str


def start_run(setup: Setup, world: World) -> ResumePoint:
    """Choose the run folder and the newest good checkpoint in it. UserError on all ranks where that cannot be."""
    config, c = setup.config, setup.config.checkpoint
    locks: list[TextIO] = []
    folder = from_rank_0(lambda: _choose_and_lock(setup, locks))  # it alone looks, so that all agree
    if folder.message:
        log.info(folder.message)
    checkpoints = checkpoint_folder(c, folder.path)
    undo = functools.partial(remove_unused, folder.made, c) if folder.made else None
    world.control.start_run(folder.path, str(checkpoints), undo)
    if saves(c):
        raise_first_problem(_storage_problem(checkpoints, world))
    elif config.training.steps > LONG_RUN_STEPS and not c.enable:
        warn_on_rank_0(
            f"{config.training.steps} steps without checkpoints: a failure loses all of them; set checkpoint.enable = "
            "true"
        )
    manifest = find_good(checkpoints, c.load_step, not saves(c)) if c.enable else None
    progress = manifest.progress if manifest else Progress()
    if c.enable and _is_done(checkpoints, progress, config.training.steps):
        progress, manifest = Progress(step=config.training.steps), None
    elif saves(c):
        _check_later_steps(checkpoints, progress.step)
    progress.attempt = folder.attempt
    resume_from = checkpoints / f"step-{progress.step}" if manifest else None
    return ResumePoint(folder.path, checkpoints, resume_from, progress, locks, folder.changed)


def _choose_and_lock(setup: Setup, locks: list[TextIO]) -> RunFolder:
    """Choose the run's folder and lock it, and also the checkpoints' folder where that is elsewhere on this machine."""
    config = setup.config
    try:
        folder = choose_run_folder(config, setup.model_config)
        locks.append(lock_run_folder(folder.path))
        local = checkpoint_folder(config.checkpoint, folder.path).local
        if saves(config.checkpoint) and "://" in config.checkpoint.folder and local is not None:
            local.mkdir(parents=True, exist_ok=True)
            locks.append(lock_run_folder(local))
    except OSError as error:
        raise UserError(f"job.dump_folder {config.job.dump_folder}: {error}") from None
    return folder


def _is_done(checkpoints: StoragePath, progress: Progress, steps: int) -> bool:
    """Whether the run has ended with a checkpoint of its weights only. UserError if it is to resume from there."""
    last = from_rank_0(lambda: newest_without_state(checkpoints))
    if last is None or last <= progress.step:
        return False
    if last < steps:
        raise UserError(
            f"{checkpoints}/step-{last} ended this run and holds the weights only (checkpoint.last_save_model_only), "
            f"so a run with training.steps = {steps} cannot resume from it; start a run of its own from it, with "
            "another job.dump_folder and checkpoint.initial_load_path, or move it away to resume from the checkpoint "
            "before it"
        )
    return True


def _check_later_steps(checkpoints: StoragePath, step: int) -> None:
    """UserError if the run would later meet checkpoints that it did not come from."""
    if later := [later for later in from_rank_0(lambda: steps_in(checkpoints)) if later > step]:
        raise UserError(
            f"resuming from step {step} would later meet step {', '.join(map(str, later))} in {checkpoints}, and "
            "nothing is overwritten: move them away, or start a run of its own with another job.dump_folder and "
            f"checkpoint.initial_load_path = {checkpoints}/step-{step}"
        )


def _storage_problem(checkpoints: StoragePath, world: World) -> str:
    """Why this machine cannot write checkpoints, or empty."""
    if world.local_rank == 0:
        try:
            check_writable(checkpoints, world.rank)
            if world.rank == 0:
                clean(checkpoints)
        except UserError as error:
            return str(error)
    return ""


def resolve_global_batch(setup: Setup, start: ResumePoint) -> Config:
    """The configuration with the global batch of the run: given, recorded by the checkpoint, or local x dp.

    Notes batch and steps in the progress. UserError unless the batch is a whole number of local batches.
    """
    c, progress = setup.config, start.progress
    given, recorded, steps = c.training.global_batch_size, progress.global_batch_size, c.training.steps
    if start.resume_from:
        log.info("resuming from %s", start.resume_from)
        if given not in (-1, recorded):
            log.info("the global batch changes from %d to %d sequences, as configured", recorded, given)
        if steps != progress.steps and steps > progress.step and c.lr_scheduler.total_steps is None:
            log.info(
                "training.steps changes from %d to %d, and with it the learning rate from here on; "
                "lr_scheduler.total_steps = %d would keep it", progress.steps, steps, progress.steps,
            )  # fmt: skip
    wanted = recorded if given == -1 and start.resume_from else given
    source = " (the run's own, as its checkpoint records)" if wanted != given else ""
    progress.global_batch_size = check_batch(c, setup.degrees, wanted, source)
    progress.steps = steps
    return replace(c, "training.global_batch_size", progress.global_batch_size)


def load_start(start: ResumePoint, setup: Setup, model: ParallelModel, optimizers: list[torch.optim.Optimizer]) -> None:
    """Load the checkpoint that is resumed, or the weights that a fresh run is given, into this layout."""
    c = setup.config.checkpoint
    if start.resume_from:
        load(start.resume_from, model, optimizers)
    elif c.initial_load_path and start.progress.step == 0:
        load_weights(setup, model, None if c.initial_load_model_only else optimizers)
