"""Stages that all ranks pass together, each with a time limit: a rank that is cut off blocks the others only briefly.

The first rank to exceed the limit, or to lose contact, asks all others through the rendezvous store what they are doing
and prints one message that names the ranks the others wait for; all ranks exit with 2. A rank that cannot reach the
store reports that by itself, a little later.
"""

import json
import logging
import os
import re
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, NoReturn

import torch.distributed as dist

from dtron import compat
from dtron.cluster.preflight.facts import describe_ranks
from dtron.ranks.failure import tell_torchrun
from dtron.ranks.inquiry import Inquiry
from dtron.ranks.world import World

__all__ = ["Guard", "RankState", "StalledError", "stall_report"]

log = logging.getLogger(__name__)

POLL_S = 0.2
ANSWER_S = 2.0  # to wait for an answer: a poll, and slack for a busy machine
OFFLINE_GRACE_S = 6.0  # after the limit: by then the rank that asks the others must have ended this one
EXIT_CODE = 2
MAX_GROUPS_SHOWN = 4

BARRIER_KEY = "preflight/barrier"  # store keys: "preflight/barrier/2" counts the ranks that have finished stage 2


class StalledError(RuntimeError):
    """A stage exceeded its time limit."""


@dataclass(frozen=True)
class RankState:
    """What a rank does. ranks: those that take part, empty if it works alone; waiting: done, and waiting for others."""

    what: str
    ranks: list[int] = field(default_factory=list)
    waiting: bool = False


def stall_report(cause: str, states: dict[int, RankState | None], hosts: list[str]) -> str:
    """Which ranks the others wait for. states: of all ranks, None for a rank that did not answer."""
    lines = [f"preflight: {cause}"]
    silent = [rank for rank, state in states.items() if state is None]
    alone: dict[str, list[int]] = {}
    together: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    for rank, state in states.items():
        if state is not None and not state.waiting and not state.ranks:
            alone.setdefault(state.what, []).append(rank)
        elif state is not None and not state.waiting:
            together.setdefault((state.what, tuple(state.ranks)), []).append(rank)
    if silent:
        lines.append(
            f"{describe_ranks(silent, hosts)} did not answer: not started, stopped, exited, or cut off from "
            "rank 0's machine"
        )
    lines += [f"{describe_ranks(ranks, hosts)}: still at {what}" for what, ranks in alone.items()]
    for (what, group), inside in [*together.items()][:MAX_GROUPS_SHOWN]:
        where = "" if len(inside) == len(group) else f" on {describe_ranks(inside, hosts)}"
        lines.append(f"{what} of {describe_ranks(list(group), hosts)} has not finished{where}")
    if len(together) > MAX_GROUPS_SHOWN:
        lines.append(f"and in {len(together) - MAX_GROUPS_SHOWN} more groups")
    if together and not silent and not alone:
        lines.append("check the network between their machines")
    if len(lines) == 1:
        lines.append("every rank waits for the others: check the network between them and the rendezvous store")
    return "\n".join(lines)


class Guard:
    """Enforces the time limits of one rank. `hosts`: of all ranks, once known. limit_s: of a stage without its own."""

    def __init__(self, world: World, limit_s: float) -> None:
        self.hosts: list[str] = []
        self._world, self._limit_s, self._stage_limit_s = world, limit_s, limit_s
        self._stage, self._barriers, self._state = "the start", 0, RankState("the start")
        self._deadline = time.monotonic() + limit_s
        self._stopped = threading.Event()
        self._other_reports = False  # another rank failed first, and reports it
        self._store = world.store

    def start(self) -> None:
        """Start to enforce the limits. A world of one rank has none to wait for."""
        if self._world.size > 1:
            self._store = compat.another_connection(self._world.store)
            threading.Thread(target=self._watch, name="guard", daemon=True).start()
            threading.Thread(target=self._watch_without_store, name="guard without store", daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()

    # --- called by the main thread

    @contextmanager
    def stage(self, name: str, limit_s: float | None = None) -> Iterator[None]:
        """A stage that ends when all ranks have finished it."""
        self._stage_limit_s = limit_s or self._limit_s
        self._stage, self._state = name, RankState(name)
        self._deadline = time.monotonic() + self._stage_limit_s
        yield
        self.barrier()

    def set_current(self, what: str, ranks: Sequence[int] = ()) -> None:
        """This rank now runs `what`, in which `ranks` take part."""
        self._state = RankState(what, list(ranks))

    def set_waiting(self) -> None:
        """This rank has done its part and waits for the others."""
        self._state = RankState(self._state.what, waiting=True)

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.set_waiting()
        self._barriers += 1
        key, store = f"{BARRIER_KEY}/{self._barriers}", self._world.store
        if store.add(key, 1) == self._world.size:
            store.set(f"{key}/all", "")
        store.wait([f"{key}/all"])

    def gather(self, key: str, mine: Any) -> list[Any] | None:
        """Every rank's value, JSON-serializable, in rank order; on rank 0, None elsewhere."""
        store = self._world.store
        store.set(f"preflight/{key}/{self._world.rank}", json.dumps(mine))
        self.barrier()
        if self._world.rank:
            return None
        return [json.loads(each) for each in store.multi_get([f"preflight/{key}/{r}" for r in range(self._world.size)])]

    def broadcast(self, key: str, of_rank_0: Any) -> Any:
        """Rank 0's value on all ranks; the others' is ignored."""
        if self._world.rank == 0:
            self._world.store.set(f"preflight/{key}", json.dumps(of_rank_0))
        return json.loads(self._world.store.get(f"preflight/{key}"))

    def contact_lost(self, error: RuntimeError) -> NoReturn:
        """Report a lost peer and exit; error: torch's. Re-raises an error that does not involve other ranks."""
        state = self._state
        if not (state.ranks or state.waiting) or self._world.size == 1:
            raise error
        reason = re.sub(r"^\[[^\]]*\] ", "", str(error)).partition("\n")[0][:150] or type(error).__name__
        try:
            self._report(f"{self._stage}: lost contact with other ranks ({reason})", self._world.store)
        finally:
            time.sleep(ANSWER_S + OFFLINE_GRACE_S)  # the first rank to report ends this one
            os._exit(EXIT_CODE)

    # --- threads

    def _watch(self) -> None:
        try:
            while not self._stopped.wait(POLL_S):
                if self._inquiry(self._store).asked():
                    self._answer_and_exit()
                if time.monotonic() > self._deadline and not self._other_reports:
                    self._report(f"{self._stage} has not finished within {self._stage_limit_s:g} s", self._store)
        except RuntimeError:  # the store is lost: the other thread ends this rank
            return

    def _watch_without_store(self) -> None:
        """For a store that does not answer: it blocks the thread that asks it."""
        while not self._stopped.wait(POLL_S):
            if time.monotonic() < self._deadline + OFFLINE_GRACE_S:
                continue
            if not self._other_reports:
                rank = self._world.rank
                log.error(
                    f"preflight: {self._stage} has not finished within {self._stage_limit_s:g} s, and the rendezvous "
                    f"store does not answer: {describe_ranks([rank], self.hosts)} is cut off from it"
                )
            os._exit(EXIT_CODE)

    def _inquiry(self, store: dist.Store) -> Inquiry:
        return Inquiry(store, "preflight", self._world.rank, self._world.size)

    def _report(self, cause: str, store: dist.Store) -> None:
        """Report and exit, unless another rank already reports; then return."""
        inquiry = self._inquiry(store)
        if not inquiry.begin():
            self._other_reports = True
            return
        inquiry.answer(asdict(self._state))
        answers = inquiry.collect(ANSWER_S)
        states = {rank: RankState(**answer) if answer else None for rank, answer in answers.items()}
        text = stall_report(cause, states, self.hosts)
        log.error(text)
        _tell_torchrun(text)
        inquiry.end(text)
        time.sleep(2 * POLL_S)  # without torchrun the store may be in this process
        os._exit(EXIT_CODE)

    def _answer_and_exit(self) -> NoReturn:
        self._other_reports = True
        try:
            inquiry = self._inquiry(self._store)
            inquiry.answer(asdict(self._state))
            text = inquiry.wait_for_end(ANSWER_S + OFFLINE_GRACE_S)
            if text is not None:
                _tell_torchrun(text)  # each machine's torchrun prints its own summary
        finally:  # also if the store was lost with the rank that asked
            time.sleep(1.0)  # torchrun blames the rank that ends first
            os._exit(EXIT_CODE)


def _tell_torchrun(text: str) -> None:
    try:
        raise StalledError(text)  # the summary shows the exception being handled
    except StalledError as error:
        tell_torchrun(error.with_traceback(None))
