"""Stages that all ranks go through together, each with a time limit: one that is cut off holds up the others briefly.

The first rank to wait too long, or to lose contact, asks all others through the rendezvous store where they are,
prints one message that names who keeps whom waiting, and all ranks end with 2. A rank that cannot reach the store
either says so by itself, a little later.
"""

import json
import os
import re
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, NoReturn

from dtron import compat
from dtron.cluster.preflight.facts import whose
from dtron.train.launch import FIRST_FAILURE, World, tell_torchrun

__all__ = ["Guard", "Place", "StandsStillError", "stands_still"]

POLL_S = 0.2
ANSWER_S = 2.0  # for an answer: a poll, and what a busy machine needs
ALONE_S = 6.0  # after the limit, when whoever asks the others must have ended this rank
CODE = 2
NAMED = 4  # groups, in a message

# Keys of the store. "preflight/at/3" is the answer of rank 3; "preflight/met/2": ranks that have ended stage 2.
ASKED, OVER, AT, MET = "preflight/asked", "preflight/over", "preflight/at", "preflight/met"


class StandsStillError(RuntimeError):
    """A stage did not end in time."""


@dataclass(frozen=True)
class Place:
    """Where a rank is. ranks: those that take part, none in what it does alone; waits: it is done, but not all are."""

    what: str
    ranks: list[int] = field(default_factory=list)
    waits: bool = False


def stands_still(cause: str, places: dict[int, Place | None], hosts: list[str]) -> str:
    """Who keeps the others waiting. places: of all ranks, None where there was no answer."""
    lines = [f"preflight: {cause}"]
    silent = [rank for rank, place in places.items() if place is None]
    alone: dict[str, list[int]] = {}
    together: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    for rank, place in places.items():
        if place is not None and not place.waits and not place.ranks:
            alone.setdefault(place.what, []).append(rank)
        elif place is not None and not place.waits:
            together.setdefault((place.what, tuple(place.ranks)), []).append(rank)
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
        self._stage, self._number, self._place = "the start", 0, Place("the start")
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
        self._stage, self._place = name, Place(name)
        self._deadline = time.monotonic() + self._allowed_s
        yield
        self.meet()

    def at(self, what: str, ranks: Sequence[int] = ()) -> None:
        """This rank is now in `what`, for which it needs `ranks`."""
        self._place = Place(what, list(ranks))

    def waits(self) -> None:
        """This rank has done its part, and what it is in now needs all."""
        self._place = Place(self._place.what, waits=True)

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
        place = self._place
        if not (place.ranks or place.waits) or self._world.size == 1:
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
                if self._store.check([ASKED]):
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
                print(
                    f"error on rank {rank}: preflight: {self._stage} has not ended within {self._allowed_s:g} s, and "
                    f"the rendezvous store does not answer: {whose([rank], self.hosts)} is cut off from it",
                    file=sys.stderr,
                    flush=True,
                )
            os._exit(CODE)

    def _fire(self, cause: str, store: Any) -> None:
        """Be the rank that tells, unless another is. Does not return if it is."""
        mine = f"preflight of rank {self._world.rank}"
        if store.compare_set(FIRST_FAILURE, "", mine).decode() != mine:
            self._silent = True
            return
        store.set(ASKED, mine)
        text = stands_still(cause, self._collect(store), self.hosts)
        print(f"error: {text}", file=sys.stderr, flush=True)
        _tell_torchrun(text)
        store.set(OVER, text)
        time.sleep(2 * POLL_S)  # without torchrun the store may live in this process
        os._exit(CODE)

    def _collect(self, store: Any) -> dict[int, Place | None]:
        places: dict[int, Place | None] = dict.fromkeys(range(self._world.size))
        places[self._world.rank] = self._place
        end = time.monotonic() + ANSWER_S
        while (missing := [rank for rank, place in places.items() if place is None]) and time.monotonic() < end:
            time.sleep(POLL_S / 2)
            for rank in missing:
                if store.check([f"{AT}/{rank}"]):
                    places[rank] = Place(**json.loads(store.get(f"{AT}/{rank}")))
        return places

    def _answer_and_end(self) -> NoReturn:
        self._silent = True
        try:
            self._store.set(f"{AT}/{self._world.rank}", json.dumps(asdict(self._place)))
            end = time.monotonic() + ANSWER_S + ALONE_S
            while not self._store.check([OVER]) and time.monotonic() < end:
                time.sleep(POLL_S / 2)
            if self._store.check([OVER]):
                _tell_torchrun(self._store.get(OVER).decode())  # every machine has a summary of its own
        finally:  # also if the store is gone with the rank that asked
            time.sleep(1.0)  # torchrun blames the rank that ends first
            os._exit(CODE)


def _tell_torchrun(text: str) -> None:
    try:
        raise StandsStillError(text)  # the summary shows what is being handled
    except StandsStillError as error:
        tell_torchrun(error.with_traceback(None))
