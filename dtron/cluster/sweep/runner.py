"""Running the points of a sweep: which are left, how each ended, and what is kept of it.

How a point is started and stopped is a `Runner`'s business: local.py has that of this machine.
"""

import dataclasses
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dtron.cluster.runs import Outcome, read_outcome, read_row
from dtron.cluster.sweep.points import Point
from dtron.config import to_toml
from dtron.observe.metrics import read_metrics

__all__ = ["ENDED", "End", "Job", "Record", "Runner", "Sweep", "classify", "read_record"]

ENDED = ("done", "oom", "hang", "timeout", "nonfinite", "lost", "failed")  # not run again by themselves
GRACE_S = 60.0  # beyond the time within which a heartbeat should have come
POLL_S = 0.5
RECORD = "point.json"
LONGEST = 300  # characters of a reason


@dataclass(frozen=True)
class End:
    """How a job ended, as its runner saw it, for where the run left no word of its own. state: empty, where it cannot
    tell more than that it failed.
    """

    state: str = ""
    why: str = ""


class Job(Protocol):
    """A point that was started. control: its control folder; kept: what finds the job again, for JSON."""

    control: Path
    kept: dict[str, Any]

    def running_s(self) -> float:
        """Seconds since it left the queue; 0 while it waits there."""

    def poll(self) -> End | None:
        """None while it goes on."""

    def stop(self) -> None:
        """End it, and come back when it has ended."""


class Runner(Protocol):
    """at_once: how many points may go on at the same time. goes_on: they do without this process, and `find` finds
    them again; else they are stopped with it.
    """

    at_once: int
    goes_on: bool

    def start(self, point: Point, folder: Path, attempt: int) -> Job:
        """Start an attempt at a point in its folder, where config.toml is."""

    def find(self, folder: Path, attempt: int, kept: dict[str, Any]) -> Job | None:
        """The job of an earlier process of this sweep if it goes on. UserError where it cannot be followed."""


@dataclass
class Record:
    """What is known of a point, kept as point.json in its folder.

    state: waiting, queued, running, interrupted, pruned or one of ENDED. step_s and rates: of the median step;
    step_s_p25, step_s_p75: quartiles; loss: nats a token at `step`; mfu: a share of 1; memory: the most of a rank.
    """

    state: str = "waiting"
    reason: str = ""
    attempt: int = 0
    began_unix_s: float | None = None
    ended_unix_s: float | None = None
    step: int | None = None
    loss: float | None = None
    tokens_per_s: float | None = None
    mfu: float | None = None
    step_s: float | None = None
    step_s_p25: float | None = None
    step_s_p75: float | None = None
    max_memory_bytes: int | None = None
    run_folder: str | None = None
    kept: dict[str, Any] = dataclasses.field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Whole or not at all."""
        draft = folder / f".{RECORD}"
        draft.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")
        os.replace(draft, folder / RECORD)


def read_record(folder: Path) -> Record:
    """A point's record; a fresh one where there is none."""
    row = read_row(folder / RECORD) or {}
    names = {field.name for field in dataclasses.fields(Record)}
    return Record(**{name: value for name, value in row.items() if name in names})


def classify(end: End, outcome: Outcome, ended_by_us: bool = False) -> tuple[str, str]:
    """(state, reason) of a point whose job has ended. ended_by_us: the sweep stopped it, and `end` says why."""
    if outcome.state == "done":
        return "done", ""
    if ended_by_us:
        return end.state, end.why
    if outcome.state == "saved" or outcome.why.startswith("stopped by "):
        return end.state or "interrupted", end.why or outcome.why or f"stopped as asked after step {outcome.step}"
    # That another rank went away is the word of one that was left: the runner may know why.
    if outcome.state in ENDED and not (outcome.state == "lost" and end.state):
        return outcome.state, outcome.why
    return end.state or "failed", end.why


@dataclass
class _Going:
    point: Point
    folder: Path
    job: Job
    record: Record


class Sweep:
    """points: those to run and those pruned. folder: of the sweep. retry: ended states that are run again.

    told: called at every news of a point. `records`: of every point, by name.
    """

    def __init__(
        self, points: list[Point], folder: Path, runner: Runner, limit_s: float,
        retry: tuple[str, ...] = (), told: Callable[[Point, Record], None] = lambda point, record: None,
    ) -> None:  # fmt: skip
        self._folder, self._runner, self._limit_s, self._told = folder, runner, limit_s, told
        self._waiting: list[Point] = []
        self._going: list[_Going] = []
        self.points = points
        self.records = {point.name: read_record(self._of(point)) for point in points}
        for point in points:
            record = self.records[point.name]
            if point.pruned:
                self.records[point.name] = Record("pruned", point.pruned)
            elif record.state in ("queued", "running") and (
                job := runner.find(self._of(point), record.attempt, record.kept)
            ):
                self._going.append(_Going(point, self._of(point), job, record))
            elif record.state not in ENDED or record.state in retry:
                self._waiting.append(point)

    @property
    def left(self) -> int:
        """Points that have not ended."""
        return len(self._waiting) + len(self._going)

    def run(self) -> None:
        """Run what is left. An error, or KeyboardInterrupt, stops what goes on, unless it can go on by itself."""
        try:
            while self._waiting or self._going:
                while self._waiting and len(self._going) < self._runner.at_once:
                    self._start(self._waiting.pop(0))
                time.sleep(POLL_S)
                for going in list(self._going):
                    self._look_after(going)
        except BaseException as error:
            why = "the sweep was interrupted" if isinstance(error, KeyboardInterrupt) else f"the sweep ended: {error}"
            for going in [] if self._runner.goes_on else list(self._going):
                self._stop(going, End("interrupted", why))
            raise

    def _of(self, point: Point) -> Path:
        return self._folder / "points" / point.name

    def _start(self, point: Point) -> None:
        folder, before = self._of(point), self.records[point.name]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.toml").write_text(to_toml(point.config))
        record = Record("running", attempt=before.attempt + 1, began_unix_s=time.time())
        self.records[point.name] = record
        record.write(folder)  # an attempt that ends here is not taken for the one before
        job = self._runner.start(point, folder, record.attempt)
        record.kept = job.kept
        record.write(folder)
        self._going.append(_Going(point, folder, job, record))

    def _look_after(self, going: _Going) -> None:
        end = going.job.poll()
        if end is not None:
            return self._end(going, end)
        outcome = read_outcome(going.job.control)
        if overdue := self._overdue(going, outcome):
            return self._stop(going, overdue)
        going.record.step = outcome.step
        going.record.state = "running" if going.job.running_s() else "queued"
        self._told(going.point, going.record)

    def _overdue(self, going: _Going, outcome: Outcome) -> End | None:
        """Whether a job has to be ended: it takes too long, or gives no sign of life."""
        where = f"{outcome.phase or 'starting'}, step {outcome.step or 0} of {going.point.config.training.steps}"
        if going.job.running_s() > self._limit_s:
            return End("timeout", f"not at its end after limit_s = {self._limit_s:.0f} s: {where}")
        beat = read_row(going.job.control / "HEARTBEAT")
        if beat and time.time() > beat["unix_s"] + beat["deadline_s"] + GRACE_S and outcome.state == "running":
            return End("hang", f"no sign of life for {time.time() - beat['unix_s']:.0f} s: {where}")
        return None

    def _stop(self, going: _Going, end: End) -> None:
        going.job.stop()
        self._end(going, end, ended_by_us=True)

    def _end(self, going: _Going, end: End, ended_by_us: bool = False) -> None:
        self._going.remove(going)
        outcome, record = read_outcome(going.job.control), going.record
        record.state, reason = classify(end, outcome, ended_by_us)
        reason = " ".join(reason.split())
        record.reason = reason if len(reason) <= LONGEST else reason[: LONGEST - 3] + "..."
        record.ended_unix_s, record.kept = time.time(), {}
        for name in ("step", "loss", "tokens_per_s", "mfu", "step_s", "max_memory_bytes"):
            setattr(record, name, getattr(outcome, name))
        if outcome.run_folder:
            record.run_folder = str(outcome.run_folder)
            record.step_s_p25, record.step_s_p75 = _quartiles(outcome.run_folder / "metrics.jsonl")
        record.write(going.folder)
        self._told(going.point, record)


def _quartiles(metrics: Path) -> tuple[float | None, float | None]:
    """Of the seconds a step, without the first step of each attempt, which is the warm-up."""
    steps = [row for row in (read_metrics(metrics) if metrics.exists() else []) if row.get("step_s")]
    attempts = [row.get("attempt") for row in steps]
    values = [row["step_s"] for i, row in enumerate(steps) if attempts.index(attempts[i]) != i]
    if len(values) < 2:
        return None, None
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high
