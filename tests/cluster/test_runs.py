"""The outcome of a run, read from its files."""

import json
from pathlib import Path
from typing import Any

import pytest

from dtron.cluster.runs import read_outcome


def write(path: Path, *rows: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_missing_and_truncated_files_are_no_outcome(tmp_path: Path) -> None:
    assert read_outcome(tmp_path / "missing").state == "none"
    (tmp_path / "HEARTBEAT").write_text("{")
    assert read_outcome(tmp_path).state == "none"


def test_a_running_run(tmp_path: Path) -> None:
    write(tmp_path / "HEARTBEAT", {"phase": "training", "step": 5, "deadline_s": 60, "run_folder": str(tmp_path / "r")})
    assert (read_outcome(tmp_path).state, read_outcome(tmp_path).step) == ("running", 5)
    rows: list[dict[str, Any]] = [
        {"step": 1, "attempt": 1, "loss": 9.0, "tokens_per_s": 1.0, "step_s": 90.0, "goodput": 0.0},
        {"step": 2, "attempt": 1, "loss": 8.0, "tokens_per_s": 100.0, "step_s": 1.0, "mfu": 0.4},
        {"step": 3, "attempt": 2, "loss": 7.0, "tokens_per_s": 2.0, "step_s": 80.0},
        {"step": 4, "attempt": 2, "loss": 6.0, "tokens_per_s": 110.0, "step_s": 0.9, "mfu": 0.5},
        {"step": 5, "attempt": 2, "loss": 5.0, "tokens_per_s": 105.0, "step_s": 0.95, "mfu": 0.45},
        {"step": 5, "attempt": 2, "goodput": 0.7, "max_memory_bytes": 3},
    ]
    write(tmp_path / "r" / "metrics.jsonl", *rows)
    seen = read_outcome(tmp_path)
    assert (seen.loss, seen.tokens_per_s, seen.step_s, seen.mfu) == (5.0, 105.0, 0.95, 0.45)
    assert (seen.goodput, seen.max_memory_bytes, seen.phase) == (0.7, 3, "training")


@pytest.mark.parametrize(
    ("kind", "state"),
    [("mistake", "failed"), ("error", "failed"), ("oom", "oom"), ("hang", "hang"), ("nonfinite", "nonfinite")],
)
def test_failures(tmp_path: Path, kind: str, state: str) -> None:
    write(tmp_path / "SAVED", {"step": 4, "checkpoint": "c", "unix_s": 1.0})
    write(tmp_path / "FAILED", {"kind": kind, "message": "because", "rank": 0, "unix_s": 2.0})
    assert (read_outcome(tmp_path).state, read_outcome(tmp_path).why) == (state, "because")


def test_the_newest_file_counts(tmp_path: Path) -> None:
    write(tmp_path / "FAILED", {"kind": "oom", "message": "m", "rank": 0, "unix_s": 1.0})
    write(tmp_path / "DONE", {"step": 9, "unix_s": 2.0})
    assert (read_outcome(tmp_path).state, read_outcome(tmp_path).step) == ("done", 9)
