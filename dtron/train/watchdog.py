"""A thread on every rank that notices when its own main thread waits too long for others, and says for whom.

A rank *waits* in a collective that the flight recorder holds as unfinished. gloo's point-to-point is not recorded:
there it waits if its main thread stands still, uses no processor time, and holds a message that has not come. A rank
that computes, however long, never waits; so what keeps the others waiting is a rank that waits for nobody, or that
does not answer at all.

Where ranks may wait longer than the limits, for a slow disk, a rank that gives no sign of life ends the wait: each
looks at the next one's.

The first rank to reach the limit asks all others through the rendezvous store where they are, and prints one report,
before torch's own timeout of the collective would end the run with less to say. Then all ranks end with 1.
"""

import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist

from dtron import compat
from dtron.config.sections import Comm
from dtron.train.launch import (
    FIRST_FAILURE,
    KILLED_WAIT_S,
    SILENT_WAIT_S,
    LostContactError,
    World,
    tell_torchrun,
)

__all__ = ["HangError", "State", "Wait", "Watchdog", "report"]

POLL_S = 0.5
ALIVE_S = 1.0  # between a rank's signs of life
ANSWER_S = 1.5  # beside a poll: to look at a full recorder on a busy machine
DUMP_S = 5.0  # longest wait for the files of all ranks, after the report
STILL_S = 0.2  # a thread that has not moved for so long, where others have stood for the whole limit, stands
MOVED_CPU_S = 1e-3  # processor time that shows, in POLL_S, that a thread did something
FRAMES = 8  # innermost ones, shown of a rank that is the cause
NAMED = 4  # ranks, or collectives, that a report describes one by one

# Keys of the store; "hang/3" is the answer of rank 3, "alive/3" its last sign of life. WRITTEN and LEFT count ranks.
ASKED, OVER, WRITTEN, LEFT, ALIVE = "hang", "hang_over", "hang_written", "hang_left", "alive"


class HangError(RuntimeError):
    """A rank waited for others as long as the configuration lets it."""

    kind = "hang"


@dataclass(frozen=True)
class Wait:
    """What a rank waits in. `ranks`: of its group, none if unknown; `number`: of the collectives in that group."""

    name: str
    ranks: list[int]
    group: str = ""
    number: int = 0
    sizes: Sequence[Sequence[int]] = ()

    def text(self, world: int) -> str:
        """For example: all_reduce of [4, 8], the 57th collective of ranks 0-1 (mesh_dp)."""
        if not self.ranks:
            return self.name
        sizes = ", ".join(str([*size]) if size else "a scalar" for size in self.sizes[:NAMED])
        of = f" of {sizes}" if sizes else ""
        whose = "all ranks" if len(self.ranks) == world else named(self.ranks)
        return f"{self.name}{of}, collective {self.number} of {whose}" + (f" ({self.group})" if self.group else "")


@dataclass(frozen=True)
class State:
    """A rank's answer. `step`: the last it has done; `wait`: None if in no collective; `stack`: innermost frames."""

    step: int
    wait: Wait | None
    stack: str


def fire_after(limit_s: float) -> float:
    """Seconds of waiting after which to ask the others, so that the report is out before `limit_s`."""
    return max(0.7 * limit_s, limit_s - 3.5)


# --- the report


def named(ranks: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> "ranks 0-2, 5"."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], rank]
        else:
            runs.append([rank])
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join("-".join(map(str, run)) for run in runs)


def report(states: dict[int, State | None], asked_by: int, waited_s: float, limit: tuple[str, float]) -> str:
    """Who keeps whom waiting, and where. states: of all ranks, None where there was no answer; limit: key, seconds."""
    silent = [rank for rank, state in states.items() if state is None]
    answered = {rank: state for rank, state in states.items() if state is not None}
    free = {rank: state for rank, state in answered.items() if state.wait is None}
    causes = sorted([*silent, *free])
    asking = answered[asked_by]
    whom = f" for {named(causes)}" if causes else ""
    lines = [
        f"the run hangs after step {asking.step}: rank {asked_by} has waited {waited_s:.1f} s{whom}; "
        f"{limit[0]} is {limit[1]:g}"
    ]
    if silent:
        lines.append(
            f"{named(silent)} did not answer within {ANSWER_S:g} s: stopped, gone, cut off, or in code that never "
            "lets another thread run"
        )
    for rank, state in [*free.items()][:NAMED]:
        lines += [
            f"rank {rank}, after step {state.step}, is in no collective; its main thread:",
            state.stack.rstrip("\n"),
        ]
    if len(free) > NAMED:
        lines.append(f"and so {len(free) - NAMED} more")
    lines += _waiting(answered, len(states), explain=not causes)
    if causes:
        lines.append(f"if {named(causes)} {'was' if len(causes) == 1 else 'were'} only slow, raise {limit[0]}")
    return "\n".join(lines)


def _waiting(answered: dict[int, State], world: int, explain: bool) -> list[str]:
    """A line for each collective that ranks wait in; explain: all do, so that the difference is the cause."""
    places: dict[str, list[int]] = {}
    for rank, state in answered.items():
        if state.wait is not None:
            places.setdefault(state.wait.text(world), []).append(rank)
    by_size = sorted(places.items(), key=lambda place: -len(place[1]))
    lines = [f"{named(ranks)} {'waits' if len(ranks) == 1 else 'wait'} in {place}" for place, ranks in by_size[:NAMED]]
    if len(places) > NAMED:
        lines.append(f"and in {len(places) - NAMED} more")
    if explain and (behind := _left_behind(answered)):
        lines.append(f"others have finished what {named(behind)} still wait in: look at the network of these")
    elif explain and len(places) > 1:
        lines.append("every rank waits, in different collectives: they have gone different ways")
        lines += [f"main thread of rank {ranks[0]}:\n{answered[ranks[0]].stack.rstrip()}" for _, ranks in by_size[:2]]
    elif explain:
        lines.append("every rank waits in the same collective: look at the network between them")
    return lines


def _left_behind(answered: dict[int, State]) -> list[int]:
    """The ranks that wait in a collective which other ranks of its group have finished: they wait in a later one.

    A rank that took another way through the code is not ahead: it waits in another collective of the same number.
    """
    newest: dict[tuple[str, tuple[int, ...]], int] = {}
    waits = {rank: state.wait for rank, state in answered.items() if state.wait is not None and state.wait.ranks}
    for wait in waits.values():
        group = wait.group, tuple(wait.ranks)
        newest[group] = max(newest.get(group, 0), wait.number)
    return [rank for rank, wait in waits.items() if wait.number < newest[wait.group, tuple(wait.ranks)]]


# --- one rank


class Watchdog:
    """Watches the thread that makes it, from `start` to `stop`; a run of one rank, or without recorder, needs none.

    step: tells how many optimizer steps are done. sees_all: the recorder holds point-to-point too, as NCCL's does.
    """

    def __init__(self, world: World, comm: Comm, run_folder: Path, step: Callable[[], int], *, sees_all: bool) -> None:
        self._rank, self._size = world.rank, world.size
        self._step, self._sees_all = step, sees_all
        self._folder, self._prefix = run_folder / comm.save_traces_folder, comm.save_traces_file_prefix
        self._limits = {
            "comm.init_timeout_seconds": float(comm.init_timeout_seconds),
            "comm.train_timeout_seconds": float(comm.train_timeout_seconds),
        }
        self._limit = "comm.init_timeout_seconds"
        self._poll_s = max(POLL_S, self._size / 10_000)  # the one store stands 10,000 requests a second
        self._alive_s = max(ALIVE_S, self._size / 1_000)
        self._next_sign = (b"", time.monotonic())  # the last sign of life of the next rank, and when it was new
        self._stopped = threading.Event()
        self._thread = threading.get_ident()
        self._clock = time.pthread_getcpuclockid(self._thread)
        self._store, self._stop, self._control = world.store, world.stop, world.control

    def start(self) -> None:
        """Begin with the long limit, that of the first step."""
        if self._size > 1 and compat.flight_recorder_is_on():
            self._store = compat.another_connection(self._store)
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def first_step_done(self) -> None:
        """From now on the short limit holds."""
        self._limit = "comm.train_timeout_seconds"

    def stop(self) -> None:
        """Watch no more."""
        self._stopped.set()

    def _watch(self) -> None:
        try:
            self._poll()
        except dist.DistError as error:  # the store is gone, and with it rank 0 or torchrun: the run ends without us
            if self._stopped.wait(SILENT_WAIT_S):
                return
            # It does not: this machine has been cut off, perhaps in a wait for a disk, which may take long.
            lost = LostContactError(f"rank {self._rank} cannot reach the rendezvous store: {error}")
            print(f"error: {lost}", file=sys.stderr, flush=True)
            self._control.failed(lost)
            tell_torchrun(lost)
            os._exit(1)
        except RuntimeError:
            return

    def _poll(self) -> None:
        """Look at the recorder only when the main thread has stood for a while: a look costs up to 0.5 s."""
        place, cpu_s, since, look_at = (0, 0), 0.0, time.monotonic(), 0.0
        sign_at = 0.0
        rest_until = 0.0  # a hundred times as long as the last look took, so that looks cost 1 % of a core at most
        while not self._stopped.wait(self._poll_s):
            if self._store.check([ASKED]):
                self._answer_and_end()
            if self._stop.asked and self._store.check([FIRST_FAILURE]):
                os._exit(1)  # it was torchrun's, because another rank has failed: there is nothing more to save
            (now_at, now_cpu_s), now = self._whereabouts(), time.monotonic()
            if now >= sign_at:
                self._store.set(f"{ALIVE}/{self._rank}", str(now))
                sign_at = now + self._alive_s
            moved = now_at != place or (not self._sees_all and now_cpu_s - cpu_s > MOVED_CPU_S)
            place, cpu_s = now_at, now_cpu_s
            if not moved and now < look_at:
                continue
            due = float("inf")
            if moved:
                since = now
            else:
                due = self._look(since, now)
                rest_until = now + 100 * (time.monotonic() - now)
            limit_s = self._limits[self._limit]
            look_at = min(due, max(now + limit_s / 4, rest_until), now + 0.6 * limit_s)

    def _look(self, stands_since: float, now: float) -> float:
        """When this rank will have waited too long for what it is in; fires if that has come."""
        wait = self._waits_since(stands_since)
        if wait is None:
            return float("inf")
        began, longest_s = wait
        limit_s = self._limits[self._limit]
        gone = longest_s > limit_s and self._next_is_gone(now, fire_after(limit_s))
        if (due := began + fire_after(longest_s)) > now and not gone:
            return due
        self._fire(now - began)
        return float("inf")  # another rank was first: it asks, or ends the run for a cause of its own

    def _next_is_gone(self, now: float, longest_s: float) -> bool:
        """Whether the next rank has given no sign of life for so long, while this one looked."""
        key = f"{ALIVE}/{(self._rank + 1) % self._size}"
        sign = self._store.get(key) if self._store.check([key]) else b""
        if sign != self._next_sign[0]:
            self._next_sign = sign, now
        return sign != b"" and now - self._next_sign[1] > longest_s

    def _whereabouts(self) -> tuple[tuple[int, int], float]:
        """Where the main thread is, equal as long as it stands, and the processor seconds it has used."""
        frame = sys._current_frames()[self._thread]
        return (id(frame), frame.f_lasti), time.clock_gettime(self._clock)

    def _waits_since(self, stands_since: float) -> tuple[float, float] | None:
        """(beginning in monotonic seconds, longest wait in seconds) of what this rank waits in, or None.

        A group made with a timeout longer than the limit keeps it.
        """
        limit_s = self._limits[self._limit]
        if entries := compat.unfinished_collectives():
            now, wall_ns = time.monotonic(), time.time_ns()
            waits = [
                (now - (wall_ns - e["time_created_ns"]) / 1e9, max(limit_s, e["timeout_ms"] / 1e3)) for e in entries
            ]
            return min(waits, key=lambda wait: wait[0] + wait[1])
        if not self._sees_all and message_pending(sys._current_frames()[self._thread]):
            return stands_since, limit_s
        return None

    # --- asking and answering

    def _fire(self, waited_s: float) -> None:
        """Be the rank that reports, unless another has failed before. Does not return if it is."""
        mine = f"watchdog of rank {self._rank}"  # the main thread, which will lose contact too, is to be silent
        if self._store.compare_set(FIRST_FAILURE, "", mine).decode() != mine:
            return
        self._store.set(ASKED, mine)
        answer = self._answer()
        states = self._collect()
        limit = (self._limit, self._limits[self._limit])
        text = report({**states, self._rank: answer}, self._rank, waited_s, limit)
        text += f"\nlast collectives and stacks of the ranks: {self._folder}"
        print(f"error: {text}", file=sys.stderr, flush=True)
        self._write()
        answered = sum(state is not None for state in states.values())
        self._wait_for(WRITTEN, answered, DUMP_S)
        try:
            raise HangError(text)  # torchrun's summary shows what is being handled
        except HangError as error:
            self._control.failed(error)
            tell_torchrun(error.with_traceback(None))
        self._store.set(OVER, "")
        self._wait_for(LEFT, answered - 1, 1.0)  # without torchrun the store may live in this process
        os._exit(1)

    def _answer_and_end(self) -> None:
        """Tell the asking rank where this one is, leave files, and end after it has."""
        self._answer()
        self._write()
        end = time.monotonic() + DUMP_S + ANSWER_S + self._poll_s
        try:
            while not self._store.check([OVER]) and time.monotonic() < end:
                time.sleep(0.05)
            self._store.add(LEFT, 1)
        finally:  # also if the store is gone with the rank that asked
            time.sleep(KILLED_WAIT_S)
            os._exit(1)

    def _answer(self) -> State:
        state = self._state()
        self._store.set(f"{ASKED}/{self._rank}", json.dumps(asdict(state)))
        return state

    def _state(self) -> State:
        entries = compat.unfinished_collectives()
        place, cpu_s = self._whereabouts()
        time.sleep(STILL_S)
        still_at, still_cpu_s = self._whereabouts()
        frame = sys._current_frames()[self._thread]
        wait = None
        if entries:
            wait = recorded_wait(entries[0])
        elif not self._sees_all and place == still_at and still_cpu_s - cpu_s < MOVED_CPU_S and message_pending(frame):
            wait = Wait(f"a point-to-point message ({_place(frame)})", [])
        return State(self._step(), wait, "".join(traceback.format_stack(frame, FRAMES)))

    def _collect(self) -> dict[int, State | None]:
        """The answers of all ranks that give one in time."""
        end = time.monotonic() + self._poll_s + ANSWER_S
        states: dict[int, State | None] = dict.fromkeys(range(self._size))
        while (missing := [rank for rank, state in states.items() if state is None]) and time.monotonic() < end:
            time.sleep(0.05)
            for rank in missing:
                if self._store.check([f"{ASKED}/{rank}"]):
                    states[rank] = _parsed(self._store.get(f"{ASKED}/{rank}"))
        return states

    def _write(self) -> None:
        """The recorder for torch's analyzer, and the stacks of all threads."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            threads = {thread.ident: thread.name for thread in threading.enumerate()}
            stacks = [
                f"{threads.get(ident, 'a thread of torch')}:\n{''.join(traceback.format_stack(frame))}"
                for ident, frame in sys._current_frames().items()
            ]
            (self._folder / f"stack_{self._rank}.txt").write_text("\n".join(stacks))
            (self._folder / f"{self._prefix}{self._rank}").write_bytes(compat.dump_flight_recorder())
        except OSError as error:
            print(f"rank {self._rank} could not leave its last collectives: {error}", file=sys.stderr, flush=True)
        self._store.add(WRITTEN, 1)

    def _wait_for(self, count: str, ranks: int, longest_s: float) -> None:
        end = time.monotonic() + longest_s
        while self._store.add(count, 0) < ranks and time.monotonic() < end:
            time.sleep(0.05)


def recorded_wait(entry: dict[str, Any]) -> Wait:
    """An entry of the recorder, in a report's terms."""
    name, description = entry["process_group"]
    return Wait(
        entry["profiling_name"].partition(":")[2],
        compat.group_ranks(name),
        "" if description in ("default_pg", "undefined") else description,
        entry["collective_seq_id"],
        entry["input_sizes"],
    )


def message_pending(frame: FrameType) -> bool:
    """Whether a frame holds communication that has not ended; for one that stands still: it waits for it."""
    return any(isinstance(value, dist.Work) and not value.is_completed() for value in frame.f_locals.values())


def _place(frame: FrameType) -> str:
    return f"{frame.f_code.co_name}, line {frame.f_lineno} of {Path(frame.f_code.co_filename).name}"


def _parsed(answer: bytes) -> State:
    state = json.loads(answer)
    return State(state["step"], Wait(**state["wait"]) if state["wait"] else None, state["stack"])
