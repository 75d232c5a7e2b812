"""What `dtron plan` prints and writes."""

import argparse
import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dtron.config import Config, flatten, load, read, replace
from dtron.config.cli import parse_arguments
from dtron.config.toml import toml_value
from dtron.errors import Mistakes, UserError
from dtron.plan.gantt import draw_steps
from dtron.plan.hardware import Hardware
from dtron.plan.hardware_file import read_hardware
from dtron.plan.layout import Layout, Sizes, describe
from dtron.plan.measured import Run, beside_measured, predict_run
from dtron.plan.picture import check_matplotlib, draw_memory, draw_speed, draw_time
from dtron.plan.search import Candidate, Search, layout_keys, search
from dtron.plan.single import check_sizes
from dtron.plan.slower import near_batch, slower_lines
from dtron.plan.timemodel import style_of
from dtron.train.resolve import resolve
from dtron.train.setup import Setup

__all__ = ["main"]

SHOWN_REASONS = 8
WORTH_A_HINT = 0.03
# By how much the estimate of what is reserved, with its margins, was too low at most: of the 40 random layouts of
# tests/plan/random_layouts.py, 12 reserved more than it, by 6% in the median.
ESTIMATE_LOW = 0.21
RATES = "flops", "memory_rate", "link_rate", "network_rate"
MOMENTS = {"loss": "at the loss", "block": "in the backward of a block", "end": "at the end of the backward"}
PARTS = {  # of a step's time, in the table
    "matmul": ("matmul_s",),
    "attn": ("attention_s",),
    "memory": ("memory_bound_s", "other_s"),
    "again": ("recompute_s",),
    "tp": ("tensor_s",),
    "cp": ("context_s",),
    "ep": ("expert_s",),
    "dp": ("data_s",),
    "bubble": ("bubble_s",),
    "pp": ("pipeline_s",),
    "opt": ("optimizer_s",),
}


def main(given: argparse.Namespace, keys: list[str]) -> None:
    """Run the command. UserError for what cannot be planned."""
    if given.gpus < 1 or given.top < 1 or given.exact < 0:
        raise UserError("--gpus and --top must be 1 or more, --exact 0 or more")
    _check_outputs(given)
    # The hardware of a prediction is --hardware; what the run names may be of machines that are not here.
    words = ["--job.config_file", given.config, *keys, "--metrics.plan_hardware="]
    if given.measured:
        config = load(words)
        print("\n".join(beside_measured(config, given.gpus, given.hardware, given.measured)))
        return
    if given.as_configured:
        run = predict_run(load(words), given.gpus, given.hardware)
        print(json.dumps(run.figures, indent=1) if given.json else _as_configured(run))
        return
    hw = read_hardware(given.hardware)
    fixed = {name: setting.value for name, setting in parse_arguments(keys, Mistakes()).items()}
    reading = read(words)
    reading.mistakes.raise_any()
    config = reading.config
    setup = _any_setup(config)
    check_sizes(setup)
    batch = _global_batch(config, given.global_batch_tokens, given.gpus)
    found = search(config, setup, given.gpus, hw, fixed, batch, given.exact, given.top)
    if not found.candidates:
        raise UserError(_nothing_fits(config, setup, given, hw, fixed, batch, found))
    if given.json:
        used = {"hardware": dataclasses.asdict(hw)}
        print(
            json.dumps(
                [c.as_dict() | {"may_not_fit": may_not_fit(c, hw)} | used for c in found.candidates[: given.top]],
                indent=1,
            )
        )
    else:
        print(
            table(
                config, Sizes.of(setup.model_config), hw, given.gpus, batch, found, given.top, given.global_batch_tokens
            )
        )
        if hint := _better_batch(config, setup, given, hw, fixed, batch, found):
            print(hint)
        if given.explain:
            print(explain(found.candidates[0], hw))
    if given.picture:
        title = f"{Path(given.config).stem} on {given.gpus} x {hw.name}"
        draw(found.candidates[: given.top], found, title, given.picture)
        first = found.candidates[0].layout
        title = f"{title}: {describe(first)}, {first.microbatch} x {first.microbatches}, {first.recompute}"
        sizes, seq_len = Sizes.of(setup.model_config), config.training.seq_len
        draw_steps(sizes, first, seq_len, hw, style_of(config, hw), title, Path(given.picture, "steps.png"))
    if given.out:
        keys_given = {name: value for name, value in flatten(config).items() if name in fixed}
        Path(given.out).write_text(as_toml(found.candidates[0].layout, given.config, given.out, keys_given))
        if not given.json:
            print(f"\nwritten to {given.out}: train.py --job.config_file {given.out}")


def may_not_fit(c: Candidate, hw: Hardware) -> bool:
    """Whether the memory of a layout is an estimate that does not leave room for the largest error known."""
    return not c.exact and c.needed_bytes + ESTIMATE_LOW * c.reserved_bytes > hw.memory_bytes


def _check_outputs(given: argparse.Namespace) -> None:
    """UserError for files that cannot be written, before any work, or that are there: nothing is overwritten."""
    if given.out and (out := Path(given.out)):
        if out.exists():
            raise UserError(f"--out {out} exists, and is not overwritten; give another name, or delete it first")
        if not out.parent.is_dir():
            raise UserError(f"--out {out}: there is no folder {out.parent}; make it first")
    if given.picture:
        check_matplotlib()
        if Path(given.picture).exists() and not Path(given.picture).is_dir():
            raise UserError(f"--picture {given.picture} is a file; give a folder")


def _as_configured(run: Run) -> str:
    """Lines on a run as it is configured."""
    lines = [describe(run.layout), *(f"{name}: {value:.6g}" for name, value in run.figures.items())]
    if c := run.candidate:
        verb, gib = "fits" if c.fits else "does not fit", 2**30
        lines.append(f"step_s: {c.time.step_s:.6g}")
        lines.append(
            f"{verb}: needs {c.needed_bytes / gib:.1f} GiB of {run.hw.memory_bytes / gib:.1f}, with what a GPU holds "
            "besides; recorded by a dry run"
        )
    return "\n".join(lines)


def _better_batch(
    config: Config, setup: Setup, given: Any, hw: Hardware, fixed: dict[str, Any], batch: int, found: Search
) -> str | None:
    """A line on a batch nearby that splits better and is faster for each token; None without one."""
    near = near_batch(batch, given.gpus)
    if near is None or "training.global_batch_size" in fixed:
        return None
    other = search(config, setup, given.gpus, hw, fixed, near, 0, 1).candidates
    best = max(found.candidates, key=lambda c: c.time.tokens_per_s)
    if not other or other[0].time.tokens_per_s < (1 + WORTH_A_HINT) * best.time.tokens_per_s:
        return None
    more = other[0].time.tokens_per_s / best.time.tokens_per_s - 1
    return (
        f"\n{batch} sequences a step have few divisors: {near} would be {more:.0%} faster per token "
        f"({describe(other[0].layout)}), by estimate: --global-batch-tokens {near * config.training.seq_len}"
    )


def _any_setup(config: Config) -> Setup:
    """The model, checked on one rank, where no layout can be at fault."""
    for name in ("pipeline_parallel_degree", "data_parallel_replicate_degree", "data_parallel_shard_degree",
                 "context_parallel_degree", "tensor_parallel_degree", "expert_parallel_degree"):  # fmt: skip
        config = replace(config, f"parallelism.{name}", 1)
    config = replace(replace(config, "training.global_batch_size", -1), "training.local_batch_size", 1)
    return resolve(config, 1, "cuda")


def _global_batch(config: Config, tokens: int | None, gpus: int) -> int:
    """In sequences."""
    if tokens is not None:
        if tokens < config.training.seq_len:
            raise UserError(
                f"--global-batch-tokens {tokens} is less than one sequence, training.seq_len {config.training.seq_len}"
            )
        return tokens // config.training.seq_len
    if config.training.global_batch_size > 0:
        return config.training.global_batch_size
    return config.training.local_batch_size * gpus


def table(
    config: Config, s: Sizes, hw: Hardware, gpus: int, batch: int, found: Search, top: int, tokens: int | None = None
) -> str:
    """The fastest layouts with where their time goes, in percent, and why others are not among them.

    tokens: of --global-batch-tokens.
    """
    seq_len = config.training.seq_len
    width = 1 + max(len(describe(c.layout)) for c in found.candidates[:top])
    style = "compiled" if config.compile.enable else "eager"
    recompute = max(9, *(1 + len(_recompute(c.layout)) for c in found.candidates[:top]))
    lines = [
        f"{s.parameters / 1e9:.1f}B parameters on {gpus} x {hw.name}, {batch} x {seq_len} tokens a step, {style}: "
        f"{found.looked_at:,} layouts",
        "",
        f"{'':3}{'layout':{width}}{'mb x n':>9} {'recompute':{recompute}}{'tok/s/GPU':>10}{'MFU':>6}{'step s':>8}"
        f"{'GiB':>8}" + "".join(f"{name:>7}" for name in PARTS),
    ]
    for number, c in enumerate(found.candidates[:top], 1):
        t = dataclasses.asdict(c.time)
        shares = "".join(f"{100 * sum(t[n] for n in names) / c.time.step_s:7.1f}" for names in PARTS.values())
        a = c.layout
        lines.append(
            f"{number:<3}{describe(a):{width}}{f'{a.microbatch} x {a.microbatches}':>9} {_recompute(a):{recompute}}"
            f"{c.time.tokens_per_s:10,.0f}{c.time.mfu_full:6.1%}{c.time.step_s:8.2f}"
            f"{c.needed_bytes / 2**30:7.1f}{'*' if c.exact else '?' if may_not_fit(c, hw) else ' '}{shares}"
        )
    if batch * seq_len != (tokens or batch * seq_len):
        lines += ["", f"{batch} whole sequences of {seq_len} are {batch * seq_len:,} of the {tokens:,} tokens given."]
    lines += [
        "",
        f"GiB: of {hw.memory_bytes / 2**30:.1f}, with what a GPU holds besides; * recorded by a dry run, the others "
        "estimated with a margin: record what you book (--exact, or its keys).",
    ]
    if any(may_not_fit(c, hw) for c in found.candidates[:top]):
        lines += [f"? a dry run may say that it does not fit: estimates were up to {ESTIMATE_LOW:.0%} low."]
    lines += ["MFU: attention in full. Columns from matmul on: percent of the step."]
    if hw.measured:
        rest = [name for name in RATES if name not in hw.measured]
        lines.append(f"Measured by preflight: {', '.join(hw.measured)}; of the table: {', '.join(rest) or 'no rate'}.")
    if config.training.mixed_precision_param != "bfloat16":
        lines += ["Speed and estimated memory are those of bfloat16; training.mixed_precision_param says otherwise."]
    node = hw.gpus_per_node
    if any(c.layout.tp > node or c.layout.ep > node for c in found.candidates[:top]):
        lines.append(f"Where tp or ep is more than {node}, it leaves the node; that is in the price.")
    if slower := slower_lines(found):
        lines += ["", "Others that fit, by their share of the first's speed, and what takes longer (estimates):"]
        lines += [f"  {line}" for line in slower]
    if found.rejected:
        lines += ["", "Not among them:", *(f"  {line}" for line in found.rejected[:SHOWN_REASONS])]
        if (more := len(found.rejected) - SHOWN_REASONS) > 0:
            lines.append(f"  and {more} reasons more")
    return "\n".join(lines)


def _recompute(a: Layout) -> str:
    return f"{a.recompute} {a.memory_budget:g}" if a.recompute == "budget" else a.recompute


def draw(shown: list[Candidate], found: Search, title: str, folder: str) -> None:
    """time.png: parts of the step of the layouts that are shown; speed.png: the best speed for each tp and pp;
    memory.png, one for each stage that was recorded: what the fastest that was recorded holds over its step.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    times = [dataclasses.asdict(c.time) for c in shown]
    parts = [{part: sum(t[name] for name in names) for part, names in PARTS.items()} for t in times]
    names = [
        f"{describe(c.layout)}, {c.layout.microbatch} x {c.layout.microbatches}, {c.layout.recompute}" for c in shown
    ]
    draw_time(names, parts, f"{title}: layout, microbatch x number, recompute", Path(folder, "time.png"))
    draw_speed(found.best, f"{title}: best tokens/s per GPU", Path(folder, "speed.png"))
    for c in [c for c in shown if c.records][:1]:
        for record in c.records:
            stages = "-".join(map(str, record.stages))
            file = f"memory-stage-{stages}.png" if c.layout.pp > 1 else "memory.png"
            draw_memory(record, f"{title}: {describe(c.layout)}, stage {stages}", Path(folder, file))


def explain(c: Candidate, hw: Hardware) -> str:
    """The terms of one layout."""
    lines = ["", f"{describe(c.layout)}: a step of {c.time.step_s:.3f} s is"]
    terms = [
        (k, v)
        for k, v in dataclasses.asdict(c.time).items()
        if k.endswith("_s") and k not in ("step_s", "tokens_per_s")
    ]
    lines += [
        f"  {v:9.4f} s  {k.removesuffix('_s').replace('_', ' ')}"
        for k, v in sorted(terms, key=lambda t: -t[1])
        if v > 5e-5
    ]
    m = c.memory
    lines.append(f"in closed form the peak is {m.peak / 2**30:.2f} GiB, {MOMENTS[m.moment]}, of which are")
    lines += [f"  {size / 2**30:9.2f} GiB {name}" for name, size in m.parts().items() if size > 5e6]
    how = "recorded" if c.exact else "estimated"
    lines.append(f"{how} peak {c.peak_bytes / 2**30:.2f} GiB")
    more = "with expandable segments"
    if c.reserved_plain_bytes is not None:
        more += f", {c.reserved_plain_bytes / 2**30:.2f} without"
    lines.append(f"reserved by the caching allocator {c.reserved_bytes / 2**30:.2f} GiB {more}")
    lines.append(f"with what a GPU holds besides {c.needed_bytes / 2**30:.2f} of {hw.memory_bytes / 2**30:.1f} GiB")
    return "\n".join(lines)


def as_toml(layout: Layout, config_file: str, out: str, given: Mapping[str, Any]) -> str:
    """A file that has `config_file` as its base, the keys `given` on the command line, and the layout's."""
    base = os.path.relpath(config_file, Path(out).parent)
    sections: dict[str, list[str]] = {}
    for name, value in sorted({**given, **layout_keys(layout)}.items()):
        section, _, leaf = name.rpartition(".")
        sections.setdefault(section, []).append(f"{leaf} = {toml_value(value)}")
    blocks = ["\n".join([f"[{name}]", *lines]) for name, lines in sections.items()]
    return "\n\n".join([f"# dtron plan: {describe(layout)}\nbase = {toml_value(base)}", *blocks]) + "\n"


def _nothing_fits(
    config: Config, setup: Setup, given: Any, hw: Hardware, fixed: dict[str, Any], batch: int, found: Search
) -> str:
    """First on how many GPUs the model would fit and which term is too big on these; then what was looked at."""
    if found.smallest is None or any(found.best.values()):
        return "\n".join(["each layout that would fit is refused:", *found.rejected[:SHOWN_REASONS]])
    s, gib = found.smallest, 2**30
    name, size = s.memory.largest_part()
    more = _smallest_that_fits(config, setup, given.gpus, hw, fixed, batch)
    would = f"it would fit on {more[0]} GPUs ({describe(more[1])})" if more else "nor does it on 1,024 times as many"
    first = (
        f"no layout of {given.gpus} x {hw.name} fits; {would}. Too big: {name}, {size / gib:.0f} of the "
        f"{s.needed_bytes / gib:.0f} GiB that the smallest layout, {describe(s.layout)}, needs of "
        f"{hw.memory_bytes / gib:.0f}"
    )
    return "\n".join([first, *found.rejected[:3]])


def _smallest_that_fits(
    config: Config, setup: Setup, gpus: int, hw: Hardware, fixed: dict[str, Any], batch: int
) -> tuple[int, Layout] | None:
    """Of powers of two times `gpus` and quarters between them, in whole nodes; with a sequence per GPU at least."""

    def fastest(n: int) -> Layout | None:
        try:
            candidates = search(config, setup, n, hw, fixed, max(batch, n), 0, 1).candidates
        except UserError:
            return None
        return candidates[0].layout if candidates else None

    for larger in (gpus * 2**i for i in range(1, 11)):
        if whole := fastest(larger):
            between = (larger * eighths // 8 for eighths in (5, 6, 7))
            for n in between:
                if n % hw.gpus_per_node == 0 and (layout := fastest(n)):
                    return n, layout
            return larger, whole
    return None
