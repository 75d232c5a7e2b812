"""Pipeline schedules: what each of torch's asks for, schedules from a CSV file, and what is checked of both.

Everything here is known before any process group is made.
"""

import csv
import math
from dataclasses import dataclass
from typing import Any

from dtron import compat
from dtron.config.sections import Config, Parallelism
from dtron.errors import UserError
from dtron.mesh import Degrees
from dtron.models.spec import ModelSpec, meta_model

__all__ = ["SCHEDULES", "ScheduleKind", "check_pipeline", "read_schedule", "schedule_stages"]


@dataclass(frozen=True)
class ScheduleKind:
    """What a schedule asks for: see `SCHEDULES`."""

    multi: bool = False  # several stages a rank
    v_shape: bool = False  # exactly two a rank: r and 2*pp-1-r
    zero_bubble: bool = False  # splits the backward in two
    at_least_stages: bool = False  # n_microbatches >= stages
    in_rounds: bool = False  # n_microbatches divisible by max(1, n_microbatches // pp)


SCHEDULES = {
    "GPipe": ScheduleKind(),
    "1F1B": ScheduleKind(at_least_stages=True),
    "LoopedBFS": ScheduleKind(multi=True),
    "Interleaved1F1B": ScheduleKind(multi=True, in_rounds=True),
    "InterleavedZeroBubble": ScheduleKind(multi=True, in_rounds=True, zero_bubble=True),
    "ZBVZeroBubble": ScheduleKind(multi=True, v_shape=True, zero_bubble=True),
    "DualPipeV": ScheduleKind(multi=True, v_shape=True, zero_bubble=True, at_least_stages=True),
}


def schedule_stages(p: Parallelism, n_layers: int) -> tuple[list[tuple[int, ...]], list[list[str]] | None]:
    """Stage indices of every pipeline rank, and the rows of the CSV schedule if there is one."""
    pp = p.pipeline_parallel_degree
    if p.pipeline_parallel_schedule_csv:
        rows = read_schedule(p.pipeline_parallel_schedule_csv, pp)
        return [tuple(sorted({stage for stage, _, _ in row})) for row in compat.csv_actions(rows)], rows
    kind = SCHEDULES[p.pipeline_parallel_schedule]
    per_rank = 2 if kind.multi else 1
    if p.module_fqns_per_model_part:
        per_rank = max(1, len(p.module_fqns_per_model_part) // pp)
    elif p.pipeline_parallel_layers_per_stage:
        per_rank = max(1, math.ceil(n_layers / p.pipeline_parallel_layers_per_stage) // pp)
    return compat.stages_of_rank(pp, pp * per_rank, kind.v_shape), None


def read_schedule(path: str, pp: int) -> list[list[str]]:
    """The rows of a CSV schedule, one a pipeline rank, checked cell by cell."""
    try:
        with open(path, newline="") as file:
            rows = [row for row in csv.reader(file) if any(cell.strip() for cell in row)]
    except OSError as error:
        raise UserError(f"parallelism.pipeline_parallel_schedule_csv: cannot read {path}: {error.strerror}") from None
    if len(rows) != pp:
        raise UserError(f"{path} has {len(rows)} rows; expected one a pipeline rank, {pp}")
    try:
        actions = compat.csv_actions(rows)
    except (ValueError, RuntimeError, KeyError) as error:
        raise UserError(
            f"{path}: {error}; a cell is STAGE ACTION MICROBATCH, for example 0F3, 1B0, 2I1 or 2W1"
        ) from None
    _check_schedule(path, actions)
    return rows


def _check_schedule(path: str, actions: list[list[tuple[int, str, int]]]) -> None:
    """Every stage on one rank, and every microbatch once forward and once backward through every stage."""
    owners: dict[int, set[int]] = {}
    done: dict[str, set[tuple[int, int]]] = {"F": set(), "B": set(), "I": set(), "W": set()}
    for rank, row in enumerate(actions):
        for stage, kind, microbatch in row:
            owners.setdefault(stage, set()).add(rank)
            if (stage, microbatch) in done.setdefault(kind, set()):
                raise UserError(f"{path}: {stage}{kind}{microbatch} stands twice")
            done[kind].add((stage, microbatch))
    if sorted(owners) != list(range(len(owners))) or any(len(ranks) > 1 for ranks in owners.values()):
        raise UserError(f"{path}: stages are {sorted(owners)}; expected 0, 1, 2, ..., each on one row only")
    microbatches = {m for _, m in done["F"]}
    whole = {(stage, m) for stage in owners for m in microbatches}
    if done["F"] != whole or done["B"] | done["I"] != whole or done["B"] & done["I"] or done["I"] != done["W"]:
        raise UserError(
            f"{path}: every microbatch needs F and either B or both I and W at each of {len(owners)} stages"
        )


# --- constraints


def check_pipeline(c: Config, spec: ModelSpec, m: Any, d: Degrees) -> None:
    p, kind = c.parallelism, SCHEDULES[c.parallelism.pipeline_parallel_schedule]
    name = p.pipeline_parallel_schedule_csv or p.pipeline_parallel_schedule
    of_rank, rows = schedule_stages(p, m.n_layers)
    n_stages = sum(map(len, of_rank))
    if p.module_fqns_per_model_part:
        _check_module_names(c, spec, m, n_stages)
    elif p.pipeline_parallel_layers_per_stage and (n_stages != -(-m.n_layers // p.pipeline_parallel_layers_per_stage)):
        raise UserError(
            f"{m.n_layers} layers in stages of {p.pipeline_parallel_layers_per_stage} make "
            f"{-(-m.n_layers // p.pipeline_parallel_layers_per_stage)} stages, no multiple of pp {d.pp}; "
            "change pipeline_parallel_layers_per_stage"
        )
    per_rank = n_stages // d.pp
    wanted = 2 if kind.v_shape else 1
    if rows is None and per_rank != wanted and (kind.v_shape or not kind.multi):
        raise UserError(f"{name} takes exactly {wanted} stage(s) a rank; the split gives {per_rank}")
    if n_stages > m.n_layers:
        raise UserError(
            f"{name} with pp {d.pp} makes {n_stages} stages, but the model has {m.n_layers} layers; lower pp"
        )
    for section, asked in (("training", not c.validation.only), ("validation", c.validation.enable)):
        if asked:
            local = getattr(c, section).local_batch_size
            _check_microbatches(c, name, f"{section}.local_batch_size", local, n_stages, d.pp, rows)


def _check_microbatches(
    c: Config, name: str, key: str, local: int, n_stages: int, pp: int, rows: list[list[str]] | None
) -> None:
    size = c.parallelism.pipeline_parallel_microbatch_size
    n, left = divmod(local, size)
    made = f"{key} {local} / pipeline_parallel_microbatch_size {size} = {n} microbatches"
    if left:
        raise UserError(f"{key} {local} is not a multiple of pipeline_parallel_microbatch_size {size}")
    if rows is not None:
        written = len({cell.strip().split("F")[1] for cell in rows[0] if "F" in cell})
        if n != written:
            raise UserError(f"{name} is written for {written} microbatches, but {made}")
        return
    kind = SCHEDULES[name]
    if kind.at_least_stages and n < n_stages:
        raise UserError(f"{name} needs at least {n_stages} microbatches (one a stage), but {made}")
    if kind.in_rounds and n % max(1, n // pp):
        raise UserError(f"{name} needs microbatches divisible into {max(1, n // pp)} equal rounds, but {made}")


def _check_module_names(c: Config, spec: ModelSpec, m: Any, n_stages: int) -> None:
    parts = c.parallelism.module_fqns_per_model_part or []
    key = "parallelism.module_fqns_per_model_part"
    if len(parts) != n_stages:
        raise UserError(
            f"{key} has {len(parts)} parts; expected a multiple of the schedule's pipeline ranks, here {n_stages}"
        )
    given = [name for part in parts for name in part]
    expected = []
    for name, _ in meta_model(spec, m).named_children():
        expected += [f"layers.{i}" for i in range(m.n_layers)] if name == "layers" else [name]
    if given != expected:
        wrong = sorted(set(given) ^ set(expected))
        reason = f"not in both: {', '.join(wrong)}" if wrong else "the order differs, or a name stands twice"
        raise UserError(f"{key} must name every module once, in order ({expected[0]}, layers.0, ...); {reason}")
    if empty := [i for i, part in enumerate(parts) if not any(name.startswith("layers.") for name in part)]:
        raise UserError(f"{key}: part {empty[0]} has no layer; every stage needs one")
