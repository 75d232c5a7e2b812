"""This process among the ranks of a run: meeting the others, comparing configurations, starting the process group."""

import json
import os
import time
import uuid
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from dtron import compat
from dtron.config import Config, flatten
from dtron.errors import UserError
from dtron.ranks.control import Control, StopRequest

__all__ = [
    "AbsentRanksError",
    "SILENT_WAIT_S",
    "World",
    "check_gpu",
    "compare_configs",
    "join",
    "start_process_group",
    "wait_until_all_know",
]

SILENT_WAIT_S = 15.0  # longer than torchrun needs to stop the others after the first rank has exited
ATTEMPT = "dtron_attempt"  # the key of the store that holds the name of the newest attempt


class AbsentRanksError(UserError):
    """Some ranks did not come to the start. No mistake in the input: another machine may be down."""

    kind = "lost"


@dataclass(frozen=True)
class World:
    """This process among the ranks.

    store: of the rendezvous, which all ranks reach. stop: signals that reached this process. control: files by which
    the run is followed and stopped. command: what starts the run again; empty: this process's command line.
    """

    rank: int
    local_rank: int
    size: int
    store: dist.Store
    stop: StopRequest = field(default_factory=StopRequest)
    control: Control = field(default_factory=Control)
    command: str = ""


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

    The agent's store holds what earlier attempts left. torchrun's count of restarts does not distinguish attempts: each
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
        time.sleep(max(0.02, size / 10_000))  # the one store serves 10,000 requests per second
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
