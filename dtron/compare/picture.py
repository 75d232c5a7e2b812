"""The picture of `dtron compare`: loss, gradient norm, throughput and memory of each run over its steps."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dtron.compare.runs import Run
from dtron.errors import UserError

__all__ = ["check_picture", "draw_runs"]

COLORS = ("#4c78a8", "#e8710a", "#54a24b", "#b3261e", "#b279a2", "#9d755d", "#72b7b2", "#8a8f98")
INK = "#202124"
PANELS = (
    ("loss", "loss (nats/token)", 1.0),
    ("grad_norm", "gradient norm", 1.0),
    ("tokens_per_s_per_gpu", "tokens/s per GPU", 1.0),
    ("max_memory_bytes", "peak memory (GiB)", 1 / 2**30),
)


def check_picture(file: Path) -> None:
    """UserError if no picture can be drawn to `file`: another kind of file, or no matplotlib."""
    if file.suffix not in (".png", ".svg"):
        raise UserError(f"--picture {file}: expected the name of a .png or .svg file")
    if not file.parent.is_dir():
        raise UserError(f"--picture {file}: the folder {file.parent} does not exist")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError(
            "--picture needs matplotlib, which is not installed: pip install 'dtron[plot]', or leave out --picture"
        ) from None


def draw_runs(runs: Sequence[Run], parts_at: Sequence[int | None], file: Path) -> None:
    """Four panels, a line per run; dotted: the step where a run parts from the first. parts_at: of the other runs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 6.2), layout="constrained")
    for (key, title, factor), axes in zip(PANELS, figure.subplots(2, 2).flat, strict=True):
        for i, run in enumerate(runs):
            steps, values = points(run, key)
            color, style = COLORS[i % len(COLORS)], "-" if i == 0 else "--"
            marker = "." if len(steps) < 30 else ""
            axes.plot(steps, [v * factor for v in values], style, marker=marker, color=color, label=run.name, lw=1.4)
            parts = parts_at[i - 1] if i else None
            if parts is not None and key in ("loss", "grad_norm"):
                axes.axvline(parts, color=color, linestyle=":", linewidth=1.0)
        axes.set_title(title, fontsize=10, loc="left", color=INK)
        axes.tick_params(labelsize=8.5)
        axes.grid(color="#e3e5e8", linewidth=0.6)
        axes.set_axisbelow(True)
        if key in ("tokens_per_s_per_gpu", "max_memory_bytes"):
            axes.set_ylim(bottom=0)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    for axes in figure.axes[2:]:
        axes.set_xlabel("step", fontsize=9)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", fontsize=8.5, frameon=False, ncols=min(3, len(runs)))
    figure.savefig(file, dpi=120, facecolor="white")


def points(run: Run, key: str) -> tuple[list[int], list[Any]]:
    """Steps and finite values; of the throughput without the first step, which compiles and warms up."""
    rows = [row for row in run.rows if row.get(key) is not None]
    rows = rows[1:] if key == "tokens_per_s_per_gpu" and len(rows) > 2 else rows
    return [row["step"] for row in rows], [row[key] for row in rows]
