"""Where a run begins: its folder, the checkpoint it goes on from, and the weights it starts with."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
import torch.distributed as dist

from dtron.checkpoint.files import Progress, clean, steps_in
from dtron.checkpoint.load import check_excluded, find_good, from_rank_0, load, load_initial, newest_without_state
from dtron.checkpoint.place import Place
from dtron.errors import UserError
from dtron.models.spec import meta_model
from dtron.parallel.compose import ParallelModel
from dtron.train.folder import check_writable, checkpoint_place, choose_run_folder, hold, saves
from dtron.train.launch import World
from dtron.train.setup import Setup

__all__ = ["Begun", "begin", "load_begun", "load_weights"]

LONG_RUN_STEPS = 1000


@dataclass
class Begun:
    """`resume_from`: the verified checkpoint to go on from, None for a fresh run; `lock`: held while it is open."""

    run_folder: Path
    checkpoints: Place
    resume_from: Place | None
    progress: Progress
    lock: list[TextIO]


def begin(setup: Setup, world: World) -> Begun:
    """Choose the run folder and the newest good checkpoint in it. UserError on all ranks where that cannot be."""
    config = setup.config
    chosen: list[Any] = [None]
    lock: list[TextIO] = []
    if world.rank == 0:  # it alone looks, so that all agree
        try:
            folder = choose_run_folder(config, setup.model_config)
            lock = [hold(folder.path)]
            place = checkpoint_place(config.checkpoint, folder.path).local
            if saves(config.checkpoint) and "://" in config.checkpoint.folder and place is not None:
                place.mkdir(parents=True, exist_ok=True)
                lock.append(hold(place))
            chosen = [folder]
        except (OSError, UserError) as error:
            given = f"job.dump_folder {config.job.dump_folder}: "
            chosen = [error if isinstance(error, UserError) else UserError(f"{given}{error}")]
    dist.broadcast_object_list(chosen)
    if isinstance(chosen[0], UserError):
        raise chosen[0]
    folder = chosen[0]
    if folder.told:
        world.say(folder.told)
    checkpoints = checkpoint_place(config.checkpoint, folder.path)
    world.control.begin(folder.path, str(checkpoints))
    if saves(config.checkpoint):
        _check_storage(checkpoints, world)
    elif config.training.steps > LONG_RUN_STEPS and not config.checkpoint.enable:
        world.say(
            f"warning: {config.training.steps} steps without checkpoints: a failure loses all of them; "
            "set checkpoint.enable = true"
        )
    manifest = None
    if config.checkpoint.enable:
        manifest = find_good(checkpoints, config.checkpoint.load_step, not saves(config.checkpoint), world.say)
    progress = manifest.progress if manifest else Progress()
    if config.checkpoint.enable and _is_done(checkpoints, progress, config.training.steps):
        progress, manifest = Progress(step=config.training.steps), None
    elif saves(config.checkpoint):
        _check_way(checkpoints, progress.step)
    progress.attempt = folder.attempt
    resume_from = checkpoints / f"step-{progress.step}" if manifest else None
    return Begun(folder.path, checkpoints, resume_from, progress, lock)


def _is_done(checkpoints: Place, progress: Progress, steps: int) -> bool:
    """Whether the run has ended with a checkpoint of its weights only. UserError if it is to go on from there."""
    last = from_rank_0(lambda: newest_without_state(checkpoints))
    if last is None or last <= progress.step:
        return False
    if last < steps:
        raise UserError(
            f"{checkpoints}/step-{last} ended this run and holds the weights only (checkpoint.last_save_model_only), "
            f"so training.steps = {steps} cannot go on from it; begin a run of its own from it, with another "
            "job.dump_folder and checkpoint.initial_load_path, or move it away to go on from the checkpoint before it"
        )
    return True


def _check_way(checkpoints: Place, step: int) -> None:
    """UserError if the run would later meet checkpoints that it did not come from."""
    if later := [later for later in from_rank_0(lambda: steps_in(checkpoints)) if later > step]:
        raise UserError(
            f"going on from step {step} would later meet step {', '.join(map(str, later))} in {checkpoints}, and "
            "nothing is overwritten: move them away, or start a run of its own with another job.dump_folder and "
            f"checkpoint.initial_load_path = {checkpoints}/step-{step}"
        )


def _check_storage(checkpoints: Place, world: World) -> None:
    """UserError on all ranks if some machine cannot write checkpoints."""
    problem = ""
    if world.local_rank == 0:
        try:
            check_writable(checkpoints, world.rank)
            if world.rank == 0:
                clean(checkpoints)
        except UserError as error:
            problem = str(error)
    problems = [""] * world.size
    dist.all_gather_object(problems, problem)
    if found := next(filter(None, problems), ""):
        raise UserError(found)


def load_begun(
    begun: Begun, setup: Setup, model: ParallelModel, optimizers: list[torch.optim.Optimizer], world: World
) -> None:
    """Load the checkpoint that is resumed, or the weights that a fresh run is given, into this layout."""
    c = setup.config.checkpoint
    if begun.resume_from:
        load(begun.resume_from, model, optimizers)
    elif c.initial_load_path and begun.progress.step == 0:
        load_weights(setup, model, None if c.initial_load_model_only else optimizers, world)


def load_weights(
    setup: Setup, model: ParallelModel, optimizers: list[torch.optim.Optimizer] | None, world: World
) -> None:
    """Load checkpoint.initial_load_path, its optimizer state too unless None. UserError on all ranks if it is unfit."""
    c = setup.config.checkpoint
    assert c.initial_load_path is not None
    place = Place.at(c.initial_load_path)
    whole = meta_model(setup.spec, setup.model_config)
    check_excluded(c.exclude_from_loading, [name for name, _ in whole.named_parameters()])
    heads = setup.model_config.n_heads, setup.model_config.n_kv_heads
    load_initial(place, model, optimizers, c.exclude_from_loading, whole, heads)
    world.say(f"weights from {place}")
