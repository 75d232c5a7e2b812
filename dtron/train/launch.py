"""The front door: command line -> checked configuration -> process group -> Trainer; and how a run ends in error.

With validation.only it is an Evaluation that runs in the Trainer's place.

A user's mistake is one message from rank 0; the other ranks wait for it, bounded, and stay silent. A
failure in training is told by the rank where it happened first; ranks that merely lost contact with
it are silent. Both reach torchrun's summary as the root cause.
"""

import json
import os
import signal
import socket
import sys
import time
import traceback
from dataclasses import dataclass, field
from datetime import timedelta
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

import torch
import torch.distributed as dist

from dtron import compat
from dtron.config import Config, HelpRequested, flatten, load, to_toml
from dtron.errors import UserError
from dtron.train.setup import Setup, resolve
from dtron.train.signals import StopRequest

if TYPE_CHECKING:
    from dtron.train.evaluate import Evaluation
    from dtron.train.trainer import Trainer

__all__ = [
    "FIRST_FAILURE",
    "KILLED_WAIT_S",
    "World",
    "check_gpu",
    "compare_configs",
    "exit_when_interrupted",
    "exit_with_message",
    "exit_with_traceback",
    "join",
    "main",
    "start_process_group",
    "tell_torchrun",
    "wait_until_all_know",
]

SILENT_WAIT_S = 15.0  # longer than torchrun needs to stop the others after the first rank has exited
KILLED_WAIT_S = 2.0  # longer than torchrun needs to notice a rank that was killed
FIRST_FAILURE = "first_failure"  # the key of the store that holds who failed first


@dataclass(frozen=True)
class World:
    """This process among the ranks; `store` is the rendezvous store they all reach; `stop`: signals that reached it."""

    rank: int
    local_rank: int
    size: int
    store: dist.Store
    stop: StopRequest = field(default_factory=StopRequest)

    def say(self, text: str) -> None:
        """Print on rank 0."""
        if self.rank == 0:
            print(text, flush=True)


def main(argv: list[str] | None = None, trainer: "type[Trainer] | None" = None) -> None:
    """Train or evaluate as the command line says, and end the process: with 0 when done, another code on any error.

    trainer: a subclass of dtron's Trainer to train in its place. An evaluation has nothing of it: its loss is the one
    that training.loss names.
    """
    rank = int(os.environ.get("RANK", 0))
    signal.signal(signal.SIGINT, exit_when_interrupted)
    world: World | None = None
    try:
        config = load(sys.argv[1:] if argv is None else argv)
        setup = resolve(config, int(os.environ.get("WORLD_SIZE", 1)))
        world = join(rank, setup.config)
        compare_configs(world, config)
        _announce(world, setup.config)
        start_process_group(world, setup.config, setup.device_type)
        _what_runs(setup, trainer)(setup, world).run()
        dist.destroy_process_group()
        # Threads of the groups may still be ending; a process that tears down around them can abort after all is done.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    except HelpRequested as help_text:
        if rank == 0:
            print(help_text)
    except UserError as error:
        exit_with_message(rank, world, error)
    except BaseException as error:
        exit_with_traceback(rank, world, error)


def _what_runs(setup: Setup, trainer: "type[Trainer] | None") -> "type[Trainer | Evaluation]":
    from dtron.train.evaluate import Evaluation  # these import this module's World
    from dtron.train.trainer import Trainer

    return Evaluation if setup.config.validation.only else trainer or Trainer


def join(rank: int, config: Config) -> World:
    """Reach the rendezvous store. Without torchrun the run is one process of its own."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if "MASTER_ADDR" not in os.environ:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise UserError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but MASTER_ADDR is not set, so the ranks cannot meet; "
                "start them with torchrun, or set MASTER_ADDR and MASTER_PORT"
            )
        return World(rank, local_rank, 1, dist.HashStore())
    timeout = timedelta(seconds=config.comm.init_timeout_seconds)
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    # A run restarted by torchrun finds the old attempt's keys in the agent's store.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return World(rank, local_rank, size, dist.PrefixStore(f"dtron/{attempt}", store))


def compare_configs(world: World, config: Config) -> None:
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
        wait_until_all_know(world)
        raise UserError(f"the ranks have different configurations: {verdict}; start all with one file and command line")


def wait_until_all_know(world: World) -> None:
    """Without torchrun the store lives in rank 0, which must not end before the others have read the verdict."""
    known, end = world.store.add("known", 1), time.monotonic() + SILENT_WAIT_S
    while world.rank == 0 and known < world.size and time.monotonic() < end:
        time.sleep(0.05)
        known = world.store.add("known", 0)


def _announce(world: World, config: Config) -> None:
    world.say(f"job: {config.job.description}")
    if config.job.print_config:
        world.say(to_toml(config))
    if line := compat.warn_about_torch_version():
        world.say(line)


def check_gpu(local_rank: int) -> None:
    """UserError if there are more ranks on this machine than GPUs."""
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"local rank {local_rank} has no GPU: this machine has {torch.cuda.device_count()}; "
            "lower --nproc_per_node, or set training.device cpu"
        )


def start_process_group(world: World, c: Config, device_type: str) -> None:
    """Make the group of all ranks, whose waits end after comm.init_timeout_seconds. UserError if a GPU is missing."""
    if device_type == "cuda":
        check_gpu(world.local_rank)
        torch.cuda.set_device(world.local_rank)
    if c.debug.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
        torch.use_deterministic_algorithms(True)
    # CPU offload reduces gradients and norms on the CPU, so a CUDA run has a gloo side too.
    backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
    timeout = timedelta(seconds=c.comm.init_timeout_seconds)
    if world.size > 1:
        compat.start_flight_recorder(c.comm.trace_buf_size)
    dist.init_process_group(backend, store=world.store, rank=world.rank, world_size=world.size, timeout=timeout)


def exit_when_interrupted(signum: int, frame: FrameType | None) -> NoReturn:
    """Ctrl-C, passed on by torchrun. Not a KeyboardInterrupt, which would come up in the middle of any other error."""
    if os.environ.get("RANK", "0") == "0":
        print("interrupted", file=sys.stderr, flush=True)
    os._exit(128 + signum)


def exit_with_message(rank: int, world: World | None, error: UserError) -> NoReturn:
    """Rank 0 speaks. Another rank speaks only if rank 0 is still there after the wait: the mistake was its own."""
    StopRequest().disarm()  # torchrun is to stop the waiting at once
    _is_first_to_fail(rank, world)  # ranks that lose contact with this one are to be silent
    where = ""
    if rank != 0:
        time.sleep(SILENT_WAIT_S)
        if not _rank_0_is_there():
            os._exit(2)
        where = f" on rank {rank}"
    print(f"error{where}: {error}", file=sys.stderr, flush=True)
    error.__cause__, error.__suppress_context__ = None, True  # the summary, too, has the message only
    tell_torchrun(error.with_traceback(None))
    os._exit(2)


def exit_with_traceback(rank: int, world: World | None, error: BaseException) -> NoReturn:
    """The first rank to fail prints its traceback and ends; the others fail because it did, and wait to be stopped.

    One that was told to stop before it failed waits for nothing: it will not be told again, and ranks that wait for it
    in a collective fail only when it has ended.
    """
    told_to_stop = world is not None and world.stop.asked
    StopRequest().disarm()
    if _is_first_to_fail(rank, world):
        # A rank that was killed could not say that it was first. torchrun stops this one before it takes the blame.
        time.sleep(0.0 if told_to_stop else KILLED_WAIT_S)
        print(traceback.format_exc(), file=sys.stderr)
        print(f"error on rank {rank}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        tell_torchrun(error)
        os._exit(1)
    time.sleep(0.0 if told_to_stop else SILENT_WAIT_S)
    os._exit(1)


def _is_first_to_fail(rank: int, world: World | None) -> bool:
    """Ask the store, which remembers the first rank that did. False if it is gone, and with it rank 0 or torchrun."""
    if world is None:
        return True
    mine = f"rank {rank}"
    try:
        return world.store.compare_set(FIRST_FAILURE, "", mine).decode() == mine
    except RuntimeError:  # torch's own errors of a lost store derive from it
        return False


def _rank_0_is_there() -> bool:
    """Whether the rendezvous store can be reached: it lives in rank 0, or in torchrun, which ends us with rank 0."""
    try:
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        socket.create_connection(address, timeout=5).close()
    except (KeyError, OSError):
        return False
    return True


def tell_torchrun(error: BaseException) -> None:
    """Write the error where torchrun's summary of root causes looks for it."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    handler = get_error_handler()
    handler.initialize()
    handler.record_exception(error)
