"""The state of jobs, from Slurm, the events of their batch scripts and the files of their runs."""

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtron.cluster.runs import Outcome, read_control_file, read_outcome
from dtron.cluster.slurm import FOLDER, queue_states
from dtron.errors import UserError

__all__ = ["JobStatus", "job_status", "list_jobs", "table"]

ENDED_BY_SLURM = {  # Slurm's state of an ended job -> ours
    "TIMEOUT": "timeout",
    "OUT_OF_MEMORY": "oom",
    "PREEMPTED": "preempted",
    "CANCELLED": "cancelled",
    "NODE_FAIL": "lost",
    "DEADLINE": "timeout",
}
NEVER_STARTS = (
    "PartitionNodeLimit",
    "PartitionTimeLimit",
    "AssocMaxNodePerJobLimit",
    "QOSMaxNodePerUserLimit",
    "BadConstraints",
)
FAILURES = ("oom", "hang", "nonfinite", "lost", "failed")  # outcomes of a run that explain why its job ended


@dataclass(frozen=True)
class JobStatus:
    """state: queued, running, stopping, preempted (and requeued), done, stopped (by a user), cancelled, timeout, oom,
    hang, nonfinite, lost, failed, ended. why: the reason; outcome: of its run; steps: training.steps.
    """

    name: str
    job_id: str
    state: str
    why: str
    restarts: int
    outcome: Outcome
    steps: int | None


def list_jobs(dump_folder: Path) -> list[JobStatus]:
    """Every job whose folder is in a dump folder, by folder name. UserError if there is none."""
    folders = sorted(path.parent for path in (dump_folder / FOLDER).glob("*/job.json"))
    if not folders:
        raise UserError(
            f"no jobs in {dump_folder / FOLDER}; give another job.dump_folder, or submit one with "
            "scripts/slurm/submit.py"
        )
    queue = queue_states()
    return [job_status(folder, queue) for folder in folders]


def job_status(folder: Path, queue: dict[str, tuple[str, str]]) -> JobStatus:
    """The status of one job; queue: from `queue_states`."""
    about = read_control_file(folder / "job.json") or {}
    job_id = str(about.get("job_id", ""))
    events, outcome = _events(folder), read_outcome(folder / "control")
    slurm, reason = queue.get(job_id) or _accounted_state(job_id)
    state, why = _state(slurm, reason, events, outcome)
    restarts = max((event["attempt"] for event in events), default=0)
    return JobStatus(folder.name, job_id, state, why, restarts, outcome, about.get("steps"))


def _state(slurm: str, reason: str, events: list[dict[str, Any]], outcome: Outcome) -> tuple[str, str]:
    last: dict[str, Any] = events[-1] if events else {"event": "", "detail": "", "unix_s": 0.0}
    what, detail = last["event"], last["detail"]
    if outcome.state == "done":
        return "done", ""
    if slurm in ("PENDING", "REQUEUED", "CONFIGURING"):
        queued = f"waiting: {reason}" if reason and reason != "None" else "waiting"
        if reason in NEVER_STARTS:
            queued += ", which will not change: the cluster has no such nodes or limits; scancel it and request others"
        if not events:
            return "queued", queued
        before = detail if what == "requeued" else _slurm_requeue_reason(reason)
        return "preempted" if "preempted" in before else "queued", f"{before}; {queued}"
    if slurm in ("RUNNING", "COMPLETING", "SUSPENDED"):
        if what == "stopping":
            return "stopping", detail
        is_new = what == "started" and last["unix_s"] > outcome.beat_unix_s  # the heartbeat is of the previous attempt
        return "running", "starting" if is_new else outcome.phase or "starting"
    if slurm in ENDED_BY_SLURM and outcome.state == "saved":
        return ENDED_BY_SLURM[slurm], f"saved at step {outcome.step}; submit it again to resume"
    if slurm in ENDED_BY_SLURM:
        return ENDED_BY_SLURM[slurm], outcome.why or detail
    if what == "stopped":
        return what, detail
    if outcome.state in FAILURES:
        return outcome.state, outcome.why
    if what == "hang" or (what in ("ended", "failed") and detail.startswith("hang")):
        return "hang", detail
    if what == "failed" or slurm in ("FAILED", "BOOT_FAIL"):
        return "failed", detail or f"Slurm says {slurm}: see logs/batch.log"
    if what in ("ended", "taken"):
        return "ended", detail
    return (
        "ended",
        "no reason recorded: cancelled, or over its time limit" if events else "before it started: cancelled",
    )


def _slurm_requeue_reason(reason: str) -> str:
    """Why Slurm requeued a job by itself, which the batch script cannot record."""
    return "a node was lost" if "Nodes" in reason or "NODE" in reason.upper() else "requeued by Slurm"


def _accounted_state(job_id: str) -> tuple[str, str]:
    """The state, from Slurm's accounting if there is any, of a job that has left the queue."""
    try:
        command = ["sacct", "-n", "-P", "-X", "-j", job_id, "-o", "State"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return "", ""
    words = done.stdout.split() if done.returncode == 0 else []  # "CANCELLED by 1000"
    return (words[0], "") if words else ("", "")


def _events(folder: Path) -> list[dict[str, Any]]:
    """The batch script's events; a line truncated by a kill is skipped."""
    rows = []
    path = folder / "events.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def table(jobs: list[JobStatus]) -> str:
    """One row per job, followed by its reason if there is one."""
    head = ["name", "job", "state", "step", "loss", "tokens/s", "MFU", "goodput", "restarts"]
    rows = [head] + [_cells(job) for job in jobs]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = []
    for i, row in enumerate(rows):
        cells = [cell.ljust(w) if n < 3 else cell.rjust(w) for n, (cell, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
        if i and jobs[i - 1].why:
            lines += [f"    {line}" for line in jobs[i - 1].why.splitlines()[:3]]
    return "\n".join(lines)


def _cells(job: JobStatus) -> list[str]:
    o = job.outcome
    share = [f"{value:.1%}" if value is not None else "-" for value in (o.mfu, o.goodput)]
    return [
        job.name, job.job_id or "-", job.state,
        f"{o.step if o.step is not None else '-'}/{job.steps or '?'}",
        f"{o.loss:.4f}" if o.loss is not None else "-",
        f"{o.tokens_per_s:,.0f}" if o.tokens_per_s is not None else "-",
        *share, str(job.restarts),
    ]  # fmt: skip
