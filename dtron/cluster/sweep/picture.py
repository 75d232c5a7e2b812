"""The picture of a sweep: speed of every point, fastest first, next to its memory."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtron.cluster.sweep.results import DEGREE_COLUMNS, Row, columns
from dtron.errors import UserError
from dtron.observe.console import human_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["check_matplotlib", "draw"]

BLUE, ORANGE, GREY, RED, INK = "#4c78a8", "#e8710a", "#8a8f98", "#b3261e", "#202124"
PALE_BLUE, PALE_ORANGE = "#a9c1dc", "#f5b981"
ROW_INCHES, CHAR_INCHES = 0.27, 0.0685  # height of a line of 8-point text, and width of one of its characters
BAR_INCHES, MEMORY_INCHES = 4.6, 2.4
MAX_ROWS = 60
REASON_CHARACTERS = 95


def check_matplotlib() -> None:
    """UserError if matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError(
            "the picture of a sweep needs matplotlib, which is not installed: pip install 'dtron[plot]', or add "
            "--no-picture for only the table and the CSV"
        ) from None


def draw(rows: Sequence[Row], title: str, subtitle: str, files: Sequence[Path]) -> None:
    """Draw `rows`, in their order, to files; the suffix is the format (.svg, .png)."""
    from matplotlib.figure import Figure

    shown, left_out = _choose(rows)
    table = [columns(row, rows) for row in shown]
    head = list(table[0])
    widths = [max(len(name), *(len(line[name]) for line in table)) + 2 for name in head]
    text_inches, height = (sum(widths) + 1) * CHAR_INCHES, (len(shown) + 1) * ROW_INCHES
    top, bottom, edge = 0.95, 0.6 if left_out else 0.4, 0.2
    total_w, total_h = edge + text_inches + BAR_INCHES + MEMORY_INCHES + 0.9, top + height + bottom

    figure = Figure(figsize=(total_w, total_h))
    figure.text(edge / total_w, 1 - 0.25 / total_h, title, fontsize=11, weight="bold", color=INK, va="center")
    figure.text(edge / total_w, 1 - 0.48 / total_h, subtitle, fontsize=8, color=GREY, va="center")

    def axes(x: float, width: float) -> Any:
        return figure.add_axes((x / total_w, bottom / total_h, width / total_w, height / total_h))

    names, speed = axes(edge, text_inches), axes(edge + text_inches, BAR_INCHES)
    memory = axes(edge + text_inches + BAR_INCHES + 0.7, MEMORY_INCHES)
    _draw_names(names, shown, table, head, widths)
    _draw_speed(speed, shown)
    _draw_memory(memory, shown)
    for one in (names, speed, memory):
        one.set_ylim(len(shown) - 0.4, -1.4)
        for y in _breaks(shown):
            one.axhline(y - 0.5, color=GREY, linewidth=0.6)
    if left_out:
        figure.text(edge / total_w, 0.14 / total_h, left_out, fontsize=7.5, color=GREY, va="center")
    for file in files:
        figure.savefig(file, dpi=140, facecolor="white")


def _choose(rows: Sequence[Row]) -> tuple[list[Row], str]:
    """At most MAX_ROWS rows, and a line about those left out, pruned ones first."""
    if len(rows) <= MAX_ROWS:
        return list(rows), ""
    ran = [row for row in rows if row.record.state != "pruned"]
    shown = ran[:MAX_ROWS]
    pruned, slow = len(rows) - len(ran), len(ran) - len(shown)
    parts = [f"{pruned} pruned points"] * bool(pruned) + [f"the last {slow} of those that ran"] * bool(slow)
    return shown, f"not shown: {', '.join(parts)}; the CSV has them all"


def _breaks(rows: Sequence[Row]) -> list[int]:
    """Where the next model begins, and where the points without figures do."""
    kinds = [row.group if row.done else None for row in rows]
    return [y for y in range(1, len(rows)) if kinds[y] != kinds[y - 1]]


def _style_axes(axes: "Axes") -> None:
    axes.set_yticks([])
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#c4c7cc")
    axes.tick_params(axis="x", labelsize=7.5, colors=INK, length=2)
    axes.grid(axis="x", color="#e4e6ea", linewidth=0.7)
    axes.set_axisbelow(True)


def _draw_names(
    axes: "Axes", rows: Sequence[Row], table: list[dict[str, str]], head: list[str], widths: list[int]
) -> None:
    """The points as text, one column per setting that differs."""
    axes.set_axis_off()
    axes.set_xlim(0, sum(widths) + 1)
    ends = [sum(widths[: i + 1]) - 1 for i in range(len(widths))]
    style: dict[str, Any] = {"fontsize": 8, "family": "monospace", "ha": "right", "va": "center"}
    for name, x in zip(head, ends, strict=True):
        axes.text(x, -1, name, weight="bold", color=INK, **style)
    for y, (row, line) in enumerate(zip(rows, table, strict=True)):
        for name, x in zip(head, ends, strict=True):
            faint = not row.done or (name in DEGREE_COLUMNS and line[name] == "1")
            color = ORANGE if row.best else GREY if faint else INK
            axes.text(x, y, line[name], color=color, weight="bold" if row.best else "normal", **style)


def _speed(row: Row, by_mfu: bool) -> float:
    return (100 * (row.record.mfu or 0)) if by_mfu else (row.record.tokens_per_s or 0)


def _draw_speed(axes: "Axes", rows: Sequence[Row]) -> None:
    """Bars of tokens/s, or of MFU if there are several models and it is known. The whiskers are the quartiles."""
    done = [(y, row) for y, row in enumerate(rows) if row.done]
    several = len({row.group for _, row in done}) > 1
    by_mfu = several and all(row.record.mfu is not None for _, row in done)
    most = max((_speed(row, by_mfu) for _, row in done), default=1.0) or 1.0
    axes.set_xlim(0, 1.28 * most)
    what = "MFU, % of the dense bf16 peak" if by_mfu else "tokens/s, all ranks"
    axes.set_title(f"{what} (median step; whisker: quartiles)", fontsize=8.5, loc="left", color=INK, pad=3)
    for y, row in done:
        value = _speed(row, by_mfu)
        axes.barh(y, value, height=0.68, color=ORANGE if row.best else BLUE)
        end = value
        if row.rate_range and row.record.tokens_per_s:
            low, high = (value * rate / row.record.tokens_per_s for rate in row.rate_range)
            axes.plot([low, high], [y, y], color=INK, linewidth=0.9, solid_capstyle="butt")
            end = max(value, high)
        note = human_count(row.record.tokens_per_s or 0)
        note += "" if row.record.mfu is None else f"  {row.record.mfu:.1%}"
        note += "  best" if row.best else ""
        axes.text(min(end, 1.26 * most) + 0.01 * most, y, note, fontsize=7.5, va="center", color=INK)
        if row.loss_differs:
            axes.text(0.01 * most, y, "loss differs", fontsize=7.5, va="center", color="white", weight="bold")
    _draw_reasons(axes, rows, most)
    _style_axes(axes)
    if not by_mfu:
        axes.xaxis.set_major_formatter(lambda value, _: human_count(value))


def _draw_reasons(axes: "Axes", rows: Sequence[Row], most: float) -> None:
    """States of points without figures; the text may extend into the memory column, which is empty there."""
    for y, row in enumerate(rows):
        if row.done:
            continue
        text = row.record.state + (f": {row.record.reason}" if row.record.reason else "")
        text = text if len(text) <= REASON_CHARACTERS else text[: REASON_CHARACTERS - 3] + "..."
        color = GREY if row.record.state in ("pruned", "waiting", "queued", "running", "interrupted") else RED
        axes.text(0.005 * most, y, text, fontsize=7.5, va="center", color=color, style="italic", clip_on=False)


def _draw_memory(axes: "Axes", rows: Sequence[Row]) -> None:
    """Bars of the largest memory of any rank."""
    _style_axes(axes)
    axes.set_title("memory per rank, GiB (max)", fontsize=8.5, loc="left", color=INK, pad=3)
    known = [(y, row, (row.record.max_memory_bytes or 0) / 2**30) for y, row in enumerate(rows) if row.done]
    most = max((gib for _, _, gib in known), default=1.0) or 1.0
    axes.set_xlim(0, 1.25 * most)
    for y, row, gib in known:
        axes.barh(y, gib, height=0.68, color=PALE_ORANGE if row.best else PALE_BLUE)
        axes.text(gib + 0.01 * most, y, f"{gib:.3g}", fontsize=7.5, va="center", color=INK)
