"""The results of a sweep: rows, best first; a CSV; a table for the terminal; the recommended layout in one sentence."""

import csv
import io
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtron.cluster.sweep.file import DEGREES
from dtron.cluster.sweep.points import Point
from dtron.cluster.sweep.runner import ENDED, Record
from dtron.config import flatten
from dtron.config.toml import toml_value
from dtron.files import write_atomically
from dtron.observe.console import human_bytes, human_count

__all__ = [
    "DEGREE_COLUMNS",
    "Row",
    "advice",
    "columns",
    "common_settings",
    "format_table",
    "label",
    "loss_notes",
    "rank_points",
    "write_csv",
]

# Relative to the median, how far losses of points that must agree may differ: the fp32 value was measured, see
# docs/elastic.md; bf16 rounds every product to 3 digits, differently on each layout.
LOSS_TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2}
# Keys with their own column, and prefixes of such keys.
OWN_COLUMNS = (
    "training.local_batch_size",
    "training.global_batch_size",
    "activation_checkpoint.",
    "model.name",
    "model.flavor",
)
IN_CSV = ("training.local_batch_size", "training.global_batch_size", "training.seq_len")  # under names with units
DEGREE_COLUMNS = {
    "pp": "pp",
    "rep": "dp_replicate",
    "dp": "dp_shard",
    "cp": "cp",
    "tp": "tp",
}  # short name -> field of Degrees
UNFINISHED = ("interrupted", "running", "queued", "waiting")
STATES = (*ENDED, *UNFINISHED, "pruned")


@dataclass(frozen=True)
class Row:
    """A point and its record. best: the fastest of its model and sequence length whose loss agrees with the others."""

    point: Point
    record: Record
    best: bool = False
    loss_differs: bool = False

    @property
    def done(self) -> bool:
        return self.record.state == "done" and self.record.tokens_per_s is not None

    @property
    def tokens_per_s_per_gpu(self) -> float | None:
        speed = self.record.tokens_per_s
        return None if speed is None else speed / self.point.degrees.world

    @property
    def rate_range(self) -> tuple[float, float] | None:
        """Tokens/s at the slow and the fast quartile of the steps."""
        r = self.record
        if not (r.tokens_per_s and r.step_s and r.step_s_p25 and r.step_s_p75):
            return None
        tokens = r.tokens_per_s * r.step_s
        return tokens / r.step_s_p75, tokens / r.step_s_p25

    @property
    def group(self) -> tuple[str, int | None, int]:
        """Speeds are comparable only within one model and sequence length."""
        return self.point.model, self.point.parameters, self.point.config.training.seq_len


def rank_points(points: Sequence[Point], records: dict[str, Record]) -> list[Row]:
    """All points: the finished ones by model, fastest first; then the others by state."""
    rows = [Row(point, records[point.name]) for point in points]
    odd = _differing_losses(rows)
    done = sorted((row for row in rows if row.done), key=lambda row: -(row.record.tokens_per_s or 0))
    groups = list(dict.fromkeys(row.group for row in done))
    ordered: list[Row] = []
    for group in groups:
        here = [row for row in done if row.group == group]
        best = next((row for row in here if row.point.name not in odd), None)
        ordered += [Row(row.point, row.record, row is best, row.point.name in odd) for row in here]
    rest = [row for row in rows if not row.done]
    return ordered + sorted(rest, key=lambda row: STATES.index(row.record.state))


def _differing_losses(rows: Sequence[Row]) -> dict[str, float]:
    """Point -> relative difference of its last loss from the median of points that must agree, if too large."""
    odd: dict[str, float] = {}
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        if row.done and row.record.loss:
            groups.setdefault(row.point.same_loss, []).append(row)
    for group in groups.values():
        usual = statistics.median_low([row.record.loss or 0.0 for row in group])
        for row in group:
            away = abs((row.record.loss or 0.0) - usual) / usual
            if away > LOSS_TOLERANCE[row.point.config.training.mixed_precision_param]:
                odd[row.point.name] = away
    return odd


def loss_notes(rows: Sequence[Row]) -> list[str]:
    """One line per point whose loss differs from those with the same model, data and batch."""
    odd, notes = _differing_losses(rows), []
    for row in rows:
        if away := odd.get(row.point.name):
            same = [r.record.loss or 0.0 for r in rows if r.done and r.point.same_loss == row.point.same_loss]
            notes.append(
                f"losses differ: {label(row, rows)} ends at {row.record.loss:.5f} and the {len(same) - 1} other(s) of "
                f"the same training at {statistics.median_low(same):.5f} ({away:.1e} relative), but all "
                "layouts must agree: find out why before using it"
            )
    return notes


def varying(rows: Sequence[Row]) -> list[str]:
    """Keys besides the degrees that the sweep sets and that differ between points."""
    names = dict.fromkeys(name for row in rows for name in row.point.settings if name not in (*DEGREES, "base"))
    values = [flatten(row.point.config) for row in rows]
    return [name for name in names if len({repr(value[name]) for value in values}) > 1]


def columns(row: Row, rows: Sequence[Row]) -> dict[str, str]:
    """Short cells with the settings that differ between points."""
    d, c = row.point.degrees, flatten(row.point.config)
    cells = {}
    if len({r.point.model for r in rows}) > 1:
        cells["model"] = row.point.model
    for short, name in DEGREE_COLUMNS.items():
        if any(getattr(r.point.degrees, name) > 1 for r in rows):
            degree = getattr(d, name)
            cells[short] = str(degree) if degree > 0 else "?"
    if len({r.point.config.training.local_batch_size for r in rows}) > 1:
        cells["local"] = str(row.point.config.training.local_batch_size)
    if len({r.point.global_batch for r in rows}) > 1:
        cells["global"] = str(row.point.global_batch)
    if len({r.point.recompute for r in rows}) > 1:
        cells["recompute"] = row.point.recompute
    for name in varying(rows):
        if not name.startswith(OWN_COLUMNS):
            cells[name.rpartition(".")[2]] = _cell_text(c[name])
    return cells


def _cell_text(value: Any) -> str:
    if value is None:
        return "none"
    return value if isinstance(value, str) else toml_value(value)


def common_settings(rows: Sequence[Row]) -> str:
    """The most important settings that all points share."""
    p = rows[0].point
    facts: dict[str, set[Any]] = {
        f"{p.config.training.steps} steps per point": {r.point.config.training.steps for r in rows},
        f"{p.parameters or 0:,} parameters": {r.point.parameters for r in rows if r.point.parameters},
        f"global batch {p.global_batch} x {p.config.training.seq_len} tokens": {
            (r.point.global_batch, r.point.config.training.seq_len) for r in rows
        },
        f"local batch {p.config.training.local_batch_size}": {r.point.config.training.local_batch_size for r in rows},
        f"recompute {p.recompute}": {r.point.recompute for r in rows},
        f"compile {'on' if p.config.compile.enable else 'off'}": {r.point.config.compile.enable for r in rows},
        f"compute in {p.config.training.mixed_precision_param}": {
            r.point.config.training.mixed_precision_param for r in rows
        },
    }
    return ", ".join(text for text, values in facts.items() if len(values) == 1)


def label(row: Row, rows: Sequence[Row]) -> str:
    """Short description of a point: 'dp 2 x tp 2, local 4, recompute none'."""
    cells = columns(row, rows)
    rest = [f"{name} {text}" for name, text in cells.items() if name not in ("model", *DEGREE_COLUMNS)]
    return ", ".join([*([cells["model"]] if "model" in cells else []), str(row.point.degrees), *rest])


def advice(rows: Sequence[Row]) -> list[str]:
    """For each model: the recommended point, and those as fast within the spread of their steps."""
    prefix = "so far, " if any(row.record.state in UNFINISHED for row in rows) else ""
    lines = []
    for best in (row for row in rows if row.best):
        r = best.record
        speed = f"{human_count(r.tokens_per_s or 0)} tokens/s"
        mfu = "" if r.mfu is None else f" (MFU {r.mfu:.1%})"
        memory = "" if r.max_memory_bytes is None else f", {human_bytes(r.max_memory_bytes)} per rank"
        lines.append(f"{prefix}take {label(best, rows)}: {speed}{mfu}{memory}{_compare_with_next(best, rows)}")
    return lines


def _compare_with_next(best: Row, rows: Sequence[Row]) -> str:
    """How the best point compares with the next ones."""
    others = [row for row in rows if row.done and row.group == best.group and row is not best]
    if not others:
        return ""
    near = [row for row in others if _overlap(best, row)]
    if not near:
        ratio = (best.record.tokens_per_s or 0) / (others[0].record.tokens_per_s or 1)
        ahead = f"{ratio - 1:.0%} more than" if ratio < 2 else f"{ratio:.1f} times"
        return f"; {ahead} the next, {label(others[0], rows)}"
    least = min(near, key=lambda row: row.record.max_memory_bytes or 0)
    text = f"; equally fast within the spread of the steps: {len(near)} other(s), first {label(near[0], rows)}"
    if (least.record.max_memory_bytes or 0) < 0.98 * (best.record.max_memory_bytes or 0):
        text += f"; least memory: {label(least, rows)}, {human_bytes(least.record.max_memory_bytes or 0)}"
    return text


def _overlap(one: Row, other: Row) -> bool:
    a, b = one.rate_range, other.rate_range
    return a is not None and b is not None and a[0] <= b[1] and b[0] <= a[1]


def format_table(rows: Sequence[Row]) -> str:
    """For the terminal: the best first, marked *; only figures that some point has."""
    figures: dict[str, Callable[[Row], str]] = {
        "tokens/s": lambda row: _figure(row.record.tokens_per_s, human_count),
        "MFU": lambda row: _figure(row.record.mfu, "{:.1%}".format),
        "step s": lambda row: _figure(row.record.step_s, "{:.3g}".format),
        "memory": lambda row: _figure(row.record.max_memory_bytes, human_bytes),
        "loss": lambda row: _figure(row.record.loss, "{:.4f}".format) + ("!" if row.loss_differs else ""),
    }
    figures = {name: show for name, show in figures.items() if any(show(row) for row in rows)}
    lines = [["", *columns(rows[0], rows), *figures, "state"]]
    for row in rows:
        state = row.record.state if not row.record.reason else f"{row.record.state}: {row.record.reason}"
        cells = [*columns(row, rows).values(), *(show(row) for show in figures.values())]
        lines.append(["*" if row.best else "", *cells, state])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]) - 1)]
    return "\n".join("  ".join([*(c.rjust(w) for c, w in zip(line, widths, strict=False)), line[-1]]) for line in lines)


def _figure(value: float | None, show: Callable[[float], str]) -> str:
    return "" if value is None else show(value)


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """One row per point, in the order of `rows`, with units in the column names; written atomically."""
    text = io.StringIO()
    table = [_csv_row(row, rows) for row in rows]
    writer = csv.DictWriter(text, list(table[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    write_atomically(path, text.getvalue())


def _csv_row(row: Row, rows: Sequence[Row]) -> dict[str, Any]:
    p, r, d, t = row.point, row.record, row.point.degrees, row.point.config.training
    memory = None if r.max_memory_bytes is None else round(r.max_memory_bytes / 2**30, 4)
    settings = flatten(p.config)
    return {
        "point": p.name, "state": r.state, "reason": r.reason, "best": row.best,
        "model": p.model, "parameters": p.parameters,
        "pp": d.pp, "dp_replicate": d.dp_replicate, "dp_shard": d.dp_shard, "cp": d.cp, "tp": d.tp,
        "global_batch_sequences": p.global_batch, "local_batch_sequences": t.local_batch_size,
        "seq_len_tokens": t.seq_len, "recompute": p.recompute,
        "tokens_per_s": r.tokens_per_s, "tokens_per_s_per_gpu": row.tokens_per_s_per_gpu, "mfu": r.mfu,
        "step_s": r.step_s, "step_s_p25": r.step_s_p25, "step_s_p75": r.step_s_p75, "max_memory_gib": memory,
        "last_step": r.step, "loss_nats_per_token": r.loss, "loss_differs": row.loss_differs, "attempts": r.attempt,
        **{name: _cell_text(settings[name]) for name in varying(rows) if name not in IN_CSV},
    }  # fmt: skip
