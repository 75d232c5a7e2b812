"""A run beside its prediction: `dtron plan CONFIG --measured metrics.jsonl`, which train.py asks at the end."""

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtron.config import Config, flatten
from dtron.errors import UserError
from dtron.observe.metrics import read_metrics
from dtron.plan.dryrun import dry_run
from dtron.plan.hardware import Hardware
from dtron.plan.hardware_file import read_hardware
from dtron.plan.layout import Layout, Sizes
from dtron.plan.memory import closed_form_peak
from dtron.plan.search import Candidate, record
from dtron.plan.single import check_sizes, layout_of
from dtron.plan.timemodel import predict, style_of
from dtron.train.folder import last_config
from dtron.train.resolve import resolve

__all__ = ["beside_measured", "predict_run"]

GIB = 2**30
# Keys by which another run is told from this one: what starts like them may change the speed.
SPEED = (
    "model.", "parallelism.", "compile.", "activation_checkpoint.", "quantize.", "training.seq_len",
    "training.local_batch_size", "training.global_batch_size", "optimizer.name", "optimizer.state_dtype",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """The prediction of a run as it is configured; candidate: None on a CPU.

    figures: tokens_per_s_per_gpu, bubble (a share of the step), max_memory_bytes, on GPUs mfu. max_memory_bytes: what
    the allocator reserves of the fullest GPU; on a CPU the tensors of the fullest rank.
    """

    figures: dict[str, float]
    layout: Layout
    hw: Hardware
    candidate: Candidate | None = None


def predict_run(config: Config, world: int, hardware: str) -> Run:
    """UserError without a prediction."""
    on_cpu = config.training.device == "cpu"
    setup = resolve(config, world, "cpu" if on_cpu else "cuda")
    check_sizes(setup)
    hw, a, s = read_hardware(hardware, on_cpu), layout_of(setup), Sizes.of(setup.model_config)
    seq_len = config.training.seq_len
    time = predict(s, a, seq_len, hw, style_of(config, hw))
    found = {"tokens_per_s_per_gpu": time.tokens_per_s, "bubble": time.bubble_s / time.step_s}
    if on_cpu:
        peaks = (dry_run(setup, pp_rank * setup.degrees.stage, gloo=True).peak.total for pp_rank in range(a.pp))
        return Run(found | {"max_memory_bytes": max(peaks)}, a, hw)
    memory = closed_form_peak(s, a, seq_len)
    run = record(Candidate(a, memory, time, memory.peak, 0.0, False), setup, hw)
    return Run(found | {"mfu": time.mfu_full, "max_memory_bytes": run.reserved_bytes}, a, hw, run)


def beside_measured(config: Config, world: int, hardware: str, metrics: str) -> list[str]:
    """Lines on speed, MFU and memory of a run as it was configured. UserError without rows or without a prediction."""
    try:
        rows = [row for row in read_metrics(Path(metrics)) if row.get("tokens_per_s_per_gpu")]
    except OSError as error:
        raise UserError(f"--measured {metrics}: {error.strerror}; expected the metrics.jsonl of a run") from None
    if not rows:
        raise UserError(f"--measured {metrics} has no row with tokens_per_s_per_gpu; expected a run's metrics.jsonl")
    _check_same_run(config, world, metrics, rows)
    on_cpu, found = config.training.device == "cpu", predict_run(config, world, hardware).figures
    # The first row is that of a step that compiles and warms up.
    speed = statistics.median(row["tokens_per_s_per_gpu"] for row in rows[1:] or rows)
    lines = [_line("tokens/s per " + ("rank" if on_cpu else "GPU"), found["tokens_per_s_per_gpu"], speed, ",.0f")]
    mfus = [row["mfu"] for row in rows[1:] or rows if row.get("mfu")]
    if mfus and "mfu" in found:
        lines.append(_line("MFU", found["mfu"], statistics.median(mfus), ".1%"))
    most, peak = max((row.get("max_memory_bytes") or 0 for row in rows), default=0), found["max_memory_bytes"]
    if not most:
        return lines
    if on_cpu:
        lines.append(
            f"peak memory: predicted {peak / GIB:.2f} GiB of tensors, measured {most / GIB:.2f} of the process"
        )
    else:
        lines.append(_line("reserved GiB", peak / GIB, most / GIB, ".1f"))
    return lines


def _check_same_run(config: Config, world: int, metrics: str, rows: list[dict[str, Any]]) -> None:
    """UserError where the rows are of another number of ranks, or the run's own config.toml, beside them, of another
    model, sequence, layout, batch or recomputation."""
    ranks = round(statistics.median(row.get("tokens_per_s", 0.0) / row["tokens_per_s_per_gpu"] for row in rows))
    if ranks not in (0, world):
        raise UserError(f"--measured {metrics} is of {ranks} ranks, and --gpus is {world}; give --gpus {ranks}")
    if not (theirs := last_config(Path(metrics).parent)):
        return
    runs = [resolve(c, world, "cpu" if c.training.device == "cpu" else "cuda") for c in (config, theirs)]
    here, there = [
        (run.model_config, run.config.training.seq_len, layout_of(run), run.config.compile, run.config.quantize)
        for run in runs
    ]
    if here != there:
        ours, other = (flatten(run.config) for run in runs)
        names = [n for n in ours if n.startswith(SPEED) and ours[n] != other[n] and -1 not in (ours[n], other[n])]
        text = ", ".join(f"{name} {other[name]!r}, not {ours[name]!r}" for name in names[:4]) or "another layout"
        raise UserError(
            f"--measured {metrics} is of another run than CONFIG: it has {text}; give its own config.toml as CONFIG"
        )


def _line(name: str, predicted: float, measured: float, form: str) -> str:
    return f"{name}: predicted {predicted:{form}}, measured {measured:{form}} ({predicted / measured - 1:+.0%})"
