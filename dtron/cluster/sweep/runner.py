"""Runs the points of a sweep that have not ended, and records how each ends.

A `Runner` starts and stops points: on this machine in local.py, as Slurm jobs in slurm.py.
"""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from dtron.cluster.runs import Outcome, read_control_file, read_outcome
from dtron.cluster.sweep.points import Point
from dtron.config import to_toml
from dtron.files import write_atomically
from dtron.observe.metrics import read_metrics

__all__ = ["ENDED", "End", "Job", "Record", "Runner", "Sweep", "classify", "read_record"]

ENDED = ("done", "oom", "hang", "timeout", "nonfinite", "lost", "failed")  # rerun only with --retry
GRACE_S = 60.0  # beyond the deadline of a heartbeat
POLL_S = 0.5
RECORD_NAME = "point.json"
MAX_REASON_CHARS = 300


@dataclass(frozen=True)
class End:
    """How a job ended as seen by its runner, used if the run recorded no outcome. state: empty if only the failure is
    known.
    """

    state: str = ""
    why: str = ""


class Job(Protocol):
    """A started point. control: its control folder; handle: JSON values by which `Runner.find` finds it again."""

    control: Path
    handle: dict[str, Any]

    def running_s(self) -> float:
        """Seconds since it left the queue; 0 while queued."""

    def poll(self) -> End | None:
        """How it ended; None while it is queued or running."""

    def stop(self) -> None:
        """Stop it and wait until it has ended."""


class Runner(Protocol):
    """at_once: how many points may run at a time. outlives_sweep: they continue without this process, and `find` finds
    them again; otherwise they are stopped with it.
    """

    at_once: int
    outlives_sweep: bool

    def start(self, point: Point, folder: Path, attempt: int) -> Job:
        """Start an attempt at a point in its folder, where config.toml is."""

    def find(self, folder: Path, attempt: int, handle: dict[str, Any]) -> Job | None:
        """The job of an earlier process of this sweep if it still runs. UserError if it cannot be monitored."""


@dataclass
class Record:
    """The state and results of a point, stored as point.json in its folder.

    state: waiting, queued, running, interrupted, pruned or one of ENDED. step_s and rates: of the median step;
    step_s_p25, step_s_p75: quartiles; loss: nats per token at `step`; mfu: a fraction; max_memory_bytes: the largest
    of any rank; kept: the job's handle while it runs.
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
        """Write point.json atomically."""
        write_atomically(folder / RECORD_NAME, json.dumps(dataclasses.asdict(self), indent=1) + "\n")


def read_record(folder: Path) -> Record:
    """A point's record; a new one if there is none."""
    row = read_control_file(folder / RECORD_NAME) or {}
    names = {field.name for field in dataclasses.fields(Record)}
    return Record(**{name: value for name, value in row.items() if name in names})


def classify(end: End, outcome: Outcome, ended_by_us: bool = False) -> tuple[str, str]:
    """(state, reason) of a point whose job has ended. ended_by_us: the sweep stopped it, and `end` says why."""
    if outcome.state == "done":
        return "done", ""
    if ended_by_us:
        return end.state, end.why
    if outcome.state == "saved" or outcome.why.startswith("stopped by "):
        return end.state or "interrupted", end.why or outcome.why or f"stopped on request after step {outcome.step}"
    # "lost" is what a surviving rank reports of another: the runner may know why that one ended.
    if outcome.state in ENDED and not (outcome.state == "lost" and end.state):
        return outcome.state, outcome.why
    return end.state or "failed", end.why


@dataclass
class _ActivePoint:
    point: Point
    folder: Path
    job: Job
    record: Record
    beat: dict[str, Any] | None = None  # the last heartbeat seen, and when by time.monotonic
    beat_s: float = 0.0


class Sweep:
    """points: those to run and those pruned. folder: of the sweep. retry: ended states that are rerun.

    on_update: called whenever a point's record changes. `records`: of every point, by name.
    """

    def __init__(
        self, points: list[Point], folder: Path, runner: Runner, limit_s: float,
        retry: tuple[str, ...] = (), on_update: Callable[[Point, Record], None] = lambda point, record: None,
    ) -> None:  # fmt: skip
        self._folder, self._runner, self._limit_s, self._on_update = folder, runner, limit_s, on_update
        self._to_run: list[Point] = []
        self._active: list[_ActivePoint] = []
        self.points = points
        self.records = {point.name: read_record(self._point_folder(point)) for point in points}
        for point in points:
            record = self.records[point.name]
            if point.pruned:
                self.records[point.name] = Record("pruned", point.pruned)
            elif record.state in ("queued", "running") and (
                job := runner.find(self._point_folder(point), record.attempt, record.kept)
            ):
                self._active.append(_ActivePoint(point, self._point_folder(point), job, record))
            elif record.state not in ENDED or record.state in retry:
                self._to_run.append(point)

    @property
    def left(self) -> int:
        """Points that have not ended."""
        return len(self._to_run) + len(self._active)

    def run(self) -> None:
        """Run points that have not ended. An error or KeyboardInterrupt stops running ones, unless they outlive it."""
        try:
            while self._to_run or self._active:
                while self._to_run and len(self._active) < self._runner.at_once:
                    self._start(self._to_run.pop(0))
                time.sleep(POLL_S)
                for active in list(self._active):
                    self._monitor(active)
        except BaseException as error:
            why = "the sweep was interrupted" if isinstance(error, KeyboardInterrupt) else f"the sweep ended: {error}"
            for active in [] if self._runner.outlives_sweep else list(self._active):
                self._stop(active, End("interrupted", why))
            raise

    def _point_folder(self, point: Point) -> Path:
        return self._folder / "points" / point.name

    def _start(self, point: Point) -> None:
        folder, before = self._point_folder(point), self.records[point.name]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.toml").write_text(to_toml(point.config))
        record = Record("running", attempt=before.attempt + 1, began_unix_s=time.time())
        self.records[point.name] = record
        record.write(folder)  # if the sweep is killed here, the attempt is not taken for the previous one
        job = self._runner.start(point, folder, record.attempt)
        record.kept = job.handle
        record.write(folder)
        self._active.append(_ActivePoint(point, folder, job, record))

    def _monitor(self, active: _ActivePoint) -> None:
        end = active.job.poll()
        if end is not None:
            return self._end(active, end)
        outcome = read_outcome(active.job.control)
        if overdue := self._overdue(active, outcome):
            return self._stop(active, overdue)
        active.record.step = outcome.step
        active.record.state = "running" if active.job.running_s() else "queued"
        self._on_update(active.point, active.record)

    def _overdue(self, active: _ActivePoint, outcome: Outcome) -> End | None:
        """Why a job has to be stopped, if it does: over its time limit, or no heartbeat."""
        where = f"{outcome.phase or 'starting'}, step {outcome.step or 0} of {active.point.config.training.steps}"
        if active.job.running_s() > self._limit_s:
            return End("timeout", f"not finished after limit_s = {self._limit_s:.0f} s: {where}")
        beat = read_control_file(active.job.control / "HEARTBEAT")
        if beat is None:
            return None
        if beat != active.beat:
            active.beat, active.beat_s = beat, time.monotonic()
        # Also by how long it has not changed here: the clock of the job's machine may be ahead.
        silent_s = max(time.time() - beat["unix_s"], time.monotonic() - active.beat_s)
        if silent_s > beat["deadline_s"] + GRACE_S and outcome.state == "running":
            return End("hang", f"no heartbeat for {silent_s:.0f} s: {where}")
        return None

    def _stop(self, active: _ActivePoint, end: End) -> None:
        active.job.stop()
        self._end(active, end, ended_by_us=True)

    def _end(self, active: _ActivePoint, end: End, ended_by_us: bool = False) -> None:
        self._active.remove(active)
        outcome, record = read_outcome(active.job.control), active.record
        record.state, reason = classify(end, outcome, ended_by_us)
        reason = " ".join(reason.split())
        record.reason = reason if len(reason) <= MAX_REASON_CHARS else reason[: MAX_REASON_CHARS - 3] + "..."
        record.ended_unix_s, record.kept = time.time(), {}
        for name in ("step", "loss", "tokens_per_s", "mfu", "step_s", "max_memory_bytes"):
            setattr(record, name, getattr(outcome, name))
        if outcome.run_folder:
            record.run_folder = str(outcome.run_folder)
            record.step_s_p25, record.step_s_p75 = _quartiles(outcome.run_folder / "metrics.jsonl")
        record.write(active.folder)
        self._on_update(active.point, record)


def _quartiles(metrics: Path) -> tuple[float | None, float | None]:
    """Quartiles of the seconds per step, without each attempt's first step, the warm-up."""
    steps = [row for row in (read_metrics(metrics) if metrics.exists() else []) if row.get("step_s")]
    attempts = [row.get("attempt") for row in steps]
    values = [row["step_s"] for i, row in enumerate(steps) if attempts.index(attempts[i]) != i]
    if len(values) < 2:
        return None, None
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high
