"""Runs the points of a sweep as Slurm jobs, which continue without the sweep; it finds them again."""

import dataclasses
import json
import subprocess
import time
from pathlib import Path
from typing import Any

from dtron.cluster.slurm import SlurmJob, SlurmOptions, queue_states, submit
from dtron.cluster.status import JobStatus, job_status
from dtron.cluster.sweep.points import Point
from dtron.cluster.sweep.runner import ENDED, End, Job

__all__ = ["SlurmRunner", "SubmittedJob", "slurm_options"]

QUERY_S = 5.0  # between queries to the controller, which all users share
UNREPORTED_S = 30.0  # out of the queue without an outcome: its files may not be visible yet, or squeue may have failed
STOP_S = 120.0
STARTING_S = 900.0  # added to limit_s for the job's time limit
SAVE_S = 60  # before Slurm's time limit; short, as a point saves nothing
SLURM_ENDED = {
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "DEADLINE",
    "OUT_OF_MEMORY",
    "NODE_FAIL",
    "PREEMPTED",
    "BOOT_FAIL",
}


def slurm_options(given: dict[str, Any], nodes: int, ranks_per_node: int, limit_s: float) -> SlurmOptions:
    """Options of a point's job, which never requeues itself. given: fields of SlurmOptions from the command line."""
    minutes = -(-int(limit_s + STARTING_S) // 60)
    defaults: dict[str, Any] = {"time": f"{minutes // 60}:{minutes % 60:02d}:00", "save_s": SAVE_S, "nodes": nodes}
    defaults |= {"ranks_per_node": ranks_per_node, "requeue": False, "preflight": False}
    return SlurmOptions(**(defaults | given))


class SlurmRunner:
    """Submits each point as a job with `options`; at_once: how many may be queued or running."""

    outlives_sweep = True

    def __init__(self, options: SlurmOptions, at_once: int) -> None:
        self.at_once = at_once
        self._options = options
        self._queue: dict[str, tuple[str, str]] = {}
        self._queried_s = -QUERY_S

    def start(self, point: Point, folder: Path, attempt: int) -> "SubmittedJob":
        options = dataclasses.replace(self._options, name=point.name)
        argv = ["--job.config_file", str(folder / "config.toml"), "--job.dump_folder", str(folder)]
        return SubmittedJob(self, submit(argv, options, lambda text: None))

    def find(self, folder: Path, attempt: int, handle: dict[str, Any]) -> Job | None:
        return SubmittedJob(self, SlurmJob(Path(handle["folder"]), handle["job_id"])) if "job_id" in handle else None

    def queue(self) -> dict[str, tuple[str, str]]:
        """The result of `queue_states`, at most a few seconds old."""
        if time.monotonic() - self._queried_s >= QUERY_S:
            self._queue, self._queried_s = queue_states(), time.monotonic()
        return self._queue


class SubmittedJob:
    """A job that is queued, running or ended."""

    def __init__(self, runner: SlurmRunner, job: SlurmJob) -> None:
        self.control = job.control
        self.handle: dict[str, Any] = {"job_id": job.job_id, "folder": str(job.folder.absolute())}
        self._runner, self._job = runner, job
        self._seen_s = time.monotonic()  # last in the queue

    def running_s(self) -> float:
        try:
            first = (self._job.folder / "events.jsonl").read_text().splitlines()[0]
            return max(0.001, time.time() - json.loads(first)["unix_s"])
        except (OSError, ValueError, IndexError):
            return 0.0

    def poll(self) -> End | None:
        queue = self._runner.queue()
        state = queue.get(self._job.job_id, ("", ""))[0]
        if state and state not in SLURM_ENDED:
            self._seen_s = time.monotonic()
            return None
        status = job_status(self._job.folder, queue)
        reported = status.outcome.state == "done" or status.outcome.state in ENDED
        if not state and not reported and time.monotonic() - self._seen_s < UNREPORTED_S:
            return None
        return _end(status)

    def stop(self) -> None:
        subprocess.run(["scancel", self._job.job_id], capture_output=True, timeout=60)
        end = time.monotonic() + STOP_S
        while self.poll() is None and time.monotonic() < end:
            time.sleep(QUERY_S)


def _end(status: JobStatus) -> End:
    """The state of an ended job as a point's."""
    if status.state in ("preempted", "cancelled", "stopped") or "preempted" in status.why:
        return End("interrupted", f"{status.state}: {status.why}" if status.why else status.state)
    if status.state == "ended" and "time limit" in status.why and "cancelled" not in status.why:
        return End("timeout", f"Slurm's: {status.why}")
    return End(status.state if status.state in ENDED else "", status.why)
