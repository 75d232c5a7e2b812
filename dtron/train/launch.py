"""The front door: command line -> checked configuration -> process group -> Trainer; and how a run ends in error.

A user's mistake is one message from rank 0; the other ranks wait for it, bounded, and stay silent. A
failure in training is told by the rank where it happened first; ranks that merely lost contact with
it are silent. Both reach torchrun's summary as the root cause.
"""

import json
import os
import sys
import time
import traceback
from dataclasses import dataclass
from datetime import timedelta
from typing import NoReturn

import torch
import torch.distributed as dist

from dtron import compat
from dtron.config import Config, HelpRequested, flatten, load
from dtron.errors import UserError
from dtron.train.setup import Setup, resolve

__all__ = ["World", "main"]

SILENT_WAIT_S = 15.0  # longer than torchrun needs to stop the others after the first rank has exited


@dataclass(frozen=True)
class World:
    """This process among the ranks; `store` is the rendezvous store they all reach."""

    rank: int
    local_rank: int
    size: int
    store: dist.Store

    def say(self, text: str) -> None:
        """Print on rank 0."""
        if self.rank == 0:
            print(text, flush=True)


def main(argv: list[str] | None = None) -> None:
    """Train as the command line says; exits the process with a non-zero code on any error."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    world: World | None = None
    try:
        config = load(sys.argv[1:] if argv is None else argv)
        setup = resolve(config, size)
        world = _join(rank, size, setup.config)
        _compare_configs(world, config)
        _start_process_group(world, setup)
        from dtron.train.trainer import Trainer

        Trainer(setup, world).run()
        dist.destroy_process_group()
    except HelpRequested as help_text:
        if rank == 0:
            print(help_text)
    except UserError as error:
        _exit_with_message(rank, error)
    except KeyboardInterrupt:
        os._exit(130)
    except BaseException as error:
        _exit_with_traceback(rank, world, error)


def _join(rank: int, size: int, config: Config) -> World:
    """Reach the rendezvous store. Without torchrun the run is one process of its own."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if "MASTER_ADDR" not in os.environ:
        return World(rank, local_rank, size, dist.HashStore())
    timeout = timedelta(seconds=config.comm.init_timeout_seconds)
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    # A run restarted by torchrun finds the old attempt's keys in the agent's store.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return World(rank, local_rank, size, dist.PrefixStore(f"dtron/{attempt}", store))


def _compare_configs(world: World, config: Config) -> None:
    """UserError on every rank if one has another configuration; ranks that disagree would hang or corrupt."""
    mine = {key: repr(value) for key, value in flatten(config).items()}
    if world.rank == 0:
        world.store.set("config", json.dumps(mine))
    theirs = json.loads(world.store.get("config"))
    if changed := [key for key in mine if theirs.get(key) != mine[key]]:
        key = changed[0]
        text = f"{key} is {mine[key]} on rank {world.rank} and {theirs.get(key)} on rank 0"
        world.store.compare_set("verdict", "", text)
    if world.store.add("compared", 1) == world.size:
        world.store.compare_set("verdict", "", "equal")
    if (verdict := world.store.get("verdict").decode()) != "equal":
        raise UserError(f"the ranks have different configurations: {verdict}; start all with one file and command line")


def _start_process_group(world: World, setup: Setup) -> None:
    c = setup.config
    if setup.device_type == "cuda":
        if world.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"local rank {world.local_rank} has no GPU: this machine has {torch.cuda.device_count()}; "
                "lower --nproc_per_node, or set training.device cpu"
            )
        torch.cuda.set_device(world.local_rank)
    if c.debug.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
        torch.use_deterministic_algorithms(True)
    # CPU offload reduces gradients and norms on the CPU, so a CUDA run has a gloo side too.
    backend = "cpu:gloo,cuda:nccl" if setup.device_type == "cuda" else "gloo"
    timeout = timedelta(seconds=c.comm.init_timeout_seconds)
    dist.init_process_group(backend, store=world.store, rank=world.rank, world_size=world.size, timeout=timeout)
    if line := compat.warn_about_torch_version():
        world.say(line)


def _exit_with_message(rank: int, error: UserError) -> NoReturn:
    """Rank 0 speaks. Another rank speaks only if rank 0 is still running after the wait: the mistake was its own."""
    if rank == 0:
        print(f"error: {error}", file=sys.stderr, flush=True)
        _tell_torchrun(error)
        os._exit(2)
    time.sleep(SILENT_WAIT_S)
    print(f"error on rank {rank}: {error}", file=sys.stderr, flush=True)
    _tell_torchrun(error)
    os._exit(2)


def _exit_with_traceback(rank: int, world: World | None, error: BaseException) -> NoReturn:
    """The first rank to fail prints its traceback and ends; the others fail because it did, and wait to be stopped."""
    mine = f"rank {rank}"
    first = mine
    if world is not None:
        try:
            first = world.store.compare_set("first_failure", "", mine).decode()
        except Exception:  # the store died with its host: this rank cannot know better
            first = mine
    if first == mine:
        print(traceback.format_exc(), file=sys.stderr)
        print(f"error on rank {rank}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        _tell_torchrun(error)
        os._exit(1)
    time.sleep(SILENT_WAIT_S)
    os._exit(1)


def _tell_torchrun(error: BaseException) -> None:
    """Write the error where torchrun's summary of root causes looks for it."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    handler = get_error_handler()
    handler.initialize()
    handler.record_exception(error)
