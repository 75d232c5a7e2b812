"""What is known of a run, from its run folder or from the log of another trainer."""

import os
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dtron.compare.logs import read_log
from dtron.config.toml import parse_file
from dtron.errors import UserError
from dtron.observe.metrics import read_metrics
from dtron.train.versions import read_versions

__all__ = ["Run", "name_runs", "read_run"]


@dataclass
class Run:
    """kind: dtron, torchtitan or picotron. rows: one per step, with the keys and units of metrics.jsonl.

    config: key -> value of the newest attempt, and versions: name -> version; both empty of a log.
    """

    path: Path
    kind: str
    rows: list[dict[str, Any]]
    config: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    name: str = ""

    def at(self, step: int, key: str) -> float | None:
        """A value of one step: nan where it was not finite, None where there is none."""
        row: dict[str, Any] = next((row for row in self.rows if row["step"] == step), {})
        return float("nan") if key in row.get("nonfinite", ()) else row.get(key)

    def steps(self, key: str = "loss") -> set[int]:
        """The steps that have a value, finite or not."""
        return {row["step"] for row in self.rows if row.get(key) is not None or key in row.get("nonfinite", ())}

    def last(self, key: str) -> float | None:
        """The last value that is known."""
        return next((row[key] for row in reversed(self.rows) if row.get(key) is not None), None)

    def most(self, key: str) -> float | None:
        """The largest value."""
        return max((row[key] for row in self.rows if row.get(key) is not None), default=None)

    def median(self, key: str) -> float | None:
        """Without the first step of each attempt, which compiles, connects and warms up, if there are others."""
        rows = [row for row in self.rows if row.get(key) is not None]
        attempts = [row.get("attempt") for row in rows]
        later = [row for i, row in enumerate(rows) if attempts.index(attempts[i]) != i] or rows
        return statistics.median(row[key] for row in later) if later else None


def read_run(path: Path) -> Run:
    """A run folder, its metrics.jsonl, or a log. UserError where it holds no step."""
    if not path.exists():
        raise UserError(f"{path} does not exist; expected a run folder, such as outputs/NAME, or a log file")
    folder = path if path.is_dir() else path.parent if path.name == "metrics.jsonl" else None
    if folder is None:
        kind, rows = read_log(path)
        if not rows:
            raise UserError(
                f"{path} has no line that can be read as a step of torchtitan (step: 10  loss: 7.1) or of picotron "
                "(Step: 10 | Loss: 7.1); of a run of dtron give its run folder"
            )
        return Run(path, kind, rows)
    metrics = folder / "metrics.jsonl"
    if not metrics.exists():
        raise UserError(f"{folder} is no run folder: it has no metrics.jsonl; give one, such as outputs/NAME")
    run = Run(folder, "dtron", read_metrics(metrics))
    if not run.steps():
        raise UserError(f"{metrics} has no row with a loss: the run ended before its first logged step")
    attempts = sorted(folder.glob("config-attempt-*.toml"), key=lambda file: int(re.sub(r"\D", "", file.stem) or 0))
    config = attempts[-1] if attempts else folder / "config.toml"
    if config.exists():
        run.config = _flat(parse_file(config, "the run folder"))
        run.versions = read_versions(config.read_text())
    return run


def _flat(tables: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"training": {"steps": 1}} -> {"training.steps": 1}."""
    flat: dict[str, Any] = {}
    for name, value in tables.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def name_runs(runs: Sequence[Run]) -> None:
    """Name each run by its file, as much of the path in front as tells them apart, numbered where nothing does."""
    parts = [Path(os.path.abspath(run.path)).parts for run in runs]
    names = [each[-1] for each in parts]
    for length in range(2, max(map(len, parts)) + 1 if len(set(parts)) == len(parts) else 2):
        if len(set(names)) == len(names):
            break
        names = ["/".join(each[-length:]) for each in parts]
    for i, (run, name) in enumerate(zip(runs, names, strict=True)):
        run.name = name if names.count(name) == 1 else f"{name} ({i + 1})"
