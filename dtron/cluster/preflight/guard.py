"""Stages that all ranks go through together, each with a time limit: one that is cut off holds up the others briefly.

The first rank to wait too long, or to lose contact, asks all others through the rendezvous store where they are,
prints one message that names who keeps whom waiting, and all ranks end with 2. A rank that cannot reach the store
either says so by itself, a little later.
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
from dtron.cluster.preflight.facts import whose
from dtron.ranks.failure import tell_torchrun
from dtron.ranks.inquiry import Inquiry
from dtron.ranks.world import World

__all__ = ["Guard", "RankState", "StalledError", "stalled"]

log = logging.getLogger(__name__)

POLL_S = 0.2
ANSWER_S = 2.0  # for an answer: a poll, and what a busy machine needs
ALONE_S = 6.0  # after the limit, when whoever asks the others must have ended this rank
CODE = 2
NAMED = 4  # groups, in a message

MET = "preflight/met"  # beginning of keys of the store: "preflight/met/2" counts the ranks that have ended stage 2


class StalledError(RuntimeError):
    """A stage did not end in time."""


@dataclass(frozen=True)
class RankState:
    """Where a rank is. ranks: those that take part, none in what it does alone; waits: it is done, but not all are."""

    what: str
    ranks: list[int] = field(default_factory=list)
    waits: bool = False


def stalled(cause: str, states: dict[int, RankState | None], hosts: list[str]) -> str:
    """Who keeps the others waiting. states: of all ranks, None where there was no answer."""
    lines = [f"preflight: {cause}"]
    silent = [rank for rank, state in states.items() if state is None]
    alone: dict[str, list[int]] = {}
    together: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    for rank, state in states.items():
        if state is not None and not state.waits and not state.ranks:
            alone.setdefault(state.what, []).append(rank)
        elif state is not None and not state.waits:
            together.setdefault((state.what, tuple(state.ranks)), []).append(rank)
    if silent:
        lines.append(
            f"{whose(silent, hosts)} did not answer: not started, stopped, gone, or cut off from rank 0's machine"
        )
    lines += [f"{whose(ranks, hosts)}: still at {what}" for what, ranks in alone.items()]
    for (what, group), inside in [*together.items()][:NAMED]:
        where = "" if len(inside) == len(group) else f" on {whose(inside, hosts)}"
        lines.append(f"{what} of {whose(list(group), hosts)} does not end{where}")
    if len(together) > NAMED:
        lines.append(f"and of {len(together) - NAMED} more groups")
    if together and not silent and not alone:
        lines.append("look at the network between their machines")
    if len(lines) == 1:
        lines.append("every rank waits for the others: look at the network between them and the rendezvous store")
    return "\n".join(lines)


class Guard:
    """Of one rank. `hosts`: of all ranks, once they are known. limit_s: of a stage that names none."""

    def __init__(self, world: World, limit_s: float) -> None:
        self.hosts: list[str] = []
        self._world, self._limit_s, self._allowed_s = world, limit_s, limit_s
        self._stage, self._number, self._state = "the start", 0, RankState("the start")
        self._deadline = time.monotonic() + limit_s
        self._over = threading.Event()
        self._silent = False  # another rank failed before this one, and tells
        self._store = world.store

    def start(self) -> None:
        """Begin to look at the clock. A world of one has nobody to wait for."""
        if self._world.size > 1:
            self._store = compat.another_connection(self._world.store)
            threading.Thread(target=self._watch, name="guard", daemon=True).start()
            threading.Thread(target=self._watch_alone, name="guard alone", daemon=True).start()

    def stop(self) -> None:
        self._over.set()

    # --- what the main thread says

    @contextmanager
    def stage(self, name: str, limit_s: float | None = None) -> Iterator[None]:
        """What all ranks do until all have done it."""
        self._allowed_s = limit_s or self._limit_s
        self._stage, self._state = name, RankState(name)
        self._deadline = time.monotonic() + self._allowed_s
        yield
        self.meet()

    def at(self, what: str, ranks: Sequence[int] = ()) -> None:
        """This rank is now in `what`, for which it needs `ranks`."""
        self._state = RankState(what, list(ranks))

    def waits(self) -> None:
        """This rank has done its part, and what it is in now needs all."""
        self._state = RankState(self._state.what, waits=True)

    def meet(self) -> None:
        """Wait for all."""
        self.waits()
        self._number += 1
        key, store = f"{MET}/{self._number}", self._world.store
        if store.add(key, 1) == self._world.size:
            store.set(f"{key}/all", "")
        store.wait([f"{key}/all"])

    def gather(self, key: str, mine: Any) -> list[Any] | None:
        """What every rank gives, as JSON holds it, in the order of the ranks; on rank 0, None elsewhere."""
        store = self._world.store
        store.set(f"preflight/{key}/{self._world.rank}", json.dumps(mine))
        self.meet()
        if self._world.rank:
            return None
        return [json.loads(each) for each in store.multi_get([f"preflight/{key}/{r}" for r in range(self._world.size)])]

    def tell(self, key: str, of_rank_0: Any) -> Any:
        """What rank 0 gives, on all ranks; from the others it is not looked at."""
        if self._world.rank == 0:
            self._world.store.set(f"preflight/{key}", json.dumps(of_rank_0))
        return json.loads(self._world.store.get(f"preflight/{key}"))

    def lost(self, error: RuntimeError) -> NoReturn:
        """End, because a peer is gone: what torch said of it. Re-raises what has nothing to do with others."""
        state = self._state
        if not (state.ranks or state.waits) or self._world.size == 1:
            raise error
        reason = re.sub(r"^\[[^\]]*\] ", "", str(error)).partition("\n")[0][:150] or type(error).__name__
        try:
            self._fire(f"{self._stage}: contact was lost ({reason})", self._world.store)
        finally:
            time.sleep(ANSWER_S + ALONE_S)  # whoever was first ends us
            os._exit(CODE)

    # --- the threads

    def _watch(self) -> None:
        try:
            while not self._over.wait(POLL_S):
                if self._inquiry(self._store).asked():
                    self._answer_and_end()
                if time.monotonic() > self._deadline and not self._silent:
                    self._fire(f"{self._stage} has not ended within {self._allowed_s:g} s", self._store)
        except RuntimeError:  # the store is gone: the other thread ends this rank
            return

    def _watch_alone(self) -> None:
        """The store may not answer at all, and hold whoever asks it."""
        while not self._over.wait(POLL_S):
            if time.monotonic() < self._deadline + ALONE_S:
                continue
            if not self._silent:
                rank = self._world.rank
                log.error(
                    f"preflight: {self._stage} has not ended within {self._allowed_s:g} s, and the rendezvous store "
                    f"does not answer: {whose([rank], self.hosts)} is cut off from it"
                )
            os._exit(CODE)

    def _inquiry(self, store: dist.Store) -> Inquiry:
        return Inquiry(store, "preflight", self._world.rank, self._world.size)

    def _fire(self, cause: str, store: dist.Store) -> None:
        """Be the rank that reports, unless another is. Does not return if it is."""
        inquiry = self._inquiry(store)
        if not inquiry.begin():
            self._silent = True
            return
        inquiry.answer(asdict(self._state))
        answers = inquiry.collect(ANSWER_S)
        states = {rank: RankState(**answer) if answer else None for rank, answer in answers.items()}
        text = stalled(cause, states, self.hosts)
        log.error(text)
        _tell_torchrun(text)
        inquiry.end(text)
        time.sleep(2 * POLL_S)  # without torchrun the store may live in this process
        os._exit(CODE)

    def _answer_and_end(self) -> NoReturn:
        self._silent = True
        try:
            inquiry = self._inquiry(self._store)
            inquiry.answer(asdict(self._state))
            text = inquiry.wait_for_end(ANSWER_S + ALONE_S)
            if text is not None:
                _tell_torchrun(text)  # every machine has a summary of its own
        finally:  # also if the store is gone with the rank that asked
            time.sleep(1.0)  # torchrun blames the rank that ends first
            os._exit(CODE)


def _tell_torchrun(text: str) -> None:
    try:
        raise StalledError(text)  # the summary shows what is being handled
    except StalledError as error:
        tell_torchrun(error.with_traceback(None))
