"""The outcome of a run, read from its files: the control files (dtron/ranks/control.py) and metrics.jsonl."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtron.observe.metrics import read_metrics

__all__ = ["Outcome", "read_control_file", "read_outcome"]


@dataclass(frozen=True)
class Outcome:
    """state: done, saved (stopped on request), running (or killed), nonfinite, oom, hang, lost, failed; none if the run
    has written nothing. why: the message of a failure; run_folder: None if not created yet; phase, beat_unix_s: of its
    last heartbeat.

    Of the last logged step: `step`, `loss` (nats per token), `goodput` (a fraction), `max_memory_bytes` of any rank; of
    the median step: `tokens_per_s`, `step_s` and `mfu` (a fraction). Each None if unknown.
    """

    state: str = "none"
    why: str = ""
    phase: str = ""
    beat_unix_s: float = 0.0
    run_folder: Path | None = None
    step: int | None = None
    loss: float | None = None
    tokens_per_s: float | None = None
    step_s: float | None = None
    mfu: float | None = None
    goodput: float | None = None
    max_memory_bytes: int | None = None


def read_control_file(path: Path) -> dict[str, Any] | None:
    """The contents of a control file; None if it is missing or incomplete."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def read_outcome(control_folder: Path) -> Outcome:
    """From a control folder: the newest of DONE, SAVED and FAILED, or else HEARTBEAT."""
    rows = {name: read_control_file(control_folder / name) for name in ("DONE", "SAVED", "FAILED")}
    ended = {name: row for name, row in rows.items() if row is not None}
    beat = read_control_file(control_folder / "HEARTBEAT") or {}
    run_folder = Path(beat["run_folder"]) if "run_folder" in beat else None
    known: dict[str, Any] = {"run_folder": run_folder, "phase": beat.get("phase", ""), "step": beat.get("step")}
    known["beat_unix_s"] = beat.get("unix_s", 0.0)
    if run_folder is not None:
        known |= _read_metrics(run_folder)
    if not ended:
        return Outcome("running" if beat else "none", **known)
    name = max(ended, key=lambda name: ended[name]["unix_s"])
    if name != "FAILED":
        return Outcome(name.lower(), **{**known, "step": ended[name]["step"]})
    kind = ended[name]["kind"]
    return Outcome("failed" if kind in ("mistake", "error") else kind, ended[name]["message"], **known)


def _read_metrics(run_folder: Path) -> dict[str, Any]:
    path = run_folder / "metrics.jsonl"
    rows = read_metrics(path) if path.exists() else []
    steps = [row for row in rows if "loss" in row]
    found = {key: row[key] for row in rows for key in ("loss", "goodput", "max_memory_bytes") if row.get(key)}
    if steps:
        found["step"] = steps[-1]["step"]
        # The first step of an attempt compiles, connects and warms up.
        attempts = [row.get("attempt") for row in steps]
        later = [row for i, row in enumerate(steps) if attempts.index(attempts[i]) != i] or steps
        for key in ("tokens_per_s", "step_s", "mfu"):
            values = sorted(row[key] for row in later if row.get(key))
            if values:
                found[key] = values[len(values) // 2]
    return found
