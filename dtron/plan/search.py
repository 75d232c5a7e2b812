"""Every layout of a model on a number of GPUs: which fit, how fast they are, and why the others do not fit.

The closed forms rank all of them; dtron's own checks (`dtron/train/resolve.py`) judge the best, and a dry run records
the peak of the first few.
"""

import dataclasses
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dtron.config import Config, flatten, replace
from dtron.errors import UserError
from dtron.parallel.incompatible import FEATURES
from dtron.parallel.schedules import SCHEDULES
from dtron.plan.dryrun import dry_run, shortened
from dtron.plan.hardware import Hardware
from dtron.plan.layout import Layout, Sizes, describe, loss_chunk, muon_steps
from dtron.plan.memory import FRAGMENTATION, Memory, beside_allocator, closed_form_peak
from dtron.plan.record import StepRecord
from dtron.plan.timemodel import Prediction, predict, style_of
from dtron.train.resolve import resolve
from dtron.train.setup import Setup

__all__ = ["Candidate", "Search", "layout_keys", "search"]

P = "parallelism."
MICROBATCHES = (1, 2, 4, 8, 16)  # sequences in one forward
LARGEST_CP = 32
MOST_REFUSED = 30
# For peaks that are not recorded: how much lower than a recorded one the closed form may be. Tested on random layouts.
MARGIN = 0.04
SLACK_BYTES = 64 * 2**20  # small models hold more than the closed form says, by up to 41 MB of 226
TRIES = 3  # dry runs for each layout that is to be recorded, if some do not fit
RECOMPUTE = {
    "none": ("none", "2"),
    "op": ("selective", "op"),
    "second": ("selective", "2"),
    "full": ("full", "2"),
    "budget": ("memory_budget", "2"),  # of compiled blocks
}
FAMILIES = "tp", "pp", "cp", "ep", "dp_replicate", "recompute"  # of a layout's fields
EAGER = tuple(name for name in RECOMPUTE if name != "budget")


@dataclass(frozen=True)
class Candidate:
    """A layout with its predictions.

    peak_bytes: recorded where exact, else of the closed form. reserved_bytes: what the caching allocator takes of CUDA,
    with expandable segments: of its model where exact. records: of the dry runs, of the pp ranks that were looked at.
    """

    layout: Layout
    memory: Memory
    time: Prediction
    peak_bytes: float
    reserved_bytes: float
    fits: bool
    exact: bool = False
    records: tuple[StepRecord, ...] = ()

    @property
    def needed_bytes(self) -> float:
        """Of a GPU: what is reserved and what it holds besides."""
        return self.reserved_bytes + beside_allocator(self.layout)

    @property
    def reserved_plain_bytes(self) -> float | None:
        """Reserved without expandable segments; None where not exact."""
        found = [r.reserved.reserved - r.reserved.expandable for r in self.records]
        return self.reserved_bytes + max(found) if found else None

    def as_dict(self) -> dict[str, Any]:
        """For JSON: keys of the configuration, and the figures in seconds and bytes."""
        t = self.time
        return {
            "keys": layout_keys(self.layout),
            "gpus": self.layout.gpus,
            "step_s": t.step_s,
            "tokens_per_s_per_gpu": t.tokens_per_s,
            "mfu_full": t.mfu_full,
            "mfu_causal": t.mfu_causal,
            "peak_bytes": round(self.peak_bytes),
            "reserved_bytes": round(self.reserved_bytes),
            "needed_bytes": round(self.needed_bytes),
            "fits": self.fits,
            "exact": self.exact,
            "estimated_peak_parts_bytes": {name: round(size) for name, size in self.memory.parts().items()},
            "recorded_peak_parts_bytes": [{"stages": list(r.stages)} | r.peak.parts for r in self.records],
            "terms_s": {
                k: v for k, v in dataclasses.asdict(t).items() if k.endswith("_s") and k[:4] not in ("step", "toke")
            },
        }


@dataclass(frozen=True)
class Search:
    """candidates: those that fit, fastest first. rejected: lines that say why others are not among them.

    smallest: of those that do not fit, the one that needs least; None without such. best: tokens per second per GPU of
    the fastest of each (tp, pp) by the closed forms, before dtron's checks; None where none fits. families: of each of
    `FAMILIES` and each value that fits the fastest, by the closed forms, too.
    """

    candidates: list[Candidate]
    rejected: list[str]
    smallest: Candidate | None
    looked_at: int
    best: dict[tuple[int, int], float | None]
    families: dict[str, dict[Any, Candidate]]


def layout_keys(a: Layout) -> dict[str, Any]:
    """The keys of the configuration that make a layout."""
    mode, option = RECOMPUTE[a.recompute]
    pipeline = a.pp > 1
    default = pipeline or (a.reshard and a.dp_shard * a.cp > 1)
    keys: dict[str, Any] = {
        P + "pipeline_parallel_degree": a.pp,
        P + "data_parallel_replicate_degree": a.dp_replicate,
        P + "data_parallel_shard_degree": a.dp_shard,
        P + "context_parallel_degree": a.cp,
        P + "tensor_parallel_degree": a.tp,
        P + "expert_parallel_degree": a.ep,
        # One shard keeps weights by default where they fit; the closed forms do not know that rule.
        P + "fsdp_reshard_after_forward": "default" if default else "always" if a.reshard else "never",
        "training.local_batch_size": a.microbatch * (a.microbatches if pipeline else 1),
        "training.global_batch_size": a.microbatch * a.microbatches * a.dp,
        "activation_checkpoint.mode": mode,
        "activation_checkpoint.selective_ac_option": option,
        "optimizer.state_dtype": a.state_dtype,
    }
    if a.recompute == "budget":
        keys["activation_checkpoint.memory_budget"] = a.memory_budget
    if pipeline:
        keys[P + "pipeline_parallel_microbatch_size"] = a.microbatch
        keys[P + "pipeline_parallel_schedule"] = a.schedule
        if a.virtual > 2:
            keys[P + "pipeline_parallel_layers_per_stage"] = a.layers_per_stage
    return keys


def search(
    config: Config,
    setup: Setup,
    gpus: int,
    hw: Hardware,
    fixed: Mapping[str, Any],
    global_batch: int,
    exact: int,
    top: int,
) -> Search:
    """All layouts on `gpus` GPUs. fixed: keys that are not changed. global_batch: sequences in a step.

    setup: of any layout, for the model. exact: of the fastest, so many are recorded. top: candidates that are wanted.
    UserError where no layout makes the batch.
    """
    s, seq_len = Sizes.of(setup.model_config), config.training.seq_len
    style, steps, compiled = style_of(config, hw), muon_steps(config), FEATURES["compiled blocks"](config)
    found: list[Candidate] = []
    near: list[Candidate] = []  # they fit but for the margins of an estimate
    too_big: dict[tuple[int, int, int], Candidate] = {}
    looked_at, families = 0, set[tuple[int, int, int]]()
    # Moments in bf16 are another training: they are tried where those in fp32 do not fit.
    dtypes = [config.optimizer.state_dtype]
    if config.optimizer.name == "AdamW" and dtypes == ["float32"] and "optimizer.state_dtype" not in fixed:
        dtypes.append("bfloat16")
    of_batch = layouts(s, seq_len, gpus, global_batch, hw.gpus_per_node, _schedules(config, fixed), _recompute(config))
    for any_state in of_batch:
        for dtype in dtypes:
            chunk = loss_chunk(config, any_state.schedule)
            budget = config.activation_checkpoint.memory_budget if any_state.recompute == "budget" else 1.0
            layout = dataclasses.replace(
                any_state,
                state_dtype=dtype,
                loss_chunk=chunk,
                memory_budget=budget,
                muon_steps=steps,
                compiled=compiled,
            )
            if not _allowed(layout, fixed) or _pointless(layout, config):
                break
            looked_at += 1
            memory = closed_form_peak(s, layout, seq_len)
            reserved = (memory.peak * (1 + MARGIN) + SLACK_BYTES) * (1 + FRAGMENTATION)
            needed = reserved + beside_allocator(layout)
            family = layout.pp, layout.tp, layout.cp
            if needed <= hw.memory_bytes:
                families.add(family)
                time = predict(s, layout, seq_len, hw, style)
                found.append(Candidate(layout, memory, time, memory.peak, reserved, True))
                break
            if memory.peak + beside_allocator(layout) <= hw.memory_bytes:
                time = predict(s, layout, seq_len, hw, style)
                near.append(Candidate(layout, memory, time, memory.peak, reserved, False))
            if family not in too_big or needed < too_big[family].needed_bytes:
                time = predict(s, layout, seq_len, hw, style)
                too_big[family] = Candidate(layout, memory, time, memory.peak, reserved, False)
    if not looked_at:
        _check_degrees(gpus, fixed)
        raise UserError(
            f"no layout of {gpus} GPUs makes a global batch of {global_batch} sequences with the keys that are given; "
            "change --gpus, --global-batch-tokens or training.global_batch_size, or give fewer keys"
        )
    found.sort(key=lambda c: -c.time.tokens_per_s)
    nearest = sorted(too_big.items(), key=lambda item: item[1].needed_bytes)
    tried = _near_misses(near, found, exact)
    legal, illegal, gone = _legal(config, tried + found, gpus, hw, exact, exact if not found else top)
    families |= {(c.layout.pp, c.layout.tp, c.layout.cp) for c in legal}
    reasons = _too_big([c for family, c in nearest if family not in families], hw)
    smallest = min(too_big.values(), key=lambda c: c.needed_bytes, default=None)
    best: dict[tuple[int, int], float | None] = {(tp, pp): None for pp, tp, _ in too_big}
    best |= {(c.layout.tp, c.layout.pp): c.time.tokens_per_s for c in reversed(found)}
    known = [c for c in reversed(found) if c.layout not in gone and _degrees(c.layout) not in gone]
    by_value = {name: {getattr(c.layout, name): c for c in known} for name in FAMILIES}
    return Search(legal, illegal + reasons, smallest, looked_at, best, by_value)


def _near_misses(near: list[Candidate], found: list[Candidate], exact: int) -> list[Candidate]:
    """Those to record: the fastest `exact` that are faster than all of `found`, each of other degrees or recomputation;
    where nothing is found, of each (pp, tp, cp) the one that needs least."""
    fastest: dict[tuple[Any, ...], Candidate] = {}
    if not found:
        for c in sorted(near, key=lambda c: c.needed_bytes):
            fastest.setdefault((c.layout.pp, c.layout.tp, c.layout.cp), c)
        return list(fastest.values())[: TRIES * exact]
    for c in sorted(near, key=lambda c: -c.time.tokens_per_s):
        if c.time.tokens_per_s > found[0].time.tokens_per_s:
            fastest.setdefault((*(getattr(c.layout, name) for name in FAMILIES), c.layout.dp_shard), c)
    return list(fastest.values())[:exact]


def _check_degrees(gpus: int, fixed: Mapping[str, Any]) -> None:
    """UserError where the degrees that are given cannot make so many GPUs."""
    names = {"pp": "pipeline_parallel_degree", "dp_replicate": "data_parallel_replicate_degree"}
    names |= {"dp_shard": "data_parallel_shard_degree", "cp": "context_parallel_degree", "tp": "tensor_parallel_degree"}
    given = {short: fixed[P + name] for short, name in names.items() if fixed.get(P + name, -1) > 0}
    product = math.prod(given.values())
    if gpus % product or (len(given) == len(names) and product != gpus):
        text = " x ".join(f"{name} {degree}" for name, degree in given.items())
        raise UserError(f"{text} = {product} does not divide --gpus {gpus}; change one of them")


def _schedules(config: Config, fixed: Mapping[str, Any]) -> tuple[str, ...]:
    """Those that are looked at. GPipe and LoopedBFS only where they are given: 1F1B and Interleaved1F1B take as long,
    and hold less.
    """
    if config.parallelism.pipeline_parallel_schedule_csv:
        raise UserError(
            "dtron plan takes schedules by their names; leave out parallelism.pipeline_parallel_schedule_csv "
            "(scripts/slurm/submit.py --dry-run predicts a run with it)"
        )
    if given := fixed.get(P + "pipeline_parallel_schedule"):
        return (given,)
    compiled = FEATURES["compiled blocks"](config)
    return tuple(
        name
        for name, kind in SCHEDULES.items()
        if name not in ("GPipe", "LoopedBFS") and not (kind.zero_bubble and compiled)
    )


def _recompute(config: Config) -> tuple[str, ...]:
    """Those that are looked at: a memory budget only of compiled blocks, or where it is configured, to be refused."""
    budget = FEATURES["compiled blocks"](config) or FEATURES["memory budget"](config)
    return tuple(RECOMPUTE) if budget else EAGER


def _pointless(a: Layout, config: Config) -> bool:
    """With tensor parallel a budget keeps more than recompute by operation, and computes more again."""
    return a.recompute == "budget" and a.tp > 1 and not FEATURES["memory budget"](config)


def layouts(
    s: Sizes, seq_len: int, gpus: int, global_batch: int, per_node: int, schedules: Sequence[str] = ("1F1B",),
    recompute: Sequence[str] = EAGER,
) -> Iterator[Layout]:  # fmt: skip
    """Layouts whose degrees divide what they split, and that make the global batch."""
    for tp in _divisors(gpus, min(s.kv_heads, 2 * per_node)):
        for pp in _divisors(gpus // tp, s.layers):
            for cp in _divisors(gpus // tp // pp, LARGEST_CP):
                dp = gpus // tp // pp // cp
                if s.heads % tp or s.kv_heads % tp or seq_len % (2 * cp if cp > 1 else 1) or seq_len // cp % tp:
                    continue
                for replicate in _divisors(dp, dp):
                    for ep in _divisors(dp // replicate * cp * tp, max(1, s.experts)):
                        if not s.experts or s.experts % ep == 0:
                            first = Layout(pp, replicate, dp // replicate, cp, tp, ep)
                            yield from _batches(s, first, global_batch, schedules, recompute)


def _batches(
    s: Sizes, first: Layout, global_batch: int, schedules: Sequence[str], recomputes: Sequence[str]
) -> Iterator[Layout]:
    """The microbatches, schedules, recomputations and reshardings of given degrees."""
    for microbatch in MICROBATCHES:
        if global_batch % (first.dp * microbatch):
            continue
        microbatches = global_batch // first.dp // microbatch
        if first.pp > 1:
            for schedule, virtual in _pipelines(s.layers, first.pp, microbatches, schedules):
                for recompute in recomputes:
                    # By operation, the halves of the backward do not find what was saved.
                    if not (SCHEDULES[schedule].zero_bubble and recompute == "op"):
                        yield dataclasses.replace(
                            first, microbatch=microbatch, microbatches=microbatches, virtual=virtual,
                            recompute=recompute, reshard=False, schedule=schedule,
                            layers_per_stage=-(-s.layers // first.pp // virtual),
                        )  # fmt: skip
            continue
        for recompute in recomputes:
            for reshard in (True, False):
                yield dataclasses.replace(
                    first, microbatch=microbatch, microbatches=microbatches, recompute=recompute, reshard=reshard
                )


def _pipelines(layers: int, pp: int, microbatches: int, schedules: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Schedules and stages per rank that so many microbatches allow."""
    for schedule in schedules:
        kind = SCHEDULES[schedule]
        for virtual in (1,) if not kind.multi else (2,) if kind.v_shape else (2, 4):
            stages = pp * virtual
            if stages > layers or microbatches < (stages if kind.at_least_stages else pp):
                continue
            # Four stages per rank are made by the layers of each, which must come out as so many.
            made = virtual <= 2 or -(-layers // -(-layers // stages)) == stages
            if made and (not kind.in_rounds or microbatches % pp == 0):
                yield schedule, virtual


def _divisors(n: int, most: int) -> list[int]:
    return [d for d in range(1, min(n, most) + 1) if n % d == 0]


def _allowed(layout: Layout, fixed: Mapping[str, Any]) -> bool:
    return all(fixed.get(name, value) in (value, -1) for name, value in layout_keys(layout).items()) if fixed else True


def _too_big(nearest: Iterable[Candidate], hw: Hardware) -> list[str]:
    """A line for each part of memory that is the largest of some; nearest: the smallest of each family, in order."""
    by_part: dict[str, list[Candidate]] = {}
    for c in nearest:
        by_part.setdefault(c.memory.largest_part()[0], []).append(c)
    lines = []
    for part, (first, *others) in by_part.items():
        a, gib = first.layout, 2**30
        more = f"; {len(others)} more of (pp, tp, cp) with too many {part}" if others else ""
        lines.append(
            f"pp {a.pp} tp {a.tp} cp {a.cp}: needs {first.needed_bytes / gib:.0f} GiB of "
            f"{hw.memory_bytes / gib:.0f} at least, {first.memory.largest_part()[1] / gib:.0f} of them {part}{more}"
        )
    return lines


def with_keys(config: Config, layout: Layout) -> Config:
    """The configuration in another layout."""
    known = flatten(config)
    for name, value in layout_keys(layout).items():
        if known[name] != value:
            config = replace(config, name, value)
    return config


def _legal(
    config: Config, found: Iterable[Candidate], gpus: int, hw: Hardware, exact: int, top: int
) -> tuple[list[Candidate], list[str], set[Layout | tuple[int, ...]]]:
    """The first `top` candidates that dtron's checks accept, `exact` of them recorded; why others are not there; the
    degrees that are refused, and layouts that do not fit by a record.

    One that does not fit by its estimate is taken only if its record does.
    """
    legal: list[Candidate] = []
    reasons: dict[str, int] = {}
    attempts = recorded = 0
    too_big = set[Layout]()
    refused: set[tuple[int, ...]] = set()  # degrees; a check of a large model takes half a second
    for candidate in found:
        if len(legal) == top or len(refused) > MOST_REFUSED:
            break
        a = candidate.layout
        degrees = _degrees(a)
        if degrees in refused:
            continue
        try:
            setup = resolve(with_keys(config, candidate.layout), gpus, "cuda")
        except UserError as error:
            refused.add(degrees)
            reason = str(error).splitlines()[0]
            reasons[reason] = reasons.get(reason, 0) + 1
            continue
        if recorded < exact and attempts < TRIES * exact:
            attempts += 1
            try:
                candidate = record(candidate, setup, hw)
            except Exception as error:  # of torch, on a layout of many; the others are not lost by it
                what = (str(error).splitlines() or [type(error).__name__])[0]
                text = f"{describe(a)}: a dry run of it failed, so that its memory is an estimate: {what}"
                print(f"warning: {text}", file=sys.stderr)  # stdout may be JSON
                legal += [candidate] if candidate.fits else []
                continue
            if not candidate.fits:
                what = f"{describe(a)}, {a.microbatch} x {a.microbatches}, {a.recompute}"
                line = f"recorded: {what} needs {candidate.needed_bytes / 2**30:.1f} GiB: does not fit"
                reasons[line] = reasons.get(line, 0) + 1
                too_big.add(a)
                continue
            recorded += 1
        legal += [candidate] if candidate.fits else []
    return legal, [f"{count} of the fastest: {reason}" for reason, count in reasons.items()], refused | too_big


def _degrees(a: Layout) -> tuple[int, ...]:
    return a.pp, a.dp_replicate, a.dp_shard, a.cp, a.tp, a.ep


def record(candidate: Candidate, setup: Setup, hw: Hardware) -> Candidate:
    """The candidate, whose run `setup` is, with the peak that dry runs of its first, second and last pp rank record."""
    a, d = candidate.layout, setup.degrees
    setup, recorded = shortened(setup)
    peak = reserved = 0.0
    records = []
    for rank in sorted({0, min(1, d.pp - 1), d.pp - 1}):
        found = dry_run(setup, rank * d.stage)
        parts = found.peak.parts
        more = (parts.get("receive buffers", 0) + parts.get("batch", 0)) / recorded * (a.microbatches - recorded)
        peak, reserved = max(peak, found.peak.total + more), max(reserved, found.reserved.expandable + more)
        records.append(found)
    fits = reserved + beside_allocator(a) <= hw.memory_bytes
    return dataclasses.replace(
        candidate, peak_bytes=peak, reserved_bytes=reserved, fits=fits, exact=True, records=tuple(records)
    )
