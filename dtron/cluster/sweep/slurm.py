"""The points of a sweep as jobs of Slurm, several at a time. They go on without the sweep, which finds them again."""

import dataclasses
import json
import subprocess
import time
from pathlib import Path
from typing import Any

from dtron.cluster.slurm import SlurmJob, SlurmOptions, states, submit
from dtron.cluster.status import JobStatus, job_status
from dtron.cluster.sweep.points import Point
from dtron.cluster.sweep.runner import ENDED, End, Job

__all__ = ["SlurmRunner", "Submitted", "slurm_options"]

QUERY_S = 5.0  # between two questions to the controller, which all users share
MISSING_S = 30.0  # out of the queue and without a word: the files may still be on their way, or squeue have failed
STOP_S = 120.0
STARTING_S = 900.0  # that a job is given beside limit_s
SAVE_S = 60  # before Slurm's time limit; a point has nothing to save
OVER = {
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
    """given: fields of SlurmOptions from the command line. A point is measured once: its job does not requeue."""
    minutes = -(-int(limit_s + STARTING_S) // 60)
    own: dict[str, Any] = {"time": f"{minutes // 60}:{minutes % 60:02d}:00", "save_s": SAVE_S, "nodes": nodes}
    own |= {"ranks_per_node": ranks_per_node, "requeue": False, "preflight": False}
    return SlurmOptions(**(own | given))


class SlurmRunner:
    """Submits each point as a job with `options`; at_once: how many may be in the queue."""

    goes_on = True

    def __init__(self, options: SlurmOptions, at_once: int) -> None:
        self.at_once = at_once
        self._options = options
        self._queue: dict[str, tuple[str, str]] = {}
        self._asked_s = -QUERY_S

    def start(self, point: Point, folder: Path, attempt: int) -> "Submitted":
        options = dataclasses.replace(self._options, name=point.name)
        argv = ["--job.config_file", str(folder / "config.toml"), "--job.dump_folder", str(folder)]
        return Submitted(self, submit(argv, options, lambda text: None))

    def find(self, folder: Path, attempt: int, kept: dict[str, Any]) -> Job | None:
        return Submitted(self, SlurmJob(Path(kept["folder"]), kept["job_id"])) if "job_id" in kept else None

    def queue(self) -> dict[str, tuple[str, str]]:
        """What `slurm.states` said, a few seconds ago at most."""
        if time.monotonic() - self._asked_s >= QUERY_S:
            self._queue, self._asked_s = states(), time.monotonic()
        return self._queue


class Submitted:
    """A job that waits, runs or is over."""

    def __init__(self, runner: SlurmRunner, job: SlurmJob) -> None:
        self.control = job.control
        self.kept: dict[str, Any] = {"job_id": job.job_id, "folder": str(job.folder.absolute())}
        self._runner, self._job = runner, job
        self._seen_s = time.monotonic()  # in the queue

    def running_s(self) -> float:
        try:
            first = (self._job.folder / "events.jsonl").read_text().splitlines()[0]
            return max(0.001, time.time() - json.loads(first)["unix_s"])
        except (OSError, ValueError, IndexError):
            return 0.0

    def poll(self) -> End | None:
        queue = self._runner.queue()
        word = queue.get(self._job.job_id, ("", ""))[0]
        if word and word not in OVER:
            self._seen_s = time.monotonic()
            return None
        status = job_status(self._job.folder, queue)
        told = status.outcome.state == "done" or status.outcome.state in ENDED
        if not word and not told and time.monotonic() - self._seen_s < MISSING_S:
            return None
        return _end(status)

    def stop(self) -> None:
        subprocess.run(["scancel", self._job.job_id], capture_output=True, timeout=60)
        end = time.monotonic() + STOP_S
        while self.poll() is None and time.monotonic() < end:
            time.sleep(QUERY_S)


def _end(status: JobStatus) -> End:
    """The state of a job that is over, as a point's."""
    if status.state in ("preempted", "cancelled", "stopped") or "preempted" in status.why:
        return End("interrupted", f"{status.state}: {status.why}" if status.why else status.state)
    if status.state == "ended" and "time limit" in status.why and "cancelled" not in status.why:
        return End("timeout", f"Slurm's: {status.why}")
    return End(status.state if status.state in ENDED else "", status.why)
