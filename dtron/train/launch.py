"""The front door: command line -> checked configuration -> process group -> Trainer; and how a run ends in error.

With validation.only it is an Evaluation that runs in the Trainer's place.

A user's mistake is one message from rank 0; the other ranks wait for it, bounded, and stay silent. A
failure in training is told by the rank where it happened first; ranks that merely lost contact with
it are silent. Both reach torchrun's summary as the root cause.
"""

import json
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
import uuid
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

import torch
import torch.distributed as dist

from dtron import compat
from dtron.config import Config, HelpRequested, flatten, load, to_toml
from dtron.errors import UserError, quiet_broken_pipe
from dtron.train.control import Control
from dtron.train.setup import Setup, resolve
from dtron.train.signals import StopRequest

if TYPE_CHECKING:
    from dtron.train.evaluate import Evaluation
    from dtron.train.trainer import Trainer

__all__ = [
    "FIRST_FAILURE",
    "KILLED_WAIT_S",
    "SILENT_WAIT_S",
    "LostContactError",
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
STORE_WAIT_S = 5.0  # for an answer of the rendezvous store
KILLED_WAIT_S = 2.0  # longer than torchrun needs to notice a rank that was killed
ATTEMPT = "dtron_attempt"  # the key of the store that holds the name of the newest attempt
FIRST_FAILURE = "first_failure"  # the key of the store that holds who failed first


class AbsentRanksError(UserError):
    """Some ranks did not come to the start. No mistake in the input: another machine may be down."""

    kind = "lost"


class LostContactError(RuntimeError):
    """A rank failed because others had gone, and nobody stopped it."""

    kind = "lost"


@dataclass(frozen=True)
class World:
    """This process among the ranks; `store`: of the rendezvous, which all reach; `stop`: signals that reached it;
    `control`: files by which it is followed and stopped.
    """

    rank: int
    local_rank: int
    size: int
    store: dist.Store
    stop: StopRequest = field(default_factory=StopRequest)
    control: Control = field(default_factory=Control)

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
    control = Control(rank)
    try:
        config = load(sys.argv[1:] if argv is None else argv)
        control = Control(rank, config.job.control_folder)
        setup = resolve(config, int(os.environ.get("WORLD_SIZE", 1)))
        world = join(rank, setup.config, control)
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
            with quiet_broken_pipe():
                print(help_text)
    except UserError as error:
        exit_with_message(rank, world, error, control)
    except BaseException as error:
        exit_with_traceback(rank, world, error, control)


def _what_runs(setup: Setup, trainer: "type[Trainer] | None") -> "type[Trainer | Evaluation]":
    from dtron.train.evaluate import Evaluation  # these import this module's World
    from dtron.train.trainer import Trainer

    return Evaluation if setup.config.validation.only else trainer or Trainer


def join(rank: int, config: Config, control: Control | None = None) -> World:
    """Reach the rendezvous store. Without torchrun the run is one process of its own."""
    local_rank, control = int(os.environ.get("LOCAL_RANK", 0)), control or Control()
    if "MASTER_ADDR" not in os.environ:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise UserError(
                f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but MASTER_ADDR is not set, so the ranks cannot meet; "
                "start them with torchrun, or set MASTER_ADDR and MASTER_PORT"
            )
        return World(rank, local_rank, 1, dist.HashStore(), control=control)
    timeout = timedelta(seconds=config.comm.init_timeout_seconds)
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    together = _meet(rank, size, store, config.comm.init_timeout_seconds)
    return World(rank, local_rank, size, together, control=control)


def _meet(rank: int, size: int, store: dist.Store, longest_s: float) -> dist.Store:
    """Wait until all ranks of this attempt are there; the part of the store that is theirs alone.

    The agent's store holds what earlier attempts left. torchrun's count of restarts does not tell attempts apart: each
    machine counts its own, and one that starts again only because another did counts nothing. So rank 0 makes up a
    name. A rank that finds the name of an earlier attempt comes too late for it, or waits in vain: rank 0 is no longer
    there to begin. Either way it waits for the next name.
    """
    name, came, last = "", 0, time.monotonic() + longest_s
    if rank == 0:
        name = uuid.uuid4().hex
        store.set(ATTEMPT, name)
    while time.monotonic() < last:
        if rank == 0:
            came = store.add(f"{name}/{size}/came", 0)
            if came == size - 1:
                store.set(f"{name}/{size}/begin", "")
                return dist.PrefixStore(f"dtron/{name}", store)
        elif store.check([ATTEMPT]) and (newest := store.get(ATTEMPT).decode()) != name:
            name = newest
            came = store.add(f"{name}/{size}/came", 1)
        elif name and came < size and store.check([f"{name}/{size}/begin"]):
            return dist.PrefixStore(f"dtron/{name}", store)
        time.sleep(max(0.02, size / 10_000))  # the one store stands 10,000 requests a second
    missing = f"{size - 1 - came} of {size} ranks have" if rank == 0 else "rank 0 has"
    raise AbsentRanksError(
        f"{missing} not come within comm.init_timeout_seconds = {longest_s:g}; look at what the other machines "
        "printed, start the same command on all of them, and raise the limit if some are slow to start"
    )


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


def exit_with_message(rank: int, world: World | None, error: UserError, control: Control | None = None) -> NoReturn:
    """Rank 0 speaks. Another rank speaks only if rank 0 is still there after the wait: the mistake was its own."""
    StopRequest().disarm()  # torchrun is to stop the waiting at once
    _first_to_fail(rank, world)  # ranks that lose contact with this one are to be silent
    where = ""
    if rank != 0:
        time.sleep(SILENT_WAIT_S)
        if not _rank_0_is_there():
            os._exit(2)
        where = f" on rank {rank}"
    print(f"error{where}: {error}", file=sys.stderr, flush=True)
    if control:
        control.failed(error)
    error.__cause__, error.__suppress_context__ = None, True  # the summary, too, has the message only
    tell_torchrun(error.with_traceback(None))
    os._exit(2)


def exit_with_traceback(
    rank: int, world: World | None, error: BaseException, control: Control | None = None
) -> NoReturn:
    """The first rank to fail prints its traceback and ends; the others fail because it did, and wait to be stopped.

    One that was told to stop before it failed waits for nothing: it will not be told again, and ranks that wait for it
    in a collective fail only when it has ended.
    """
    told_to_stop = world is not None and world.stop.asked
    StopRequest().disarm()
    first = _first_to_fail(rank, world)
    if first == f"rank {rank}":
        if control:
            control.failed(error)
        # A rank that was killed could not say that it was first. torchrun stops this one before it takes the blame.
        time.sleep(0.0 if told_to_stop else KILLED_WAIT_S)
        print(traceback.format_exc(), file=sys.stderr)
        print(f"error on rank {rank}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        tell_torchrun(error)
    elif not told_to_stop:
        time.sleep(SILENT_WAIT_S)
        if first and world is not None and int(os.environ.get("LOCAL_WORLD_SIZE", world.size)) == world.size:
            os._exit(1)  # on the one machine there is, the first has the word
        # The torchrun of this machine has not stopped it, so the cause is not on this machine, or is its network.
        where = f"{first} ended first and says why" if first else "nor can the rendezvous store be reached"
        lost = LostContactError(f"rank {rank} lost contact with the others, {where}: {type(error).__name__}: {error}")
        print(f"error: {lost}", file=sys.stderr, flush=True)
        if control:
            control.failed(lost)
        tell_torchrun(lost)
    os._exit(1)


def _first_to_fail(rank: int, world: World | None) -> str:
    """The first rank that failed, as the store remembers; this one, if it remembers none. Empty if it is out of reach:

    gone, with rank 0 or torchrun, or cut off, and then a request waits for minutes.
    """
    mine, answers = f"rank {rank}", queue.SimpleQueue[str]()
    if world is None:
        return mine

    def ask() -> None:
        with suppress(RuntimeError):  # torch's own errors of a lost store derive from it
            answers.put(world.store.compare_set(FIRST_FAILURE, "", mine).decode())
            return
        answers.put("")

    threading.Thread(target=ask, daemon=True).start()
    try:
        return answers.get(timeout=STORE_WAIT_S)
    except queue.Empty:
        return ""


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
