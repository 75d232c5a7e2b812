"""Pictures of `dtron plan`: where the time of the fastest layouts goes, the best speed for each tp and pp, and what the
fastest holds over its step.
"""

from collections.abc import Sequence
from pathlib import Path

from dtron.errors import UserError
from dtron.plan.record import StepRecord

__all__ = ["check_matplotlib", "draw_memory", "draw_speed", "draw_time"]

COLORS = (
    "#4c78a8", "#72b7b2", "#a9c1dc", "#8a8f98", "#e8710a", "#f5b981", "#b279a2", "#b3261e", "#eeca3b", "#9d755d",
    "#54a24b",
)  # fmt: skip
PALE = {"#72b7b2", "#a9c1dc", "#f5b981", "#eeca3b"}
INK = "#202124"
MIN_LABEL = 0.04  # share of a bar that has room for its percentage

PART_COLORS = {
    "parameters": "#4c78a8",
    "optimizer state": "#8a8f98",
    "gradients": "#b3261e",
    "gathered weights": "#72b7b2",
    "reduction buffers": "#9d755d",
    "receive buffers": "#b279a2",
    "activations": "#e8710a",
    "recomputed activations": "#f5b981",
    "temporaries": "#eeca3b",
    "logits and loss": "#54a24b",
    "batch": "#202124",
}  # in the order in which they are stacked: what lasts is below
PHASE_COLORS = {"forward": "#a9c1dc", "recompute": "#f5b981", "backward": "#4c78a8", "update": "#202124"}


def check_matplotlib() -> None:
    """UserError if matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError(
            "--picture needs matplotlib, which is not installed: pip install 'dtron[plot]', or leave out --picture"
        ) from None


def draw_time(names: Sequence[str], parts: Sequence[dict[str, float]], title: str, file: Path) -> None:
    """Bars of seconds, stacked by part; parts: of each layout, the same keys."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 1.6 + 0.36 * len(names)), layout="constrained")
    axes = figure.subplots()
    starts = [0.0] * len(names)
    longest = max(sum(each.values()) for each in parts)
    for color, part in zip(COLORS, parts[0], strict=False):
        widths = [each[part] for each in parts]
        if max(widths) > 0.002 * longest:
            axes.barh(range(len(names)), widths, left=starts, color=color, label=part, height=0.72)
        for y, (start, width) in enumerate(zip(starts, widths, strict=True)):
            if width > MIN_LABEL * longest:
                share = f"{width / sum(parts[y].values()):.0%}"
                ink = INK if color in PALE else "white"
                axes.text(start + width / 2, y, share, ha="center", va="center", fontsize=7.5, color=ink)
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    axes.set_yticks(range(len(names)), names, fontsize=8.5, color=INK)
    axes.invert_yaxis()
    axes.set_xlabel("seconds of a step, predicted", fontsize=9)
    axes.set_title(title, fontsize=10.5, loc="left", color=INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.legend(loc="outside right center", fontsize=8.5, frameon=False)
    figure.savefig(file, dpi=120, facecolor="white")


def draw_speed(best: dict[tuple[int, int], float | None], title: str, file: Path) -> None:
    """A heat map of tokens per second per GPU over (tp, pp); None: nothing fits."""
    from matplotlib.figure import Figure

    tps, pps = (sorted({degrees[i] for degrees in best}) for i in (0, 1))
    figure = Figure(figsize=(2.4 + 0.95 * len(tps), 1.7 + 0.55 * len(pps)), layout="constrained")
    axes = figure.subplots()
    nan = float("nan")
    grid = [[best.get((tp, pp)) or nan for tp in tps] for pp in pps]
    image = axes.imshow(grid, cmap="viridis", aspect="auto", vmin=0)
    most = max((rate for rate in best.values() if rate), default=1.0)
    for y, pp in enumerate(pps):
        for x, tp in enumerate(tps):
            rate = best.get((tp, pp))
            text = f"{rate:,.0f}" if rate else "too big" if (tp, pp) in best else "-"
            color = INK if not rate or rate > 0.7 * most else "white"
            weight = "bold" if rate == most else "normal"
            axes.text(x, y, text, ha="center", va="center", fontsize=8.5, color=color, weight=weight)
    axes.set_xticks(range(len(tps)), [str(tp) for tp in tps])
    axes.set_yticks(range(len(pps)), [str(pp) for pp in pps])
    axes.set_xlabel("tp")
    axes.set_ylabel("pp")
    axes.set_title(title, fontsize=10, loc="left", color=INK)
    figure.colorbar(image, label="tokens/s per GPU")
    figure.savefig(file, dpi=120, facecolor="white")


def draw_memory(record: StepRecord, title: str, file: Path) -> None:
    """What is held over a step, stacked by part, above a strip that shows its phases."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    moments, gib = record.timeline, 2**30
    unit, name = (gib, "GiB") if record.peak.total > gib / 4 else (2**20, "MiB")
    most = record.reserved.expandable / unit
    figure = Figure(figsize=(10.5, 5.2), layout="constrained")
    axes, strip = figure.subplots(2, 1, height_ratios=[24, 1], sharex=True)
    x = [moment.event for moment in moments]
    parts = [part for part in PART_COLORS if any(m.parts.get(part, 0) > 0.002 * record.peak.total for m in moments)]
    heights = [[moment.parts.get(part, 0) / unit for moment in moments] for part in parts]
    axes.stackplot(x, heights, labels=parts, colors=[PART_COLORS[part] for part in parts], linewidth=0)
    axes.axhline(most, color=INK, linewidth=0.9, linestyle="--", label="reserved, with\nexpandable segments")
    at = max(moments, key=lambda moment: moment.total)
    axes.plot([at.event], [at.total / unit], "v", color=INK, markersize=6)
    text = f"peak {at.total / unit:.1f} {name}, in {record.peak.phase}"
    side = "left" if at.event < x[-1] / 2 else "right"
    axes.annotate(text, (at.event, at.total / unit), (0, 7), textcoords="offset points", ha=side, fontsize=8.5)
    axes.set_ylim(0, 1.08 * max(most, at.total / unit))
    axes.set_xlim(0, x[-1])
    axes.set_ylabel(f"{name} held", fontsize=9)
    axes.set_title(title, fontsize=10.5, loc="left", color=INK)
    ends = [*x[1:], x[-1] + 1]
    for moment, start, end in zip(moments, x, ends, strict=True):
        strip.axvspan(start, end, color=PHASE_COLORS[moment.phase], linewidth=0)
    strip.set_yticks([])
    strip.set_xlabel("allocations and frees of a step, in order", fontsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    phases = [phase for phase in PHASE_COLORS if any(moment.phase == phase for moment in moments)]
    handles, labels = axes.get_legend_handles_labels()
    handles = [*handles[-2::-1], handles[-1], *(Patch(color=PHASE_COLORS[phase]) for phase in phases)]
    labels = [*labels[-2::-1], labels[-1], *phases]
    figure.legend(handles, labels, loc="outside right center", fontsize=8.5, frameon=False)
    figure.savefig(file, dpi=120, facecolor="white")
