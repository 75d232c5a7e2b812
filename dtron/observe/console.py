"""What a person reads while a run goes: one line per step, the time left, the summary at the end."""

import math
import statistics
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from dtron.observe.goodput import PARTS

__all__ = [
    "EtaClock",
    "format_evaluation",
    "format_step",
    "format_summary",
    "human_bytes",
    "human_count",
    "human_seconds",
    "use_color",
]

_COLORS = {"step": "1", "loss": "32", "validation_loss": "35", "mfu": "36"}  # ANSI codes
_PARTS = {"startup": "start-up", "checkpoint": "checkpoints"}  # of the wall time, where the key is not the word
_ALARM = "1;31"  # a number that is not finite


def use_color(stream: TextIO, disabled: bool) -> bool:
    """Colours go to a terminal only, and never when `metrics.disable_color_printing` is set."""
    return stream.isatty() and not disabled


def human_bytes(count: float) -> str:
    """1288490189 -> '1.20 GiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.2f} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1024
    return f"{count:.2f} TiB"


def human_count(count: float) -> str:
    """12345 -> '12.3k'; k, M, B and T are powers of a thousand."""
    if count < 999.5:
        return f"{count:.0f}"
    for unit in ("k", "M", "B"):
        count /= 1000
        if count < 999.95:
            return f"{count:.1f}{unit}"
    return f"{count / 1000:.1f}T"


def human_seconds(seconds: float) -> str:
    """133 -> '2m13s', 3720 -> '1h02m', 187200 -> '2d04h', 0.5 -> '0.5s'."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f}s" if seconds < 9.95 else f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


class EtaClock:
    """Time left, from the median of the last steps' times: one slow step (compile, save) does not bend it."""

    def __init__(self, total_steps: int, window: int = 50) -> None:
        self._total_steps = total_steps
        self._step_s: deque[float] = deque(maxlen=window)

    def tick(self, step_s: float) -> None:
        """Add the seconds one step took."""
        self._step_s.append(step_s)

    def seconds_left(self, step: int) -> float | None:
        """Seconds from the end of `step` to the end of the run; None before the first tick."""
        return statistics.median(self._step_s) * max(0, self._total_steps - step) if self._step_s else None


def format_step(row: dict[str, Any], total_steps: int, seconds_left: float | None, color: bool) -> str:
    """One line of a step, from the row `MetricsWriter.log` gets; what is missing or None is left out."""
    row = {**row, "left": seconds_left}
    if row.get("data_s") is not None and row.get("step_s"):
        row["data"] = row["data_s"] / row["step_s"]
    row["step"] = f"step {row['step']}/{total_steps}  {100 * row['step'] // total_steps}%"
    texts: dict[str, Callable[[Any], str]] = {
        "step": str,
        "loss": "loss {:.4f}".format,
        "validation_loss": "val {:.4f}".format,
        "grad_norm": "norm {:.3f}".format,
        "lr": "lr {:.1e}".format,
        "tokens_per_s": lambda value: f"{human_count(value)} tok/s",
        "mfu": "MFU {:.1%}".format,
        "epochs": "epochs {:.2f}".format,
        "max_memory_bytes": lambda value: f"mem {human_bytes(value)}",
        "data": "data {:.1%}".format,
        "left": lambda value: f"left {human_seconds(value)}",
    }
    shown = [key for key in texts if row.get(key) is not None]
    return "  ".join(_paint(key, row[key], texts[key](row[key]), color) for key in shown)


def _paint(key: str, value: Any, text: str, color: bool) -> str:
    code = _ALARM if isinstance(value, float) and not math.isfinite(value) else _COLORS.get(key)
    return f"\033[{code}m{text}\033[0m" if color and code else text


def format_summary(
    rows: list[dict[str, Any]],
    run_folder: Path | str,
    resume_command: str,
    *,
    unigram_entropy: float | None = None,
    flops_per_token: float | None = None,
    peak_flops: float | None = None,
) -> str:
    """The lines at the end of a run, from `read_metrics`' rows. Speeds are medians without the first row.

    `unigram_entropy`: nats per token of the validation set under its own token frequencies, the best
    a model can do that ignores the context. `flops_per_token`, `peak_flops` (FLOP/s per GPU): what
    the rows' MFU was computed with.
    """
    lines = [("outputs", str(run_folder)), ("resume with", resume_command)]
    if not rows:
        return _table([("steps", "none was logged"), *lines])
    last = rows[-1]
    facts = [("steps", str(last["step"])), ("loss", _last_loss(rows))]
    if last.get("tokens") is not None:
        facts.insert(1, ("tokens", human_count(last["tokens"])))
    validated = [row for row in rows if "validation_loss" in row]
    if validated:
        beside = "" if unigram_entropy is None else f"; unigram entropy {unigram_entropy:.4f}"
        value = _number(validated[-1]["validation_loss"])
        facts.append(("validation", f"{value} (step {validated[-1]['step']}{beside})"))
    speed, per_gpu, mfu = (_median(rows, key) for key in ("tokens_per_s", "tokens_per_s_per_gpu", "mfu"))
    if speed is not None:
        facts.append(("tokens/s", human_count(speed)))
    if mfu is not None and per_gpu is not None and flops_per_token and peak_flops:
        from dtron.models.flops import flops_formula  # and with it torch

        attended, flops = _median(rows, "attended_tokens"), _median(rows, "flops_per_token") or flops_per_token
        length = "seq_len" if attended is None else f"{attended:.0f} (tokens that a layer attends to, mean)"
        parts = f"{per_gpu:.0f} tokens/s/GPU x {flops:.4g} FLOPs per token / {peak_flops:.4g} FLOP/s"
        facts.append(("MFU", f"{mfu:.1%} = {parts} (dense bf16 peak)"))
        facts.append(("", flops_formula(length)))
    memory = [row["max_memory_bytes"] for row in rows if row.get("max_memory_bytes") is not None]
    if memory:
        facts.append(("peak memory", human_bytes(max(memory))))
    if accounts := [row for row in rows if row.get("goodput") is not None]:
        # An attempt's clock is never set back, but that of one before it may have been ahead.
        newest = max(accounts, key=lambda row: (row.get("attempt", 1), row["unix_s"]))
        facts.append(("goodput", _goodput(newest)))
    return _table([*facts, *lines])


def format_evaluation(
    checkpoint: str, dataset: str, loss: float, perplexity: float, tokens: int, seconds: float
) -> str:
    """The result of an evaluation. loss: nats per token; tokens: those it is the mean over, taken in `seconds`."""
    facts = [
        ("checkpoint", checkpoint),
        ("evaluated on", dataset),
        ("loss", f"{loss:.6f} nats per token"),
        ("perplexity", f"{perplexity:.6g}"),
        ("tokens", str(tokens)),
        ("seconds", f"{seconds:.1f}"),
        ("tokens/s", human_count(tokens / seconds)),
    ]
    return _table(facts)


def _goodput(row: dict[str, Any]) -> str:
    """'93.1% of 2h13m: start-up 2.1%, data 0.3%'; parts under 0.05% are left out."""
    seconds = {part: row[f"spent_s/{part}"] for part in PARTS}
    wall_s = sum(seconds.values())
    shares = {part: seconds[part] / wall_s for part in PARTS if part != "steps" and seconds[part] > 0.0005 * wall_s}
    rest = ", ".join(f"{_PARTS.get(part, part)} {share:.1%}" for part, share in shares.items())
    return f"{row['goodput']:.1%} of {human_seconds(wall_s)}{': ' if rest else ''}{rest}"


def _table(lines: list[tuple[str, str]]) -> str:
    return "\n".join(f"{name:<13} {text}" for name, text in lines)


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def _last_loss(rows: list[dict[str, Any]]) -> str:
    """Of the last step that has one, which is named where steps without a logged loss came after it."""
    with_loss = [row for row in rows if "loss" in row]
    if not with_loss:
        return "none was logged"
    row = with_loss[-1]
    return _number(row["loss"]) + ("" if row["step"] == rows[-1]["step"] else f" (step {row['step']})")


def _median(rows: list[dict[str, Any]], key: str) -> float | None:
    """The median of a key; the first row, which holds the warm-up, counts only when it is alone."""
    values = [row[key] for row in (rows[1:] or rows) if row.get(key) is not None]
    return statistics.median(values) if values else None
