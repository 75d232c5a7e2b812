"""What `dtron compare` finds: figures side by side, where runs part, and in which keys and versions they differ."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dtron.compare.runs import Run
from dtron.errors import UserError
from dtron.observe.console import human_bytes, human_count, human_seconds

__all__ = ["COMPARED", "Parting", "as_dict", "as_text", "common_steps", "part", "summaries"]

COMPARED = ("loss", "grad_norm")  # what --rtol judges
SHOWN_STEPS = 5
DEFAULT_RTOL = 1e-3  # from where on runs are said to part, unless --rtol is given


@dataclass(frozen=True)
class Parting:
    """Of one run beside the first. steps: compared; step, key, first, value: where they part, None if they do not.

    largest: of all relative differences, with its step and key.
    """

    steps: int
    step: int | None
    key: str | None
    first: float | None
    value: float | None
    largest: float
    largest_step: int
    largest_key: str


def common_steps(runs: Sequence[Run]) -> list[int]:
    """Steps that each run has a loss of. UserError if there are none."""
    common = set.intersection(*(run.steps() for run in runs))
    if not common:
        spans = "; ".join(f"{run.name} logged {_span(sorted(run.steps()))}" for run in runs)
        raise UserError(f"the runs have no logged step in common: {spans}; log them at equal steps (metrics.log_freq)")
    return sorted(common)


def _span(steps: list[int]) -> str:
    return f"{len(steps)} steps from {steps[0]} to {steps[-1]}"


def part(first: Run, other: Run, rtol: float | None) -> Parting:
    """Where `other` parts from `first`: at a common step, by more than rtol (`DEFAULT_RTOL`) of the first's value."""
    limit = DEFAULT_RTOL if rtol is None else rtol
    steps = sorted(first.steps() & other.steps())
    pairs = [(step, key, first.at(step, key), other.at(step, key)) for step in steps for key in COMPARED]
    # Where one has none, as picotron logs no gradient norm, nothing is compared.
    far = [(relative_difference(a, b), step, key, a, b) for step, key, a, b in pairs if a is not None and b is not None]
    largest, at, of = max(((d, -step, key) for d, step, key, *_ in far), default=(-1.0, -steps[0], "loss"))
    for difference, step, key, a, b in far:
        if difference > limit:
            return Parting(len(steps), step, key, a, b, largest, -at, of)
    return Parting(len(steps), None, None, None, None, largest, -at, of)


def relative_difference(a: float, b: float) -> float:
    """|b - a| / |a|; 0 where both are not finite, inf where one is."""
    if math.isfinite(a) != math.isfinite(b):
        return math.inf
    if a == b or not math.isfinite(a):
        return 0.0
    return abs(b - a) / abs(a) if a else math.inf


def summaries(run: Run, steps: Sequence[int]) -> dict[str, Any]:
    """The figures of one run: final, at common steps, medians. Keys and units are those of metrics.jsonl."""
    at = {key: {step: run.at(step, key) for step in steps} for key in COMPARED}
    return {
        "steps": run.rows[-1]["step"],
        "attempts": max((row.get("attempt", 1) for row in run.rows), default=1),
        "at": at,
        "loss": run.last("loss"),
        "grad_norm": run.last("grad_norm"),
        "validation_loss": run.last("validation_loss"),
        **{key: run.median(key) for key in ("tokens_per_s", "tokens_per_s_per_gpu", "mfu", "step_s")},
        "max_memory_bytes": run.most("max_memory_bytes"),
        "goodput": run.last("goodput"),
    }


Row = tuple[str, str, Callable[[float], str], bool]  # title, key, how it is written, whether a ratio to the first helps

ROWS: tuple[Row, ...] = (
    ("final loss", "loss", "{:.4f}".format, False),
    ("final gradient norm", "grad_norm", "{:.4f}".format, False),
    ("final validation loss", "validation_loss", "{:.4f}".format, False),
    ("median tokens/s", "tokens_per_s", human_count, True),
    ("median tokens/s per GPU", "tokens_per_s_per_gpu", human_count, True),
    ("median MFU", "mfu", "{:.1%}".format, False),
    ("median step time", "step_s", human_seconds, True),
    ("peak memory", "max_memory_bytes", human_bytes, True),
    ("goodput", "goodput", "{:.1%}".format, False),
)


def shown_steps(steps: Sequence[int]) -> list[int]:
    """At most `SHOWN_STEPS`, evenly over those in common, the first and the last among them."""
    n = min(SHOWN_STEPS, len(steps))
    return sorted({steps[round(i * (len(steps) - 1) / max(1, n - 1))] for i in range(n)})


def as_text(runs: Sequence[Run], partings: Sequence[Parting], rtol: float | None) -> str:
    """The table of figures, where the runs part, and the tables of keys and versions that differ."""
    steps = shown_steps(common_steps(runs))
    found = [summaries(run, steps) for run in runs]
    rows = [["", *(run.name for run in runs)], ["read from", *(_source(run) for run in runs)]]
    rows.append(["last step", *(str(each["steps"]) for each in found)])
    for key in COMPARED:
        title = "loss" if key == "loss" else "gradient norm"
        for step in steps:
            values = [each["at"][key][step] for each in found]
            if any(value is not None for value in values):
                rows.append([f"{title}, step {step}", *(_text("{:.4f}".format, value) for value in values)])
    for title, key, write, relative in ROWS:
        values = [each[key] for each in found]
        if any(value is not None for value in values):
            cells = [_text(write, value) for value in values]
            if relative and values[0]:
                cells[1:] = [
                    cell if value is None else f"{cell} ({value / values[0] - 1:+.1%})"
                    for cell, value in zip(cells[1:], values[1:], strict=True)
                ]
            rows.append([title, *cells])
    lines = [_table(rows), ""]
    lines += [_parting_text(runs[0], run, parting, rtol) for run, parting in zip(runs[1:], partings, strict=True)]
    known = [run for run in runs if run.config]
    if unknown := [run.name for run in runs if not run.config]:
        lines += ["", f"Configuration and versions are not recorded in {', '.join(unknown)}."]
    if len(known) > 1:
        lines += ["", _differing("keys", known, different_keys(known))]
        lines += ["", _differing("versions", known, different_versions(known))]
    return "\n".join(lines)


def _differing(title: str, runs: Sequence[Run], values: dict[str, list[Any]]) -> str:
    if not values:
        return f"The {title} are equal."
    cells = [[name, *("-" if value is None else str(value) for value in each)] for name, each in values.items()]
    return _table([[title, *(run.name for run in runs)], *cells])


def different_keys(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Keys of the configuration that differ -> the value of each run, None where a run does not have it."""
    return _different([run.config for run in runs])


def different_versions(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Versions and commits that differ -> that of each run, None where it is not recorded."""
    return _different([run.versions for run in runs])


def _different(tables: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    keys = dict.fromkeys(key for table in tables for key in table)
    values = {key: [table.get(key) for table in tables] for key in keys}
    return {key: each for key, each in values.items() if any(value != each[0] for value in each)}


def _source(run: Run) -> str:
    attempts = max((row.get("attempt", 1) for row in run.rows), default=1)
    return f"{run.kind}'s log" if run.kind != "dtron" else "dtron" + (f", {attempts} attempts" if attempts > 1 else "")


def _parting_text(first: Run, run: Run, p: Parting, rtol: float | None) -> str:
    limit = DEFAULT_RTOL if rtol is None else rtol
    if p.largest < 0:
        return f"{run.name} and {first.name} have no loss or gradient norm to compare"
    what = "loss and gradient norm"
    most = f"largest relative difference {_far(p.largest)}, of the {_word(p.largest_key)} at step {p.largest_step}"
    if p.step is None or p.key is None:
        return f"{run.name} agrees with {first.name} in {what} at {p.steps} common steps, to {limit:g}; {most}"
    values = f"{_word(p.key)} {p.value:.6g} against {p.first:.6g}"
    return f"{run.name} parts from {first.name} at step {p.step}, beyond {limit:g}: {values}; {most}"


def _far(difference: float) -> str:
    return "without bound (one is not finite)" if math.isinf(difference) else f"{difference:.2g}"


def _word(key: str) -> str:
    return {"grad_norm": "gradient norm"}.get(key, key)


def _text(write: Callable[[float], str], value: float | None) -> str:
    return "-" if value is None else "not finite" if not math.isfinite(value) else write(value)


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def as_dict(runs: Sequence[Run], partings: Sequence[Parting], rtol: float | None) -> dict[str, Any]:
    """The same for --json; a value that is not finite is null."""
    steps, known = common_steps(runs), [run for run in runs if run.config]
    every = [{"name": run.name, "path": str(run.path), "kind": run.kind, **summaries(run, steps)} for run in runs]
    found = [{"run": run.name, **vars(parting)} for run, parting in zip(runs[1:], partings, strict=True)]
    return _finite(
        {
            "runs": every,
            "rtol": DEFAULT_RTOL if rtol is None else rtol,
            "partings": found,
            "keys": different_keys(known),
            "versions": different_versions(known),
        }
    )


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
