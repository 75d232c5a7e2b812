"""A run beside its prediction: `dtron plan CONFIG --measured metrics.jsonl`, which train.py asks at the end."""

import statistics
from pathlib import Path

from dtron.config import Config
from dtron.errors import UserError
from dtron.observe.metrics import read_metrics
from dtron.plan.dryrun import dry_run
from dtron.plan.hardware_file import read_hardware
from dtron.plan.layout import Sizes
from dtron.plan.memory import closed_form_peak
from dtron.plan.search import Candidate, record
from dtron.plan.single import check_sizes, layout_of
from dtron.plan.timemodel import predict, style_of
from dtron.train.resolve import resolve

__all__ = ["beside_measured"]

GIB = 2**30


def beside_measured(config: Config, world: int, hardware: str, metrics: str) -> list[str]:
    """Lines on speed, MFU and memory of a run as it was configured. UserError without rows or without a prediction."""
    rows = [row for row in read_metrics(Path(metrics)) if row.get("tokens_per_s_per_gpu")]
    if not rows:
        raise UserError(f"{metrics} has no row with a speed")
    on_cpu = config.training.device == "cpu"
    setup = resolve(config, world, "cpu" if on_cpu else "cuda")
    check_sizes(setup)
    hw, a, s = read_hardware(hardware, on_cpu), layout_of(setup), Sizes.of(setup.model_config)
    seq_len = config.training.seq_len
    time = predict(s, a, seq_len, hw, style_of(config))
    # The first row is that of a step that compiles and warms up.
    speed = statistics.median(row["tokens_per_s_per_gpu"] for row in rows[1:] or rows)
    lines = [_line("tokens/s per " + ("rank" if on_cpu else "GPU"), time.tokens_per_s, speed, ",.0f")]
    mfus = [row["mfu"] for row in rows[1:] or rows if row.get("mfu")]
    if mfus:
        lines.append(_line("MFU", time.mfu_full, statistics.median(mfus), ".1%"))
    most = max(row["max_memory_bytes"] for row in rows)
    if on_cpu:
        peak = max(dry_run(setup, pp_rank * setup.degrees.stage, gloo=True).peak.total for pp_rank in range(a.pp))
        lines.append(
            f"peak memory: predicted {peak / GIB:.2f} GiB of tensors, measured {most / GIB:.2f} of the process"
        )
    else:
        memory = closed_form_peak(s, a, seq_len)
        run = record(Candidate(a, memory, time, memory.peak, 0.0, False), setup, hw)
        lines.append(_line("reserved GiB", run.reserved_bytes / GIB, most / GIB, ".1f"))
    return lines


def _line(name: str, predicted: float, measured: float, form: str) -> str:
    return f"{name}: predicted {predicted:{form}}, measured {measured:{form}} ({predicted / measured - 1:+.0%})"
