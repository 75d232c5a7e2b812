"""What a layout does, collected from the objects that train: meshes, DTensors, the schedule, the recorded step.

All facts are plain values, as `--json` prints them.
"""

import dataclasses
from collections import Counter
from typing import Any

import torch.distributed as dist

from dtron.config import Config, replace
from dtron.errors import UserError
from dtron.explain.drawing import spans
from dtron.explain.journal import Journal, block_events
from dtron.explain.parameters import describe_experts, describe_parameters
from dtron.mesh import Degrees, Mesh
from dtron.models.spec import layers_of
from dtron.parallel.context import local_positions
from dtron.parallel.pipeline import StagePlan
from dtron.plan import schedule
from dtron.plan.dryrun import dry_run, shortened
from dtron.plan.record import Message, StepRecord
from dtron.train.resolve import check_batch, resolve
from dtron.train.setup import Setup, stages_of
from dtron.train.step import Step

__all__ = ["explain", "setup_of"]


def setup_of(config: Config, world: int, mistakes: list[str]) -> Setup:
    """The checked run, on GPUs unless it can only be on CPUs. UserError as train.py's."""
    device = config.training.device
    try:
        return resolve(config, world, "cpu" if device == "cpu" else "cuda", mistakes)
    except UserError:
        if device != "auto" or mistakes:
            raise
        return resolve(config, world, "cpu")


def explain(setup: Setup, rank: int, gpus_per_node: int) -> dict[str, Any]:
    """All facts, of one rank where ranks differ. UserError for what dry runs do not know."""
    c, d = setup.config, setup.degrees
    if not 0 <= rank < d.world:
        raise UserError(f"--rank is {rank}; expected 0 to {d.world - 1}, the ranks of {d}")
    batch = check_batch(c, d, c.training.global_batch_size) // d.dp  # sequences of a data-parallel rank
    rows = c.parallelism.pipeline_parallel_microbatch_size if d.pp > 1 else c.training.local_batch_size
    short, recorded = shortened(setup)
    # Compiled blocks send the same, and show no parts.
    short = dataclasses.replace(short, config=replace(short.config, "compile.enable", False))
    found: dict[str, Any] = {}
    messages: list[Message] = []

    def look(step: Step, recorder: Any) -> None:
        messages.extend(recorder.messages)
        found["dimensions"] = _dimensions(step.mesh, gpus_per_node)
        found["parameters"] = describe_parameters(short, step)
        found["experts"] = describe_experts(short, step, found["parameters"])
        blocks = [f"layers.{index}" for part in step.model.parts for index in layers_of(part)]
        found["block"] = _block(messages, blocks[len(blocks) // 2], recorded)

    record = dry_run(short, rank, recorder_type=Journal, look=look)
    passes = batch // c.training.local_batch_size
    for dimension in found["dimensions"]:
        mine = [m.operation for m in messages if m.dimension == dimension["name"]]
        dimension["operations"] = list(dict.fromkeys(mine))
    return {
        "model": c.model.hf_config_path or f"{c.model.name} {c.model.flavor}",
        "layout": str(d),
        "degrees": {**dataclasses.asdict(d), "dp": d.dp},
        "world": d.world,
        "rank": rank,
        "gpus_per_node": gpus_per_node,
        "seq_len": c.training.seq_len,
        "sequences": {"global_batch": batch * d.dp, "per_dp_rank": batch, "per_microbatch": rows},
        **found,
        "tokens": _tokens(c, d),
        "pipeline": _pipeline(c, d, stages_of(setup), batch // rows // passes),
        "memory": _memory(
            record, {"batch": batch / rows / recorded, "receive buffers": batch / rows / passes / recorded}
        ),
        "collectives": _totals(messages, recorded, batch // rows, passes if d.pp > 1 else 1),
        "microbatches": {"of_a_step": batch // rows, "recorded": recorded},
    }


def _dimensions(mesh: Mesh, per_node: int) -> list[dict[str, Any]]:
    """The groups of this rank that have several ranks, innermost first."""
    found: dict[str, dict[str, Any]] = {}
    for part in (mesh.ep, mesh.tp, mesh.cp, mesh.expert_fsdp, mesh.fsdp, mesh.pp):
        names = (part.mesh_dim_names or ()) if part is not None else ()
        for i, name in reversed(list(enumerate(names))):
            assert part is not None
            ranks = sorted(dist.get_process_group_ranks(part.get_group(i)))
            if len(ranks) > 1:
                nodes = len({rank // per_node for rank in ranks})
                found[name] = {"name": name, "ranks": ranks, "stride": ranks[1] - ranks[0], "nodes": nodes}
    return list(found.values())


def _block(messages: list[Message], block: str, recorded: int) -> dict[str, Any]:
    """One microbatch in one block. elsewhere: FSDP's messages for it at other times, or once a step only."""
    plain = [m._replace(part="", module="") for m in messages]
    work = [i for i, m in enumerate(messages) if m.module == block]

    def once(m: Message) -> bool:
        """Whether all of these come before the block's first microbatch, or after its last."""
        at = [i for i, other in enumerate(plain) if other == m]
        return bool(recorded > 1 and (len(at) % recorded or at[0] > work[-1] or at[-1] < work[0]))

    def each(phases: tuple[str, ...]) -> list[Message]:
        events = block_events(messages, block, phases)
        return [m for m in events if not (m.unit and once(m._replace(part="", module="")))]

    forward, backward = each(("forward",)), each(("recompute", "backward"))
    inside = {m._replace(part="", module="") for m in (*forward, *backward)}
    others = Counter(m for m in plain if m.unit == block)
    elsewhere = [
        _event(m) | ({"count": n, "per": "step"} if once(m) else {"count": n // recorded, "per": "microbatch"})
        for m, n in others.items()
        if m not in inside
    ]
    forward_and_backward = {"forward": [_event(m) for m in forward], "backward": [_event(m) for m in backward]}
    return {"name": block, **forward_and_backward, "elsewhere": elsewhere}


def _event(m: Message) -> dict[str, Any]:
    return {key: value for key, value in m._asdict().items() if value not in ("", 0, -1) or key == "phase"}


def _tokens(c: Config, d: Degrees) -> dict[str, Any]:
    """Positions that each rank of cp has, and of them those of each rank of tp, as ranges with both ends."""
    head_tail = bool(c.parallelism.context_parallel_load_balancer)
    held = [local_positions(c.training.seq_len, cp_rank, d.cp, head_tail) for cp_rank in range(d.cp)]
    parts = [[spans(part.tolist()) for part in positions.chunk(d.tp)] for positions in held]
    ranges = [{"positions": spans(p.tolist()), "tp_parts": part} for p, part in zip(held, parts, strict=True)]
    return {"head_tail": head_tail and d.cp > 1, "held": ranges}


def _pipeline(c: Config, d: Degrees, plan: StagePlan | None, microbatches: int) -> dict[str, Any] | None:
    """The schedule in time, if stages take equally long and a backward twice a forward; microbatches: of one pass."""
    if plan is None:
        return None
    p = c.parallelism
    name = p.pipeline_parallel_schedule_csv or p.pipeline_parallel_schedule
    one = (1.0,) * plan.n_stages
    times = schedule.StageTimes(one, one, one, 0.0)
    drawn = schedule.repeats_after(name, d.pp, microbatches)
    line = schedule.simulate(name, d.pp, microbatches, times)
    shown = line if drawn == microbatches else schedule.simulate(name, d.pp, drawn, times)
    return {
        "schedule": name,
        "microbatches": microbatches,
        "stages": [
            {
                "pp_rank": rank,
                "stage": stage,
                "modules": plan.modules[stage],
                "ranks": [rank * d.stage, (rank + 1) * d.stage - 1],
            }
            for rank, stages in enumerate(plan.of_rank)
            for stage in stages
        ],
        "bubble": line.bubble,
        "in_flight": [schedule.in_flight(name, d.pp, plan.n_stages, microbatches, rank) for rank in range(d.pp)],
        "drawn_microbatches": drawn,
        "spans": [[rank, *action, start, end] for rank, action, start, end in shown.spans],
    }


def _memory(record: StepRecord, grow: dict[str, float]) -> dict[str, Any]:
    """grow: parts that are larger by a factor than recorded, since the step has more microbatches."""
    peak = record.peak
    parts = {part: round(size * grow.get(part, 1)) for part, size in peak.parts.items()}
    return {
        "peak_bytes": sum(parts.values()),
        "parts": parts,
        "reserved_bytes": record.reserved.expandable,
        "between_steps_bytes": record.start_bytes,
        "phase": peak.phase,
        "module": peak.module,
        "operation": peak.operation,
        "activations_of_module": peak.activations,
    }


def _totals(messages: list[Message], recorded: int, microbatches: int, passes: int) -> list[dict[str, Any]]:
    """Of a whole step, by dimension, operation and phase.

    What each of the recorded microbatches sends, each of the step's does. Of the rest a pipeline's pass repeats all but
    what belongs to the update.
    """
    counts = Counter(m._replace(part="") for m in messages if m.dimension)
    totals: dict[tuple[str, int, str, str], list[int]] = {}
    for m, count in counts.items():
        in_each = count % recorded == 0 and m.phase != "update"
        whole = count // recorded * microbatches if in_each else count * (1 if m.phase == "update" else passes)
        total = totals.setdefault((m.dimension, m.ranks, m.operation, m.phase), [0, 0])
        total[0] += whole
        total[1] += whole * m.bytes
    keys = ("dimension", "ranks", "operation", "phase", "count", "bytes")
    return [dict(zip(keys, (*kind, *total), strict=True)) for kind, total in sorted(totals.items())]
