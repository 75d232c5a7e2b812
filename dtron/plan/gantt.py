"""A picture of `dtron plan`: the predicted time line of a step, a row for each pipeline rank."""

from pathlib import Path
from typing import Any

from dtron.plan.hardware import Hardware
from dtron.plan.layout import Layout, Sizes
from dtron.plan.picture import INK
from dtron.plan.schedule import Timeline, repeats_after, simulate, step_s
from dtron.plan.timemodel import Style, predict, stage_times

__all__ = ["draw_steps"]

KINDS = {  # the second colour is of a rank's later stages
    "F": ("forward", "#a9c1dc", "#6d94c4"),
    "B": ("backward", "#4c78a8", "#2d4f78"),
    "I": ("backward: inputs", "#4c78a8", "#2d4f78"),
    "W": ("backward: weights", "#54a24b", "#3b7535"),
}
MOST_ROWS = 32
MIN_LABEL = 1 / 90  # of the picture's width, which has room for a microbatch's number


def draw_steps(s: Sizes, a: Layout, seq_len: int, hw: Hardware, style: Style, title: str, file: Path) -> None:
    """Bars of seconds for each forward, backward and gradient of weights; white is the bubble."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    times, time = stage_times(s, a, seq_len, hw, style), predict(s, a, seq_len, hw, style)
    shown = repeats_after(a.schedule, a.pp, a.microbatches)
    line = simulate(a.schedule, a.pp, shown, times)
    once = time.step_s - time.optimizer_s - step_s(a.schedule, a.pp, a.microbatches, times)
    ends = (("data parallel", "#b3261e", once), ("update", "#eeca3b", time.optimizer_s))
    whole, rows = line.end_s + once + time.optimizer_s, min(a.pp, MOST_ROWS)
    figure = Figure(figsize=(13, 1.9 + 0.34 * rows), layout="constrained")
    axes = figure.subplots()
    for rank in range(rows):
        _draw_rank(axes, line, rank, a.pp, whole)
        at = line.end_s
        for _, color, lasts in ends:
            axes.broken_barh([(at, lasts)], (rank - 0.4, 0.8), facecolors=color)
            at += lasts
    used = [kind for kind in KINDS if any(action[1] == kind for _, action, *_ in line.spans)]
    legend = [Patch(color=KINDS[kind][1], label=KINDS[kind][0]) for kind in used]
    legend += [Patch(color=color, label=text) for text, color, _ in ends]
    figure.legend(handles=legend, loc="outside right center", fontsize=8.5, frameon=False)
    axes.set_yticks(range(rows), [f"pp {rank}" for rank in range(rows)], fontsize=8.5, color=INK)
    axes.set_xlim(0, whole)
    axes.invert_yaxis()
    axes.set_xlabel("seconds of a step, predicted; numbers: microbatches; darker: later stages of a rank", fontsize=9)
    lines = [title]
    if a.pp > 1:
        waits = time.bubble_s + time.pipeline_s
        lines.append(f"bubble {waits / time.step_s:.1%}: ranks wait {waits:.2f} s of a step of {time.step_s:.2f} s")
    if shown < a.microbatches:
        lines.append(f"drawn with {shown} of the {a.microbatches} microbatches; the others are as those in the middle")
    if rows < a.pp:
        lines.append(f"the first {rows} of {a.pp} pipeline ranks")
    axes.set_title("\n".join(lines), fontsize=10, loc="left", color=INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(file, dpi=120, facecolor="white")


def _draw_rank(axes: Any, line: Timeline, rank: int, pp: int, whole: float) -> None:
    for kind, (_, *colors) in KINDS.items():
        for later, color in enumerate(colors):
            found = [
                (start, end - start, action[2])
                for r, action, start, end in line.spans
                if r == rank and action[1] == kind and (action[0] >= pp) == bool(later)
            ]
            spans = [(start, lasts) for start, lasts, _ in found]
            axes.broken_barh(spans, (rank - 0.4, 0.8), facecolors=color, edgecolor="white", linewidth=0.3)
            for start, lasts, microbatch in found:
                if lasts > MIN_LABEL * whole:
                    ink = INK if kind == "F" and not later else "white"
                    axes.text(start + lasts / 2, rank, microbatch, ha="center", va="center", fontsize=6.5, color=ink)
