"""The front door: command line -> checked configuration -> process group -> Trainer.

With validation.only it is an Evaluation that runs in the Trainer's place. How a run ends in error: `ranks/failure.py`.
"""

import contextlib
import dataclasses
import logging
import os
import sys
import warnings

import torch.distributed as dist

from dtron import compat
from dtron.config import Config, HelpRequested, read, to_toml
from dtron.errors import UserError, quiet_broken_pipe
from dtron.observe.wandb_run import check_wandb
from dtron.ranks.control import Control, StopBeforeStartError
from dtron.ranks.failure import exit_on_signals, exit_with_message, exit_with_traceback
from dtron.ranks.logs import setup_logging
from dtron.ranks.world import World, compare_configs, join, start_process_group
from dtron.train.evaluate import Evaluation
from dtron.train.prediction import compare_with_prediction
from dtron.train.resolve import resolve
from dtron.train.setup import Setup
from dtron.train.trainer import Trainer

__all__ = ["main"]

log = logging.getLogger(__name__)


def main(
    argv: list[str] | None = None, trainer: type[Trainer] = Trainer, *, control_folder: str = "", command: str = ""
) -> None:
    """Train or evaluate as the command line says, and end the process: with 0 when done, another code on any error.

    trainer: a subclass of dtron's Trainer to train in its place. An evaluation has nothing of it: its loss is the one
    that training.loss names. control_folder: in place of job.control_folder. command: see `World`.
    """
    rank = int(os.environ.get("RANK", 0))
    setup_logging(rank)
    # Every rank of tensor parallel would warn of it: the embedding's result is a DTensor's local tensor, a view, and
    # nothing of dtron changes it in place.
    warnings.filterwarnings("ignore", r"FSDP2-wrapped module \(FSDPEmbedding\) returned a view", UserWarning)
    world: World | None = None
    exit_on_signals(rank, lambda: world, ": there was nothing to save; the same command starts again")
    argv = sys.argv[1:] if argv is None else argv
    # Known before the configuration is, which may be wrong.
    control = Control(rank, control_folder or _control_folder(argv))
    try:
        config, mistakes, notes = read(argv)
        setup_logging(rank, config.metrics.log_level)
        control = Control(rank, control_folder or config.job.control_folder)
        setup = resolve(config, int(os.environ.get("WORLD_SIZE", 1)), mistakes=mistakes)
        check_wandb(setup.config.metrics.enable_wandb)
        world = dataclasses.replace(join(rank, setup.config, control), command=command)
        compare_configs(world, config)
        _announce(world, setup.config, notes)
        start_process_group(world, setup.config, setup.device_type)
        try:
            running = _what_runs(setup, trainer)(setup, world)
            running.run()
            trained = running if isinstance(running, Trainer) else None
        except StopBeforeStartError as stop:
            trained = None
            log.info(stop)
        dist.destroy_process_group()
        if trained and rank == 0:
            compare_with_prediction(setup.config, trained)
        # Threads of the groups may still be ending; a process that tears down around them can abort after all is done.
        with contextlib.suppress(OSError, ValueError):  # a reader that has gone, a closed terminal
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(0)
    except HelpRequested as help_text:
        if rank == 0:
            with quiet_broken_pipe():
                print(help_text)
    except UserError as error:
        exit_with_message(rank, world, error, control)
    except BaseException as error:
        exit_with_traceback(rank, world, error, control)


def _control_folder(argv: list[str]) -> str | None:
    """The job.control_folder that a batch script gives on the command line."""
    words = [part for word in argv for part in word.split("=", 1)]
    options = [word.replace("-", "_") for word in words]
    at = options.index("__job.control_folder") + 1 if "__job.control_folder" in options else len(words)
    return os.path.expanduser(words[at]) if at < len(words) else None


def _what_runs(setup: Setup, trainer: type[Trainer]) -> type[Trainer | Evaluation]:
    return Evaluation if setup.config.validation.only else trainer


def _announce(world: World, config: Config, notes: list[str]) -> None:
    log.info(f"job: {config.job.description}")
    for note in notes if world.rank == 0 else []:
        log.warning(note)
    if config.job.print_config:
        log.info(to_toml(config))
    if world.rank == 0 and (line := compat.warn_about_torch_version()):
        log.warning(line)
