"""Ranks for tests: forked from a process that has imported torch, kept, and given one job after the other.

Importing torch and its distributed parts costs seconds a process; a fork costs milliseconds (see preload.py). After a
failure or a timeout the whole pool is killed, because the failed rank's peers may sit in a collective for ever.
"""

import functools
import multiprocessing.connection
import multiprocessing.forkserver
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dtron import compat
from dtron.ranks.logs import setup_logging


def _serve(rank: int, jobs: Connection) -> None:
    setup_logging()
    # What a test added is there too: scripts/bench, with a module that is named as a folder of the tests and hides it.
    scripts = Path(__file__).parents[1] / "scripts"
    sys.path[:] = [path for path in sys.path if scripts not in Path(path).parents]
    torch.set_num_threads(1)
    while True:
        fn, world, store, keep, args = jobs.recv()
        try:
            if store:
                _begin(rank, world, store)
            answer = (True, fn(*args))
            dist.barrier()
            if not keep:
                _end()
        except BaseException:
            answer = (False, traceback.format_exc())
        torch._dynamo.reset()
        jobs.send(answer)


def _begin(rank: int, world: int, store: str) -> None:
    """A world of its own, which knows nothing of the one before."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    timeout = timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timeout)


def _end() -> None:
    """All ranks of a world leave it together: gloo that outlives its peers was seen to corrupt memory."""
    dist.destroy_process_group()
    compat.forget_meshes()
    kept.cache_clear()


def _nothing() -> None:
    """The last job of a world that was kept."""


@functools.cache
def kept(make: Callable[..., Any], *args: Any) -> Any:
    """make(*args), once a world: what the jobs that share it build once, such as a mesh."""
    return make(*args)


def _exit_code(process: Any) -> int | None:
    """Of a process whose end was seen; it may take a moment more until it can be waited for."""
    process.join(10)
    return process.exitcode


@functools.cache
def _fork_server() -> Any:
    """The context whose processes are forked from one that has imported preload.py, started at the first call."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["preload"])
    before = os.environ.get("PYTHONPATH")
    # Until Python 3.13 it imports the module by its own path, and says nothing where it finds none.
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    multiprocessing.forkserver.ensure_running()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before
    return context


class RankError(AssertionError):
    """A rank raised; the text is its traceback."""


class Ranks:
    """A pool that grows to the largest world asked for."""

    def __init__(self) -> None:
        self._workers: list[tuple[Any, Connection]] = []
        self._stores = tempfile.TemporaryDirectory()  # a file for each world, through which its ranks meet
        self.worlds = 0  # that these workers have been in
        self._stores_used = 0
        self._shared: tuple[int, Any] = (0, None)

    def run(self, world: int, fn: Callable[..., Any], *args: Any, timeout: float = 240, share: Any = None) -> list[Any]:
        """fn(*args) on each of `world` gloo ranks: their results. RankError with the first failure's traceback.

        share: jobs in a row that give an equal one, no None, have the same world: its process groups and `kept`.
        """
        self.grow(world)
        keep, store = share is not None, ""
        if self._shared != (world, share):
            if self._shared[0]:
                self._send(self._shared[0], _nothing, "", False, (), timeout)
            self.worlds += 1
            self._stores_used += 1
            store = os.path.join(self._stores.name, str(self._stores_used))
        self._shared = (world, share) if keep else (0, None)
        return self._send(world, fn, store, keep, args, timeout)

    def _send(self, world: int, fn: Callable[..., Any], store: str, keep: bool, args: Any, timeout: float) -> list[Any]:
        pipes = [pipe for _, pipe in self._workers[:world]]
        for pipe in pipes:
            pipe.send((fn, world, store, keep, args))
        return self._collect(pipes, time.monotonic() + timeout)

    def grow(self, world: int) -> None:
        """Fork workers until there are `world`."""
        tasks = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
        if left := [name for name in tasks if "gloo" in name]:  # what else runs in this process would meet it
            raise RuntimeError(
                f"a test has left a process group in pytest's own process (threads {', '.join(left)}); run it on "
                "a rank: ranks.run(1, function)"
            )
        context = _fork_server()
        for rank in range(len(self._workers), world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, theirs), daemon=True)
            process.start()
            self._workers.append((process, ours))

    def _collect(self, pipes: list[Connection], end: float) -> list[Any]:
        results: dict[int, Any] = {}
        while len(results) < len(pipes):
            waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
            ends = {process.sentinel: rank for rank, (process, _) in enumerate(self._workers[: len(pipes)])}
            ready = multiprocessing.connection.wait([*waiting, *ends], timeout=max(0.0, end - time.monotonic()))
            if not ready:
                self.close()
                raise RankError(f"ranks {sorted(set(range(len(pipes))) - set(results))} hang")
            dead = [ends[sentinel] for sentinel in ready if sentinel in ends]
            for pipe in [pipe for pipe in waiting if pipe in ready and not dead]:
                rank = pipes.index(pipe)
                try:
                    good, results[rank] = pipe.recv()
                except EOFError:  # its pipe is closed a moment before the process has ended
                    dead = [rank]
                    break
                if not good:
                    self.close()
                    raise RankError(f"rank {rank}:\n{results[rank]}")
            if dead:
                codes = {rank: _exit_code(self._workers[rank][0]) for rank in dead}
                self.close()
                raise RankError(f"ranks died, with the exit codes {codes}")
        return [results[rank] for rank in range(len(pipes))]

    def close(self) -> None:
        for process, _ in self._workers:
            process.kill()
        for process, _ in self._workers:
            process.join()
        self._workers.clear()
        self.worlds, self._shared = 0, (0, None)
