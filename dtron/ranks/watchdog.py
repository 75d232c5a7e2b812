"""A thread on every rank that notices when its own main thread waits too long for others, and reports for whom.

A rank *waits* in a collective that the flight recorder holds as unfinished. gloo's point-to-point is not recorded:
there it waits if its main thread stands still in torch.distributed's code and uses no processor time. A rank that
computes, however long, never waits; so what keeps the others waiting is a rank that waits for nobody, or that does not
answer at all.

Where ranks may wait longer than the limits, for a slow disk, a rank without a heartbeat ends the wait: each looks at
the next one's.

The first rank to reach the limit asks all others through the rendezvous store where they are, and logs one report,
before torch's own timeout of the collective would end the run with less to say. Then all ranks end with 1.
"""

import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import FrameType

import torch.distributed as dist

from dtron import compat
from dtron.config.sections import Comm
from dtron.ranks.failure import FIRST_FAILURE, KILLED_WAIT_S, LostContactError, tell_torchrun
from dtron.ranks.hang_report import ANSWER_S, FRAMES, State, Wait, recorded_wait, report
from dtron.ranks.inquiry import Inquiry
from dtron.ranks.world import SILENT_WAIT_S, World

__all__ = ["HangError", "Watchdog"]

log = logging.getLogger(__name__)

POLL_S = 0.5
HEARTBEAT_S = 1.0  # between two heartbeats of a rank
DUMP_S = 5.0  # longest wait for the files of all ranks, after the report
STILL_S = 0.2  # a thread that has not moved for so long stands still
# Parts of the paths of modules whose functions wait for point-to-point messages.
MESSAGE_CODE = ("/torch/distributed/", "/dtron/parallel/")
LOADING_CODE = "_take_ahead"  # the function of dtron.data.loader that waits for its thread "prefetch"
MOVED_CPU_S = 1e-3  # processor time that shows, in POLL_S, that a thread did something

# Keys of the store; "heartbeat/3" is the last heartbeat of rank 3. WRITTEN and LEFT count ranks.
WRITTEN, LEFT, HEARTBEAT = "hang_written", "hang_left", "heartbeat"


class HangError(RuntimeError):
    """A rank waited for others as long as the configuration lets it."""

    kind = "hang"


def fire_after(limit_s: float) -> float:
    """Seconds of waiting after which to ask the others, so that the report is out before `limit_s`."""
    return max(0.7 * limit_s, limit_s - 3.5)


class Watchdog:
    """Watches the thread that makes it, from `start` to `stop`; a run of one rank, or without recorder, needs none.

    step: returns the number of optimizer steps done. sees_all: the recorder holds point-to-point too, as NCCL's does.
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
        self._poll_s = max(POLL_S, self._size / 10_000)  # the one store serves 10,000 requests per second
        self._heartbeat_s = max(HEARTBEAT_S, self._size / 1_000)
        self._next_heartbeat = (b"", time.monotonic())  # the last one of the next rank, and when it was new
        self._stopped = threading.Event()
        self._thread = threading.get_ident()
        self._clock = time.pthread_getcpuclockid(self._thread)
        self._wall_ahead_s = time.time() - time.monotonic()  # when the run began: the wall clock may be set since
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
            log.error(lost)
            self._control.failed(lost)
            tell_torchrun(lost)
            os._exit(1)
        except RuntimeError:
            return

    def _poll(self) -> None:
        """Look at the recorder only when the main thread has stood still for a while: a look costs up to 0.5 s."""
        at, cpu_s, since, look_at = (0, 0), 0.0, time.monotonic(), 0.0
        heartbeat_at = 0.0
        rest_until = 0.0  # a hundred times as long as the last look took, so that looks cost 1 % of a core at most
        while not self._stopped.wait(self._poll_s):
            if self._inquiry.asked():
                self._answer_and_end()
            if self._stop.signal_name and self._store.check([FIRST_FAILURE]):
                os._exit(1)  # it was torchrun's, because another rank has failed: there is nothing more to save
            (now_at, now_cpu_s), now = self._whereabouts(), time.monotonic()
            if now >= heartbeat_at:
                self._store.set(f"{HEARTBEAT}/{self._rank}", str(now))
                heartbeat_at = now + self._heartbeat_s
            moved = now_at != at or (not self._sees_all and now_cpu_s - cpu_s > MOVED_CPU_S)
            at, cpu_s = now_at, now_cpu_s
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

    def _look(self, still_since: float, now: float) -> float:
        """When this rank will have waited too long for what it is in; fires if that has come."""
        wait = self._waits_since(still_since)
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
        """Whether the next rank has had no heartbeat for so long, while this one looked."""
        key = f"{HEARTBEAT}/{(self._rank + 1) % self._size}"
        heartbeat = self._store.get(key) if self._store.check([key]) else b""
        if heartbeat != self._next_heartbeat[0]:
            self._next_heartbeat = heartbeat, now
        return heartbeat != b"" and now - self._next_heartbeat[1] > longest_s

    def _whereabouts(self) -> tuple[tuple[int, int], float]:
        """Where the main thread is, equal as long as it stands still, and the processor seconds it has used."""
        frame = sys._current_frames()[self._thread]
        return (id(frame), frame.f_lasti), time.clock_gettime(self._clock)

    def _waits_since(self, still_since: float) -> tuple[float, float] | None:
        """(beginning in monotonic seconds, longest wait in seconds) of what this rank waits in, or None.

        A group made with a timeout longer than the limit keeps it.
        """
        limit_s = self._limits[self._limit]
        if entries := compat.unfinished_collectives():
            waits = [
                (self._monotonic_s(e["time_created_ns"] / 1e9), max(limit_s, e["timeout_ms"] / 1e3)) for e in entries
            ]
            return min(waits, key=lambda wait: wait[0] + wait[1])
        if not self._sees_all and in_communication(sys._current_frames()[self._thread]):
            return still_since, limit_s
        return None

    def _monotonic_s(self, wall_s: float) -> float:
        """Of a moment of this run by the wall clock, which may have been set before it or after it."""
        now = time.monotonic()
        by_either = wall_s - self._wall_ahead_s, wall_s - (time.time() - now)
        return max((moment for moment in by_either if moment <= now), default=min(by_either))

    # --- asking and answering

    @property
    def _inquiry(self) -> Inquiry:
        return Inquiry(self._store, "hang", self._rank, self._size)

    def _fire(self, waited_s: float) -> None:
        """Be the rank that reports, unless another has failed before. Does not return if it is."""
        inquiry = self._inquiry
        if not inquiry.begin():
            return
        inquiry.answer(asdict(self._state()))
        answers = inquiry.collect(self._poll_s + ANSWER_S)
        states = {rank: State.from_json(answer) if answer else None for rank, answer in answers.items()}
        text = report(states, self._rank, waited_s, (self._limit, self._limits[self._limit]))
        text += f"\nlast collectives and stacks of the ranks: {self._folder}"
        log.error(text)
        self._write()
        answered = sum(state is not None for state in states.values())
        self._wait_for(WRITTEN, answered, DUMP_S)
        try:
            raise HangError(text)  # torchrun's summary shows what is being handled
        except HangError as error:
            self._control.failed(error)
            tell_torchrun(error.with_traceback(None))
        inquiry.end()
        self._wait_for(LEFT, answered - 1, 1.0)  # without torchrun the store may live in this process
        os._exit(1)

    def _answer_and_end(self) -> None:
        """Answer where this rank is, leave files, and end after the rank that asked has reported."""
        self._inquiry.answer(asdict(self._state()))
        self._write()
        try:
            self._inquiry.wait_for_end(DUMP_S + ANSWER_S + self._poll_s)
            self._store.add(LEFT, 1)
        finally:  # also if the store is gone with the rank that asked
            time.sleep(KILLED_WAIT_S)
            os._exit(1)

    def _state(self) -> State:
        entries = compat.unfinished_collectives()
        at, cpu_s = self._whereabouts()
        time.sleep(STILL_S)
        still_at, still_cpu_s = self._whereabouts()
        frame = sys._current_frames()[self._thread]
        wait = None
        if entries:
            wait = recorded_wait(entries[0])
        elif not self._sees_all and at == still_at and still_cpu_s - cpu_s < MOVED_CPU_S and in_communication(frame):
            wait = Wait(f"a point-to-point message ({_location(frame)})", [])
        return State(self._step(), wait, "".join(traceback.format_stack(frame, FRAMES)) + _loading(frame))

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
            log.error("the last collectives could not be written: %s", error)
        self._store.add(WRITTEN, 1)

    def _wait_for(self, count: str, ranks: int, longest_s: float) -> None:
        end = time.monotonic() + longest_s
        while self._store.add(count, 0) < ranks and time.monotonic() < end:
            time.sleep(0.05)


def in_communication(frame: FrameType) -> bool:
    """Whether the innermost Python frame of a thread is in code that exchanges point-to-point messages.

    Of a thread that stands still and uses no processor time, this says that it waits for a message. What it misses is
    a wait in a function outside torch.distributed and `dtron.parallel`: such a rank counts as one that computes.
    """
    return any(part in frame.f_code.co_filename for part in MESSAGE_CODE)


def _loading(frame: FrameType) -> str:
    """Where the thread that loads data ahead stands, if that is what the main thread, in `frame`, waits for."""
    functions = {outer.f_code.co_name for outer, _ in traceback.walk_stack(frame)}
    frames = sys._current_frames()
    return "".join(
        f"and the thread it waits for, {thread.name}:\n{''.join(traceback.format_stack(frames[thread.ident], FRAMES))}"
        for thread in threading.enumerate()
        if LOADING_CODE in functions and thread.name.startswith("prefetch") and thread.ident in frames
    )


def _location(frame: FrameType) -> str:
    return f"{frame.f_code.co_name}, line {frame.f_lineno} of {Path(frame.f_code.co_filename).name}"
